"""The mean over pairs, and the sum over real tokens, as one node of the graph each where tensor operations make several.

Numbers and gradients are those of the operations, which stand here too, for compilers and transforms of functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .._sequences import wide_dtype

__all__ = ["mean_of"]


def _mean(losses: Tensor) -> Tensor:
    return (losses.sum(dtype=wide_dtype(losses)) / max(losses.numel(), 1)).to(losses.dtype)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses):
        ctx.shape, ctx.count = losses.shape, max(losses.numel(), 1)
        if not losses.is_cpu:
            return _mean(losses)
        # Divided on the host, in float64 as there: a number takes part in a tensor operation for far more.
        return losses.new_full((), losses.sum(dtype=torch.float64).item() / ctx.count)

    @staticmethod
    def backward(ctx, g):
        if g.is_cpu and ops.alone(g, g) and not torch.is_grad_enabled():
            return g.new_full(ctx.shape, g.item() / ctx.count)
        # Differentiable, and from no saved tensor: a second derivative passes through.
        return (g.to(wide_dtype(g)) / ctx.count).to(g.dtype).expand(ctx.shape)


_mean_node = ops.node_of(_Mean)


def mean_of(losses: Tensor) -> Tensor:
    """Mean over the pairs, summed in float64 where the device has it: equal terms then have exactly that mean, so the
    first step of DPO reports ln 2 for any batch size. 0 for no pairs."""
    if ops.alone(losses, losses) and losses.requires_grad and torch.is_grad_enabled():
        return _mean_node(losses)
    return _mean(losses)
