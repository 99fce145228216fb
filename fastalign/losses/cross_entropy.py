"""`torch.nn.functional.cross_entropy` over token statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.fused_loss import FusedLoss, Grouping
from .base import check_float, check_range, hide, lookup, stats_of, total

_REDUCTIONS = {
    "none": lambda losses, weights: losses,
    "sum": lambda losses, weights: total(losses),
    "mean": lambda losses, weights: total(losses) / weights.sum(),  # no label: 0 / 0, NaN as in torch
}


def _plain(reduction: str) -> FusedLoss:
    """Without class weights and label smoothing."""

    def formula(t: Any) -> tuple[Any]:
        summed = (-t.logps).sum()
        return (summed if reduction == "sum" else summed / t.mask.sum(),)  # no label: 0 / 0, NaN as in torch

    return FusedLoss(formula)


_PLAIN = {reduction: _plain(reduction) for reduction in ("mean", "sum")}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` for class indices, in one read of the logits forward and one backward.

    Args:
        input: [C], [N, C] or [N, C, d1, ...] logits; float32, bfloat16, float16 or float64. With d1, ... and C not
            innermost in memory they are copied once, forward and backward.
        target: [], [N] or [N, d1, ...] class indices, int64 or int32.
        weight: [C], of each class.
        size_average, reduce: deprecated in torch; must be None.
        ignore_index: targets with this value do not count; their logits are not read.
        reduction: "none", "sum" or "mean" (weighted by the targets' weights; NaN where no target counts, as in torch).
        label_smoothing: e in [0, 1] (Szegedy et al. 2016, sec. 7).

    Returns:
        The loss in the dtype of input (under autocast float32, as torch's), computed in float32 or float64.

    Raises:
        TypeError: class probabilities as target, unsupported dtypes, a deprecated argument.
        ValueError: shapes that do not match, an unknown reduction, a target outside [0, C) (checked on CPU).
    """
    if weight is size_average is reduce is None and label_smoothing == 0.0 and reduction in _PLAIN:
        found = _fused(input, target, ignore_index, _PLAIN[reduction])
        if found is not None:
            return found
    check_float("input", input)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor; got {type(target).__name__}")
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices, int64 or int32; got {target.dtype} (class probabilities are not "
            "supported: use torch.nn.functional.cross_entropy)"
        )
    if size_average is not None or reduce is not None:
        raise TypeError(f"size_average and reduce are deprecated: use reduction; got {size_average} and {reduce}")
    reducer = lookup("reduction", _REDUCTIONS, reduction)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    live = target != ignore_index
    if weight is None:
        losses = -stats_of(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing).logps
        weights = live.to(losses.dtype)
    else:
        losses, weights = _weighted(logits, target, live, weight, ignore_index, label_smoothing)
    autocast = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
    return reducer(losses, weights).to(torch.float32 if autocast else input.dtype)


def _fused(input: object, target: object, ignore_index: int, loss: FusedLoss) -> Tensor | None:
    """The loss where one program serves; else None, and the general path does it or says what is wrong."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return None
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else input.dtype
    found = loss.of_logits(logits, target, (), Grouping(1), ignore_index=ignore_index, dtype=dtype)
    return None if found is None else found[0]


def _weighted(
    logits: Tensor, target: Tensor, live: Tensor, weight: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(loss, weight) of each target: -(1 - e) w_y log p_y - (e / C) sum_c w_c log p_c, as torch weights the classes."""
    check_float("weight", weight, logits.shape[-1:], "a class")
    if smoothing:  # two terms reach the logits: their gradients are added before they are rounded
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    stats = stats_of(logits, target, ignore_index=ignore_index)
    weight = weight.to(stats.logps.dtype)
    weights = hide(weight[torch.where(live, target, 0)], live)
    losses = -weights * stats.logps
    if not smoothing:
        return losses, weights
    # sum_c w_c log p_c = sum_c w_c x_c - lse sum_c w_c
    whole = hide(logits @ weight, live) - stats.lse * weight.sum()
    rest = -smoothing / logits.shape[-1] * hide(whole, live)
    return rest if smoothing == 1.0 else (1 - smoothing) * losses + rest, weights
