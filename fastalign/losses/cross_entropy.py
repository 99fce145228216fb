"""`torch.nn.functional.cross_entropy` over token statistics."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.call import TokenCall, as_softcap, autocast_dtype, check_ignore_index
from ..ops.fused_loss import FusedLoss, Grouping
from ..ops.results import TokenStats
from .base import check_float, check_range, hide, lookup, stats_of, total

REDUCTIONS = {
    "none": lambda losses, weights: losses,
    "sum": lambda losses, weights: total(losses),
    "mean": lambda losses, weights: total(losses) / weights.sum(),  # no label: 0 / 0, NaN as in torch
}


def _plain(reduction: str) -> FusedLoss:
    """Without class weights and label smoothing."""

    def formula(t: Any) -> tuple[Any]:
        summed = -t.logps.sum()
        return (summed if reduction == "sum" else summed / t.mask.sum(),)  # no label: 0 / 0, NaN as in torch

    return FusedLoss(formula)


_PLAIN = {reduction: _plain(reduction) for reduction in ("mean", "sum")}

_WHOLE = Grouping(1)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` for class indices, in one read of the logits forward and one backward.

    Args:
        input: [C], [N, C] or [N, C, d1, ...] logits; float32, bfloat16, float16 or float64. With d1, ... and C not
            innermost in memory they are copied once, forward and backward.
        target: [], [N] or [N, d1, ...] class indices, int64, int32 or uint8.
        weight: [C], of each class.
        size_average, reduce: deprecated, as in torch; where one is given they say the reduction: "none" for
            reduce=False, else "sum" for size_average=False, else "mean".
        ignore_index: targets with this value do not count; their logits are not read.
        reduction: "none", "sum" or "mean" (weighted by the targets' weights; NaN where no target counts, as in torch).
        label_smoothing: e in [0, 1] (Szegedy et al. 2016, sec. 7).
        softcap: soft-capping of the logits, softcap * tanh(x / softcap) (Gemma 2).
        z_loss: weight of lse^2 of each target that counts (Chowdhery et al. 2022, sec. 5), which class weights do not
            weigh: of the reductions "mean" adds its mean over these targets.

    Returns:
        The loss in the dtype of input (under autocast float32, as torch's), computed in float32 or float64.

    Raises:
        TypeError: class probabilities as target, unsupported dtypes, an ignore_index that is not an int.
        ValueError: shapes that do not match, an unknown reduction, a target outside [0, C) (checked on CPU).
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy(size_average, reduce)
    if weight is None and label_smoothing == 0.0 and reduction in _PLAIN and softcap is None and z_loss == 0.0:
        found = _fused(input, target, ignore_index, _PLAIN[reduction])
        if found is not None:
            return found
    check_ignore_index(ignore_index)
    logits, target = _checked(input, target)
    reducer = lookup("reduction", REDUCTIONS, reduction)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("z_loss", z_loss, 0.0)
    valid = target.long() != ignore_index
    options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap}
    if label_smoothing and weight is not None:  # two terms reach the logits: their gradients are added, then rounded
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    try:
        stats = stats_of(logits, target, label_smoothing=label_smoothing if weight is None else 0.0, **options)
    except ValueError:
        check_classes(target, ignore_index, logits.shape[-1])
        raise
    losses, weights = -stats.logps, valid.to(stats.logps.dtype)
    if weight is not None:
        check_float("weight", weight, logits.shape[-1:], "a class")
        summed = functools.partial(_summed, logits, weight.to(stats.logps.dtype), softcap)
        losses, weights = weighted(stats, summed, target, valid, weight, label_smoothing)
    found = with_z_loss(reducer(losses, weights), reducer, stats, valid, z_loss)
    wide = input.dtype == torch.float64 or autocast_dtype(input.device) is None
    return found.to(input.dtype if wide else torch.float32)


def with_z_loss(found: Tensor, reducer: Callable[..., Tensor], stats: TokenStats, valid: Tensor, z: float) -> Tensor:
    """What losses were reduced to, and z lse^2 by the same reduction without class weights."""
    return found + reducer(z * stats.lse.square(), valid.to(stats.lse.dtype)) if z else found


def _summed(logits: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """sum_c w_c x_c of each target's logits as the losses see them."""
    cap = as_softcap(softcap)
    return (cap * torch.tanh(logits / cap) if cap else logits).to(weight.dtype) @ weight


def _legacy(size_average: bool | None, reduce: bool | None) -> str:
    warnings.warn(
        "size_average and reduce are deprecated: use reduction='mean', 'sum' or 'none'",
        DeprecationWarning,
        stacklevel=3,
    )
    if reduce is not None and not reduce:
        return "none"
    return "sum" if size_average is not None and not size_average else "mean"


def _checked(input: Any, target: Any) -> tuple[Tensor, Tensor]:
    """The logits with the classes last, and the targets. Raises in the names of this function what later checks would
    in theirs."""
    check_float("input", input)
    if input.dim() < 1 or input.shape[1 if input.dim() > 1 else 0] == 0:
        raise ValueError(f"input must be [C], [N, C] or [N, C, d1, ...] with C >= 1; got {list(input.shape)}")
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    return logits, check_target(target, logits.shape[:-1], "input without C", input.device)


def check_target(target: Any, shape: torch.Size, of: str, device: torch.device) -> Tensor:
    """Class indices of a shape, int64 or int32."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor; got {type(target).__name__}")
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices, int64, int32 or uint8; got {target.dtype} (class probabilities are not "
            "supported: use torch.nn.functional.cross_entropy)"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"target must be int64, int32 or uint8; got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must be {list(shape)}, {of}; got {list(target.shape)}")
    if target.device != device:
        raise ValueError(f"target must be on the device of input, {device}; got {target.device}")
    return target.long() if target.dtype == torch.uint8 else target


def check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    """Says what the kernels' own check found, by the name that the argument has here."""
    bad = ((target < 0) | (target >= classes)) & (target.long() != ignore_index)
    if bad.any():
        raise ValueError(
            f"target must be in [0, {classes}) or equal to ignore_index={ignore_index}; got {int(target[bad][0])} "
            f"at flat position {int(bad.flatten().nonzero()[0])}"
        )


def _fused(input: object, target: object, ignore_index: int, loss: FusedLoss) -> Tensor | None:
    """The loss where one program serves; else None, and the general path does it or says what is wrong."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return None
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else input.dtype
    try:
        call = TokenCall(logits, target, None, ignore_index, 1.0, 0.0)
        found = loss.of_logits(call, (), _WHOLE, False, dtype)
    except ValueError:
        check_classes(target, ignore_index, logits.shape[-1])
        raise
    return None if found is None else found[0]


def weighted(
    stats: TokenStats, summed: Callable[[], Tensor], target: Tensor, valid: Tensor, weight: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(loss, weight) of each target: -(1 - e) w_y log p_y - (e / C) sum_c w_c log p_c, as torch weights the classes.

    Args:
        summed: gives sum_c w_c x_c of each target's logits x.
    """
    weight = weight.to(stats.logps.dtype)
    weights = hide(weight[torch.where(valid, target, 0)], valid)
    losses = -weights * stats.logps
    if not smoothing:
        return losses, weights
    # sum_c w_c log p_c = sum_c w_c x_c - lse sum_c w_c
    whole = hide(summed(), valid) - stats.lse * weight.sum()
    rest = -smoothing / len(weight) * hide(whole, valid)
    return rest if smoothing == 1.0 else (1 - smoothing) * losses + rest, weights
