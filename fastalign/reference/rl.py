"""Advantages in plain Python, from the definition: a sum over all later tokens, no recursion."""

from __future__ import annotations

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
