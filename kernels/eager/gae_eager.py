"""Generalised advantage estimation in plain PyTorch: any device, any floating dtype.

The slow and obvious backend: one step of tensor operations for each token, all rows at once. It defines what the
compiled kernel must return. With t' the next real token after t in its row (none: value and advantage 0):

    delta_t = r_t + gamma V_t' - V_t        A_t = delta_t + gamma lam A_t'

Hidden tokens are stepped over: they are neither read nor discounted for, and their advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of rewards, values (of one floating dtype) and a boolean mask; [..., T] all."""
    next_value = next_advantage = torch.zeros_like(rewards[..., 0]) if rewards.shape[-1] else rewards.new_zeros(())
    advantages = torch.zeros_like(rewards)
    for t in range(rewards.shape[-1] - 1, -1, -1):
        real, value = mask[..., t], values[..., t]
        advantage = rewards[..., t] + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, value, next_value)
        advantages[..., t] = torch.where(real, advantage, 0)
    return advantages, advantages + torch.where(mask, values, 0)
