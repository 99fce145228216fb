"""What policy losses do about tokens that another policy sampled, and how they choose among tokens, in float64.

A place is (b, t), token t of response b; `rows` lists the real tokens of every response.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int]
Rows = list[list[int]]


def weights(rows: Rows, old: Tensor, sampler: Tensor | None, s: Any) -> dict[Place, Tensor]:
    """pi_old / pi_sampler of a token, of its response, or that response's geometric mean; within [floor, cap], or 0
    outside it; over the mean of all."""
    found, means = {}, []
    for b, row in enumerate(rows):
        ratios = {t: 1.0 if sampler is None else math.exp(float(old[b, t]) - float(sampler[b, t])) for t in row}
        whole = math.prod(ratios.values())
        for t in row:
            found[b, t] = _bounded({"token": ratios[t], "sequence": whole, "geometric": whole ** (1 / len(row))}, s)
        means += [found[b, t] for t in (row if s.level == "token" else row[:1])]
    mean = math.fsum(means) / len(means) if s.normalize else 1.0
    return {at: torch.tensor(w / mean, dtype=torch.float64) for at, w in found.items()}


def _bounded(ratios: dict[str, float], s: Any) -> float:
    ratio = ratios[s.level]
    if s.mode == "truncate":
        return min(max(ratio, s.floor), s.cap)
    return ratio if s.floor <= ratio <= s.cap else 0.0


def left_out(rows: Rows, chosen: dict[Place, Tensor], sampler: Tensor, advantages: Tensor, s: Any) -> set[Place]:
    """Tokens with A < 0 of responses with mean log(pi_sampler / pi) > delta (DeepSeek-V3.2, eq. 9)."""
    found = set()
    for b, row in enumerate(rows):
        drift = [float(sampler[b, t]) - float(chosen[b, t].detach()) for t in row]
        if row and math.fsum(drift) / len(row) > s.delta:
            found |= {(b, t) for t in row if advantages[b, t] < 0}
    return found


def of_little_entropy(entropies: dict[Place, Tensor], s: Any) -> set[Place]:
    """Tokens below the quantile 1 - top of the entropies (Wang et al. 2025)."""
    if s.top == 1.0:
        return set()
    bound = torch.stack(list(entropies.values())).detach().quantile(1 - s.top)
    return {at for at, entropy in entropies.items() if entropy < bound}


def covariances_of(advantages: dict[Place, float], logps: dict[Place, Tensor]) -> dict[Place, float]:
    """(A - mean A) (log pi - mean log pi) of each token (Cui et al. 2025)."""
    likely = {at: float(logp.detach()) for at, logp in logps.items()}
    a, p = (math.fsum(x.values()) / len(x) for x in (advantages, likely))
    return {at: (advantages[at] - a) * (likely[at] - p) for at in advantages}
