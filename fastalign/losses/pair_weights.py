"""Weights of pairs and of their tokens: WPO's, from the policy's own probabilities, and LD-DPO's, from lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.results import TokenStats
from ..ops.sequences import wide_dtype
from .base import masked_mean


@torch.no_grad()
def wpo_weights(stats: TokenStats, mask: Tensor) -> Tensor:
    """w(y_w) w(y_l) of each pair, w(y) = exp(mean_t (log pi(y_t) - log sum_v pi(v)^2)): WPO (Zhou et al. 2024, eq. 2).

    How likely the policy would have written both responses, against what it expects of a token that it draws itself:
    preference data of another policy counts as if it were its own.

    Args:
        stats: of [2B, T] tokens, the chosen rows first, with the diagnostic "log_sum_sq_probs".
        mask: [2B, T], boolean, True = real.

    Returns:
        [B], constants.
    """
    aligned = stats.logps.double() - stats.log_sum_sq_probs.double()  # type: ignore[union-attr]
    chosen, rejected = masked_mean(aligned, mask, dim=-1).exp().chunk(2)
    return (chosen * rejected).to(stats.logps.dtype)


def shared_length_weights(mask: Tensor, alpha: float) -> Tensor:
    """[2B, T]: 1 at the real tokens up to the shorter length of their pair, alpha beyond: LD-DPO (Liu et al. 2024).

    float64 where the device has it, since float32 would round alpha.

    mask: [2B, T], boolean, True = real, the chosen rows first.
    """
    lengths = mask.sum(-1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2).unsqueeze(-1)
    ones = torch.ones(mask.shape, dtype=wide_dtype(torch.empty(0, device=mask.device)), device=mask.device)
    return ones.masked_fill_(mask.cumsum(-1) > shared, alpha)
