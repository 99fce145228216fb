"""A loss whose gradient for the labels' log-probabilities is known with it: one node of the graph for all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


class _KnownSlopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, made, *options):
        loss, ctx.slopes, ctx.kept = made
        ctx.save_for_backward(logits, labels)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, g_loss):
        logits, labels = ctx.saved_tensors
        slopes = (g_loss * ctx.slopes,)
        return ops.sums_gradient(logits, labels, ctx.kept, slopes, *ctx.options), None, None, None, None


_node = ops.node_of(_KnownSlopes)


def attach(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    slopes: Tensor,
    kept: bytes,
    options: tuple[int, float, float],
    inplace: bool,
) -> Tensor:
    """The loss as a function of the logits.

    Args:
        loss: scalar.
        slopes: its gradient for the log-probability of every label, or, one number for each of equally long runs of
            labels, for their sums.
        kept: what the forward on a CPU kept of the labels' rows (`cpu.Kept`).
        options: ignore_index, temperature, softcap (0: none).
        inplace: the gradient is written over the logits.
    """
    return _node(logits, labels, (loss, slopes, kept), options, inplace)
