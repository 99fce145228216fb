"""The mean negative log-likelihood of a batch on the CPU as one node of the graph.

From token statistics it is a handful of tensor operations, each recorded, each a node on the way back: some 100 us a
step, whatever the size, where eager torch has one node for it. The number and the gradient are theirs to the bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _backends, ops
from ._op_checks import as_softcap, check

_EXACT = 1 << 24
"""Counts up to this are exact in float32, so dividing in float64 and rounding once is float32's own division."""


class _MeanNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, count, options, inplace, dtype):
        logps, *_, saved = ops.kernel_forward(logits, labels, None, *options, False, False)
        ctx.save_for_backward(logits, labels, saved)
        ctx.count, ctx.options, ctx.inplace = count, options, inplace
        # Divided on the host: a number takes part in a tensor operation for more than a small batch's kernel costs.
        mean = (0.0 - logps.sum().item()) / count if count else math.nan
        loss = logps.new_full((), mean)
        return loss if dtype is None else loss.to(dtype)

    @staticmethod
    def backward(ctx, g_loss):
        logits, labels, saved = ctx.saved_tensors
        per_token = g_loss.item() / ctx.count if ctx.count else 0.0
        g_logps = saved.new_full(labels.shape, -per_token)
        if torch.is_grad_enabled():  # a second derivative is wanted: the operator's node refuses it
            g_logps.requires_grad_()
        grads = (g_logps, None, None, None, None)
        gradient = ops.gradient(logits, labels, None, saved, None, None, grads, ctx.options, ctx.inplace)
        return gradient, None, None, None, None, None


def applies(logits: object, labels: object) -> bool:
    """Whether `mean_nll` does for these arguments: logits on the CPU whose gradient is wanted, and nobody watching."""
    return (
        type(logits) is Tensor
        and type(labels) is Tensor
        and logits.requires_grad
        and logits.is_cpu
        and not torch.compiler.is_compiling()
        and ops.unwatched(logits, labels)
        and torch.is_grad_enabled()
        and labels.numel() <= _EXACT
    )


def mean_nll(
    logits: Tensor,
    labels: Tensor,
    count: int | None = None,
    *,
    least: int = 0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    """-sum of the labels' log-probabilities / count, a scalar, and the count of labels that are not ignored; where
    `applies`. Arguments and errors of `token_stats`.

    Args:
        count: what to divide by; None: the labels that are not ignored, `least` at least. 0 gives NaN, and gradients
            of 0.
        dtype: of the result; None: that of the statistics.
    """
    cap = as_softcap(softcap)
    check(logits, labels, None, temperature, cap, inplace_backward)
    live = _backends.count_live(labels, ignore_index)
    over = max(live, least) if count is None else count
    options = (ignore_index, temperature, cap)
    return _MeanNLL.apply(logits, labels, over, options, inplace_backward, dtype), live
