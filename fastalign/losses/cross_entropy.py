"""`torch.nn.functional.cross_entropy` over token statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from .._mean_nll import applies as mean_nll_applies
from .._mean_nll import mean_nll
from ._common import check_float, check_range, hide, lookup, stats_of

_REDUCTIONS = {
    "none": lambda losses, weights: losses,
    "sum": lambda losses, weights: losses.sum(),
    "mean": lambda losses, weights: losses.sum() / weights.sum(),  # no label: 0 / 0, NaN as in torch
}


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
    autocast = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
    dtype = torch.float32 if autocast else input.dtype
    if reduction != "none" and weight is None and not label_smoothing and mean_nll_applies(logits, target):
        count = None if reduction == "mean" else 1
        return mean_nll(logits, target, count, ignore_index=ignore_index, dtype=dtype)[0]
    live = target != ignore_index
    if weight is None:
        losses = -stats_of(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing).logps
        weights = live.to(losses.dtype)
    else:
        losses, weights = _weighted(logits, target, live, weight, ignore_index, label_smoothing)
    return reducer(losses, weights).to(dtype)


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
    total = hide(logits @ weight, live) - stats.lse * weight.sum()
    return (1 - smoothing) * losses - smoothing / logits.shape[-1] * hide(total, live), weights
