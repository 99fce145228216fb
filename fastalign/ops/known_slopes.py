"""Losses on the CPU that come with their gradient for the labels' log-probabilities: one raw call, one graph node.

From log-probabilities such a loss and its metrics are some forty to ninety tensor operations, each recorded: 0.2 to
1 ms a step, whatever the size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends
from . import statistics as ops
from .call import as_softcap


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


class Call(NamedTuple):
    """A call that the backend `cpu` may take as it is."""

    cpu: Any
    options: tuple[int, float, float]
    """ignore_index, temperature, softcap (0: none)."""
    wanted: bool
    """A gradient is."""
    inplace: bool
    """It is to be written over the logits."""

    def attach(self, loss: Tensor, logits: Tensor, labels: Tensor, slopes: Tensor, kept: bytes) -> Tensor:
        """The scalar loss as a function of the logits, where that is wanted.

        Args:
            slopes: its gradient for the log-probability of every label, or, one number for each of equally long runs
                of labels, for their sums.
            kept: what the forward kept of the labels' rows (`cpu.Kept`).
        """
        return _node(logits, labels, (loss, slopes, kept), self.options, self.inplace) if self.wanted else loss


def direct_call(
    logits: Any,
    labels: Any,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Call | None:
    """None where it is not known to be all right: for others than plain tensors on the CPU, and where somebody watches.

    Arguments are those of `token_stats`.
    """
    cpu = _backends.direct(logits) if ops.alone(logits, labels) and labels.dim() > 0 else None
    if cpu is None:
        return None
    wanted = logits.requires_grad and torch.is_grad_enabled()
    options = (ignore_index, temperature, 0.0 if softcap is None else as_softcap(softcap))
    return Call(cpu, options, wanted, wanted and inplace_backward)
