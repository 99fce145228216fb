"""What `token_stats` returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics of the labels' shape; float32, or float64 for float64 logits; None where not asked for.

    All are 0 where the label is `ignore_index`.
    """

    logps: Tensor
    """log softmax(x)[label]; under label smoothing (1 - e) of it plus e times the vocabulary's mean log-probability."""
    lse: Tensor
    """log sum_j exp x_j; differentiable, so a z-loss is `stats.lse.square()`."""
    entropy: Tensor | None
    """-sum_j p_j log p_j, in nats."""
    kl: Tensor | None
    """KL(p || q) = sum_j p_j (log p_j - log q_j) against the reference logits, over the whole vocabulary, in nats."""


def smoothed(logps: Any, lse: Any, mean: Any, smoothing: float) -> Any:
    """(1 - e) log p[label] + e times the vocabulary's mean log-probability. A term of weight 0 is not formed: 0 * inf
    is NaN."""
    if smoothing == 0.0:
        return logps
    whole = mean - lse
    return whole if smoothing == 1.0 else (1 - smoothing) * logps + smoothing * whole


class TokenStatsAndExtras(NamedTuple):
    """In place of `TokenStats`, and beginning as it does, where `extras` were asked for."""

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    log_sum_sq_probs: Tensor | None = None
    """log sum_j p_j^2; a constant, as are the next two."""
    mean_logits: Tensor | None = None
    """Mean of x over the vocabulary."""
    is_top1: Tensor | None = None
    """Boolean: the label is the most likely token (of equally likely ones the first); False where ignored."""
