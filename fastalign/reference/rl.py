"""Advantages in plain Python, from their definitions: sums over all later tokens, no recursion."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Schulman et al. 2016, eq. 16, for [B, T] each: A_t = sum_l (gamma lam)^l delta_{t+l} over a row's real tokens."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        real = [t for t in range(rewards.shape[1]) if mask[b, t]]
        r = [float(rewards[b, t]) for t in real]
        v = [float(values[b, t]) for t in real] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(real))]
        for i, t in enumerate(real):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(real)))
    return advantages


def returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_k gamma^k r_{t+k} over a row's real tokens, [B, T]."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


Group = list[float]


def _mean(x: Group) -> float:
    return math.fsum(x) / len(x)


def _deviation(x: Group) -> float:
    return math.sqrt(math.fsum((r - _mean(x)) ** 2 for r in x) / (len(x) - 1)) if len(x) > 1 else 0.0


def opo(rewards: Group, lengths: Group) -> Group:
    """Hao et al. 2025 (arXiv:2505.23585): r - sum l r / sum l."""
    baseline = math.fsum(n * r for n, r in zip(lengths, rewards, strict=True)) / math.fsum(lengths)
    return [r - baseline for r in rewards]


def otb(rewards: list[Group], logps: list[Group], energies: list[Group]) -> list[Group]:
    """Li et al. 2026 (arXiv:2602.07078), ragged responses of one prompt: G_t - sum W_t G_t / sum W_t over those that
    have a token t, W_t = sum_{j <= t} (1 - 2 pi_j + sum pi^2); energies are sum pi^2."""
    totals = [[math.fsum(row[t:]) for t in range(len(row))] for row in rewards]
    norms = [
        [1 - 2 * math.exp(p) + e for p, e in zip(*both, strict=True)] for both in zip(logps, energies, strict=True)
    ]
    weights = [[math.fsum(row[: t + 1]) for t in range(len(row))] for row in norms]
    found: list[Group] = [[] for _ in rewards]
    for t in range(max(map(len, rewards))):
        there = [i for i, row in enumerate(rewards) if len(row) > t]
        over = math.fsum(weights[i][t] for i in there)
        baseline = math.fsum(weights[i][t] * totals[i][t] for i in there) / over
        for i in there:
            found[i].append(totals[i][t] - baseline)
    return found


def passk(rewards: Group, eps: float | None = None) -> Group:
    """arXiv:2503.19595: the best moves E max, by what it adds to the second; over the deviation plus eps."""
    first, second = sorted(rewards, reverse=True)[:2]
    over = 1.0 if eps is None else _deviation(rewards) + eps
    return [(first - second) / over if r == first else 0.0 for r in rewards]


def gpg(groups: list[Group]) -> list[Group]:
    """Chu et al. 2025 (arXiv:2504.02546): alpha (r - mean), alpha = groups over groups that have a gradient."""
    alpha = len(groups) / max(sum(len(set(g)) > 1 for g in groups), 1)
    return [[alpha * (r - _mean(g)) for r in g] for g in groups]


def gdpo(groups: list[list[Group]], weights: Group, eps: float) -> list[Group]:
    """arXiv:2601.05242, groups of samples of several rewards: each standardised in its group, summed, standardised."""
    sums = []
    for group in groups:
        columns = list(zip(*group, strict=True))
        means, deviations = [_mean(list(c)) for c in columns], [_deviation(list(c)) for c in columns]
        parts = list(zip(weights, means, deviations, strict=True))
        sums.append(
            [math.fsum(w * (r - m) / (d + eps) for (w, m, d), r in zip(parts, sample, strict=True)) for sample in group]
        )
    flat = [x for group in sums for x in group]
    return [[(x - _mean(flat)) / (_deviation(flat) + eps) for x in group] for group in sums]


def whitened(rows: list[Group]) -> list[Group]:
    """All numbers of ragged rows, with mean 0 and sample variance 1 (n - 1)."""
    flat = [x for row in rows for x in row]
    scale = math.sqrt(_deviation(flat) ** 2 + 1e-8)
    return [[(x - _mean(flat)) / scale for x in row] for row in rows]


def reinforce_pp(rows: list[Group], gamma: float) -> list[Group]:
    """Hu 2025 (arXiv:2501.03262): every token's return, whitened."""
    return whitened([[math.fsum(gamma**k * r for k, r in enumerate(row[t:])) for t in range(len(row))] for row in rows])


def reinforce_pp_baseline(groups: list[Group], lengths: list[list[int]]) -> list[Group]:
    """The same paper: rewards minus their group's mean, at every token of the response, whitened."""
    rows = []
    for group, counts in zip(groups, lengths, strict=True):
        rows += [[r - _mean(group)] * n for r, n in zip(group, counts, strict=True)]
    return whitened(rows)


def overlong(length: int, most: int, buffer: int) -> float:
    """Yu et al. 2025, eq. 13."""
    if length <= most - buffer:
        return 0.0
    return (most - buffer - length) / buffer if length <= most else -1.0
