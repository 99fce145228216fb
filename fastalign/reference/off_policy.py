"""Distances of policies at tokens that one of them sampled, what losses do by them, and how they choose among tokens.

A place is (b, t), token t of response b; `rows` lists the real tokens of every response.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int]
Rows = list[list[int]]

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda r: -torch.log(r),
    "k2": lambda r: torch.log(r) ** 2 / 2,
    "k3": lambda r: (r - 1) - torch.log(r),
    "k3_clamped": lambda r: (r.clip(math.exp(-20), math.exp(20)) - 1 - torch.log(r).clip(-20, 20)).clip(max=10),
    "abs": lambda r: torch.log(r).abs(),
    "k3+": lambda r: ((r - 1) - torch.log(r)).detach() + (torch.log(r) ** 2 - torch.log(r.detach()) ** 2) / 2,
}
"""Of KL(q, p) from samples of q, with r = p / q (Schulman 2020). k3+, k3 in value, has k2's gradient."""


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
