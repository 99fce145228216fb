"""Rewards of reinforcement learning from preferences: a score for the response, a KL penalty for every token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.base import check_float, check_mask, check_range, hide
from ..losses.kl import token_kl
from ..losses.reductions import as_real


class ShapedRewards(NamedTuple):
    """Constants all; rewards is [B, T], the rest [B], a number for each response."""

    rewards: Tensor
    """Reward of each token, 0 where hidden."""
    kl: Tensor
    """KL to the reference, summed over the response's tokens, in nats."""
    scores: Tensor
    """The scores after the missing-EOS penalty."""
    non_score_rewards: Tensor
    """-kl_coef * kl."""


def last_real(mask: Tensor) -> Tensor:
    """Boolean [..., T], True at the last True of each row of the mask; nowhere in a row without one."""
    at = torch.arange(1, mask.shape[-1] + 1, device=mask.device) * mask
    return mask & (at == at.amax(-1, keepdim=True)) if mask.shape[-1] else mask


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length - buffer tokens, from there linearly to -1 at max_length: DAPO (Yu et al. 2025, eq. 13).

    Args:
        lengths: [...], tokens of each response, whole numbers.
        max_length: tokens that a response may have.
        buffer: the last tokens of these, in [1, max_length], over which the penalty grows.

    Returns:
        [...], float32, in [-1, 0]; -1 beyond max_length.

    Raises:
        ValueError: a buffer out of its range.
    """
    check_range("buffer", buffer, 1, max_length)
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0).float()


def shape_rewards(
    scores: Tensor,
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    kl: Tensor | None = None,
    missing_eos_penalty: float | None = None,
    ended: Tensor | None = None,
) -> ShapedRewards:
    """r_t = -kl_coef KL_t + [t is the last real token] (score - penalty) (Ziegler et al. 2019, eq. 2).

    The score falls on the response's last real token, EOS if it ended, where the value before that token can learn of
    it; a response without any real token gets none.

    Args:
        scores: [B], the reward model's.
        logps: [B, T], log-probabilities by the policy that sampled.
        ref_logps: [B, T], by the reference policy; None with kl_estimator="exact".
        mask: [B, T], boolean, True = token of the response; what it hides changes nothing.
        kl_coef: beta >= 0.
        kl_estimator: "k1" (unbiased, and the field's standard), "k2", "k3", or "exact", which takes `kl`.
        kl: [B, T], exact KL of each token's distribution.
        missing_eos_penalty: subtracted from the score of a response that did not end; needs `ended`.
        ended: [B], boolean, True = the response ended with EOS within the token budget.

    Raises:
        TypeError: not a floating-point tensor, or a mask or `ended` that is not boolean.
        ValueError: shapes that differ, an unknown estimator or one without its input, a negative or non-finite number.
    """
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_float("scores", scores, logps.shape[:-1], "logps without its tokens")
    check_range("kl_coef", kl_coef, 0)
    with torch.no_grad():
        divergence = token_kl(logps, ref_logps, kl, kl_estimator, mask)
        if divergence is None:
            raise ValueError(f"ref_logps must be given for kl_estimator={kl_estimator!r}; got None")
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if missing_eos_penalty is not None:
            if ended is None:
                raise ValueError("missing_eos_penalty needs ended, which says what responses ended with EOS; got None")
            check_mask("ended", ended, scores.shape, "scores")
            penalty = check_range("missing_eos_penalty", missing_eos_penalty, 0)
            scores = torch.where(ended, scores, scores - penalty)
        # Of weight 0 the KL is reported alone: 0 times an infinite one would be NaN.
        leash = kl_coef * divergence if kl_coef else torch.zeros_like(divergence)
        terminal = hide(scores.unsqueeze(-1).expand(mask.shape), last_real(mask))
        return ShapedRewards(as_real(terminal - leash, mask), divergence.sum(-1), scores, -leash.sum(-1))
