"""The one node of the graph that a fused loss is: a loss that is known, with the way to its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from . import statistics, transforms
from .call import TokenCall
from .symbols import STATISTICS


class _FusedLoss(torch.autograd.Function):
    """A loss that is known with the way to its gradient.

    `made`: the loss, which as an argument of its own would come back as a view; a function from (what it knows, the
    gradient of the loss, saved tensors) to None and those of the tensors; what it knows; whether it needs these.
    """

    @staticmethod
    def forward(ctx, made, *tensors):
        loss, ctx.pull, ctx.known, saves = made
        if saves:
            ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return ctx.pull(ctx.known, gradient, ctx.saved_tensors)


node = statistics.node_of(_FusedLoss)


_OfForward = tuple[int, tuple[int, float, float], bool]
"""Bits of the statistics that the loss moves with, options, in place."""
_OfLogits = tuple[int, bytes, tuple[int, float, float], bool]
"""Bits of the statistics that the loss moves with, whose derivatives were kept; what was kept; options; in place."""


def to_logits(known: _OfLogits, gradient: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """By the backward kernel: tensors are logits, labels and the reference's logits, if there is one."""
    which, kept, options, inplace = known
    logits, labels, reference = saved if len(saved) == 3 else (*saved, None)
    found = None if inplace else statistics.direct_gradient(logits, labels, options, reference, kept, gradient, which)
    if found is None:
        rows, derivatives = _backends.kept_rows(kept, labels, which)
        grads = _of_statistics(which, gradient, labels, derivatives)
        call = TokenCall(logits, labels, reference, *options)
        found = statistics.gradient(call, *rows, grads, inplace)
    return (None, found, None) if reference is None else (None, found, None, None)


def to_kept_logits(known: _OfForward, gradient: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The same after a forward of tensors: logits, labels, the reference's logits, what the forward saved, entropy, KL
    and derivatives [k, tokens]."""
    which, options, inplace = known
    logits, labels, reference, rows, entropy, kl, derivatives = saved
    grads = _of_statistics(which, gradient, labels, derivatives)
    found = statistics.gradient(TokenCall(logits, labels, reference, *options), rows, entropy, kl, grads, inplace)
    return None, found, *[None] * 6


def _of_statistics(which: int, gradient: Tensor, labels: Tensor, derivatives: Tensor | None) -> statistics.Grads:
    """The gradient of every statistic, of the labels' shape."""
    each: list[Tensor | None] = [None] * len(STATISTICS)
    wide = gradient.float()
    if torch.is_grad_enabled() and not wide.requires_grad:
        wide = wide.detach().requires_grad_()  # so that another derivative is refused, not silently zero
    rows = iter([] if derivatives is None else _times(wide, derivatives).unbind())
    for k in range(len(STATISTICS)):
        if which >> k & 1:
            row = next(rows)  # if a hook changed the labels, the checks of the backward say so
            each[k] = row.view(labels.shape) if row.numel() == labels.numel() else row
    return tuple(each)


def _times(gradient: Tensor, derivatives: Tensor) -> Tensor:
    """The gradient of a loss, or of the losses of equally long sequences, times derivatives [..., tokens]."""
    if gradient.dim() == 0:
        return gradient * derivatives
    apart = derivatives.view(*derivatives.shape[:-1], len(gradient), -1)
    return (gradient.unsqueeze(-1) * apart).view(derivatives.shape)


def to_statistics(derivatives: Sequence[Tensor], gradient: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """To statistics that are differentiable themselves."""
    return None, *[_times(gradient, slope).view(t.shape) for slope, t in zip(derivatives, saved, strict=True)]


def _hand_on(known: list[Sequence[Tensor | None]], scale: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that are formed already; they are handed on once."""
    if not known:
        raise RuntimeError(
            "the gradient of a loss that was formed with it was handed on already: it can be used once "
            "(fuse_backward=False, or another plan of the head, keeps what another backward needs)"
        )
    gradients = known.pop()
    if transforms.batched(scale):  # one gradient for each
        return None, *[None if gradient is None else gradient * scale for gradient in gradients]
    for gradient in gradients:
        if gradient is not None:
            _backends.pick(gradient).scale(gradient, scale)  # the buffer is ours
    return None, *gradients


def attach_gradients(loss: Tensor, tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tensor:
    """The scalar loss as a function of tensors whose gradients are known; it can be differentiated once.

    None among the gradients: there is none.
    """
    return _FusedLoss.apply((loss.detach().clone(), _hand_on, [tuple(gradients)], False), *tensors)
