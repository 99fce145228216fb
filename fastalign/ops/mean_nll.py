"""The mean negative log-likelihood of a batch on the CPU as one node of the graph and one raw call each way.

From token statistics it is a handful of tensor operations, each recorded, each a node on the way back: some 100 us a
step, whatever the size, where eager torch has one node for it. The number and the gradient are theirs: sums are taken
in float64 on both roads, only in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends
from . import statistics as ops
from .call import as_softcap


class _MeanNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, made):
        loss, *ctx.made = made
        ctx.save_for_backward(logits, labels)
        return loss

    @staticmethod
    def backward(ctx, g_loss):
        logits, labels = ctx.saved_tensors
        kept, count, options, inplace = ctx.made
        if not inplace and not torch.is_grad_enabled() and ops.unwatched(logits, labels):
            out = ops.room_for_gradient(logits, inplace=False)
            cpu = _backends.direct(logits)
            if cpu is not None and cpu.mean_nll_backward(logits, labels, kept, g_loss, count, options, out):
                return out, None, None
        # In place; or somebody watches, or changed what was saved; or wants another derivative, which the operator's
        # node refuses.
        slope = -(g_loss.float() / count) if count else torch.zeros_like(g_loss, dtype=torch.float32)
        g_logps = slope.expand(labels.shape)
        if torch.is_grad_enabled() and not g_logps.requires_grad:
            g_logps = g_logps.detach().requires_grad_()
        grads = (g_logps, None, None, None, None)
        saved = _backends.saved_tensor(kept, labels)
        return ops.gradient(logits, labels, None, saved, None, None, grads, options, inplace), None, None


_node = ops.node_of(_MeanNLL)


def mean_nll(
    logits: Any,
    labels: Any,
    count: int = 0,
    *,
    least: int = 0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, int] | None:
    """-sum of the labels' log-probabilities / count, a scalar, and the count of labels that are not ignored.

    None where that is not known to be all right: for arguments that are wrong, for others than plain tensors on the CPU
    that the kernels take as they are, where no gradient is wanted, and where somebody watches. Token statistics then
    say what is wrong, or do it.

    Args:
        logits, labels, ignore_index, temperature, softcap, inplace_backward: as in `token_stats`.
        count: what to divide by; 0: by the number of labels that are not ignored, taken as `least` at least. Where
            that is 0 the mean is NaN, and its gradients are 0.
        dtype: of the result.

    Raises:
        ValueError: a label outside [0, V).
    """
    if not ops.alone(logits, labels):
        return None
    cpu = _backends.direct(logits)
    if cpu is None or not logits.requires_grad or not torch.is_grad_enabled():
        return None
    options = (ignore_index, temperature, 0.0 if softcap is None else as_softcap(softcap))
    made = cpu.mean_nll(logits, labels, count, least, options, inplace_backward, dtype)
    if made is None:
        return None
    loss, kept, live = made
    return _node(logits, labels, (loss, kept, count or max(live, least), options, inplace_backward)), live
