"""`torch.nn.functional.linear_cross_entropy` over a fused head: the logits are never held whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..head.head import Head, head_token_stats
from ..ops.call import autocast_dtype, check_ignore_index
from ..ops.results import TokenStats
from .base import check_float, check_range, lookup
from .cross_entropy import REDUCTIONS, check_classes, check_target, weighted, with_z_loss
from .sft import SFTLoss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    chunk_bytes: int | None = None,
    plan: str | None = None,
    logits_dtype: torch.dtype | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13) for class indices: cross_entropy(linear(input), target).

    Args:
        input: [..., H]; float32, bfloat16, float16 or float64.
        linear_weight: [C, H].
        target: [...] class indices, int64, int32 or uint8.
        linear_bias: [C].
        weight: [C], of each class.
        reduction: "none", "sum" or "mean" (weighted by the targets' weights; NaN where no target counts, as in torch).
        ignore_index: targets with this value do not count, and their hidden states are dropped before the first
            product; None: -100.
        label_smoothing: e in [0, 1] (Szegedy et al. 2016, sec. 7).
        options: torch's `LinearCrossEntropyOptions`, which say how torch cuts the batch. Here the plan does: they are
            taken, so that a call need not be changed, and change nothing.
        chunk_bytes, plan, logits_dtype: as in `Head`; plan "objective" for "sum" and "mean" without class weights.
        softcap, z_loss: as in `fastalign.cross_entropy`; soft-capping not with class weights under label smoothing.

    Returns:
        The loss in the dtype of input (under autocast float32), computed in float32 or float64. Differentiable in
        input, linear_weight and linear_bias.

    Raises:
        TypeError: class probabilities as target, unsupported dtypes, an ignore_index that is not an int.
        ValueError: shapes that do not match, a weight of more than two dimensions, an unknown reduction, a target
            outside [0, C) (checked on CPU), soft-capping under label smoothing of weighted classes.
    """
    reducer = lookup("reduction", REDUCTIONS, reduction)
    check_range("z_loss", z_loss, 0.0)
    if softcap is not None and weight is not None and label_smoothing:
        raise ValueError("softcap must be None with both weight and label_smoothing: their sum would need all logits")
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    ignore_index = check_ignore_index(-100 if ignore_index is None else ignore_index)
    _check_linear(input, linear_weight)
    target = check_target(target, input.shape[:-1], "input without H", input.device)
    choice: dict[str, Any] = {"chunk_bytes": chunk_bytes, "plan": plan, "logits_dtype": logits_dtype}
    try:
        if weight is None and reduction != "none":
            head = Head(input.reshape(-1, 1, input.shape[-1]), linear_weight, linear_bias, **choice)
            options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
            loss = _reduced(head, target.reshape(-1, 1), reduction, ignore_index, options)
        else:
            smoothing = label_smoothing if weight is None else 0.0
            stats = head_token_stats(
                input,
                linear_weight,
                target,
                bias=linear_bias,
                ignore_index=ignore_index,
                label_smoothing=smoothing,
                softcap=softcap,
                **choice,
            )
            valid = target.long() != ignore_index
            losses, weights = -stats.logps, valid.to(stats.logps.dtype)
            if weight is not None:
                losses, weights = _class_weighted(
                    stats, (input, linear_weight, linear_bias), target, valid, weight, label_smoothing
                )
            loss = with_z_loss(reducer(losses, weights), reducer, stats, valid, z_loss)
    except ValueError:
        check_classes(target, ignore_index, linear_weight.shape[0])
        raise
    wide = input.dtype == torch.float64 or autocast_dtype(input.device) is None
    return loss.to(input.dtype if wide else torch.float32)


def _check_linear(input: Any, linear_weight: Any) -> None:
    check_float("input", input)
    check_float("linear_weight", linear_weight)
    if linear_weight.dim() != 2 or 0 in linear_weight.shape:
        raise ValueError(
            f"linear_weight must be [C, H] with C >= 1; got {list(linear_weight.shape)} (a loss of several dimensions "
            "is not supported: use torch.nn.functional.linear_cross_entropy)"
        )
    if input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(f"input must be [..., {linear_weight.shape[1]}] as linear_weight; got {list(input.shape)}")


def _reduced(head: Head, target: Tensor, reduction: str, ignore_index: int, options: dict[str, Any]) -> Tensor:
    """The sum or mean, by every plan of the head."""
    module = SFTLoss(ignore_index=ignore_index, **options)
    found = module(head, target, num_items=1 if reduction == "sum" else None)
    return found.loss if reduction == "sum" else torch.where(found.num_tokens > 0, found.loss, torch.nan)


def _class_weighted(
    stats: TokenStats,
    linear: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    valid: Tensor,
    weight: Tensor,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """As `weighted` of the logits, whose sum over classes is a product with one column."""
    hidden, matrix, bias = linear
    check_float("weight", weight, matrix.shape[:1], "a class")
    wide = stats.logps.dtype

    def summed() -> Tensor:
        found = hidden.to(wide) @ (weight.to(wide) @ matrix.to(wide))
        return found if bias is None else found + weight.to(wide) @ bias.to(wide)

    return weighted(stats, summed, target, valid, weight, smoothing)
