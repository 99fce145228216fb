"""How a per-token loss becomes a number: the normalisations that tell GRPO, DAPO, Dr. GRPO and PPO apart.

All of them count real tokens and sequences that hold one, never padding: neither padded columns nor padded rows change
the result. With `num_items`, the count over the whole batch, the losses of microbatches add up to the batch's loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.fused_loss import BATCH, FusedLoss, Grouping, Input
from .base import check_float, check_range, hide, lookup, masked_mean, total

Count = int | float | Tensor


def _over(sums: Tensor, count: Count) -> Tensor:
    """sums / count, with an empty count taken as 1: the sum is 0 there."""
    return sums / (max(count, 1) if isinstance(count, (int, float)) else count.clamp(min=1).to(sums.dtype))


def _sequences(mask: Tensor) -> Tensor:
    return mask.any(-1).sum()


def _token(x: Tensor, mask: Tensor, num_items: Count | None, max_length: int | None) -> Tensor:
    """The mean over real tokens."""
    return _over(total(hide(x, mask)), mask.sum() if num_items is None else num_items)


def _grpo(x: Tensor, mask: Tensor, num_items: Count | None, max_length: int | None) -> Tensor:
    """The mean over sequences of the mean over their tokens: Shao et al. 2024, eq. 3."""
    return _over(masked_mean(x, mask, dim=-1).sum(), _sequences(mask) if num_items is None else num_items)


def _dapo(x: Tensor, mask: Tensor, num_items: Count | None, max_length: int | None) -> Tensor:
    """The sum over the batch's real tokens, counted globally: Yu et al. 2025, eq. 8."""
    if num_items is None:
        raise ValueError("normalization='dapo' needs num_items, the number of real tokens of the whole batch; got None")
    return _token(x, mask, num_items, max_length)


def _dr_grpo(x: Tensor, mask: Tensor, num_items: Count | None, max_length: int | None) -> Tensor:
    """The sum over sequences times max_length, a constant: Liu et al. 2025, sec. 3.2."""
    if max_length is None:
        raise ValueError("normalization='dr_grpo' needs max_length, the generation budget in tokens; got None")
    return _over(hide(x, mask).sum() / max_length, _sequences(mask) if num_items is None else num_items)


NORMALIZATIONS: dict[str, Callable[[Tensor, Tensor, Count | None, int | None], Tensor]] = {
    "token": _token,
    "bnpo": _token,  # the same, under the name that trainers give it
    "grpo": _grpo,
    "dapo": _dapo,
    "dr_grpo": _dr_grpo,
}


def normalize(
    x: Tensor, mask: Tensor, normalization: str, num_items: Count | None = None, max_length: int | None = None
) -> Tensor:
    """The scalar that a per-token loss [..., T] is reduced to.

    Args:
        x: [..., T], sequences along the last axis. What the mask hides changes nothing.
        mask: [..., T], boolean.
        normalization: a key of `NORMALIZATIONS`.
        num_items: the count to divide by in place of this batch's own: real tokens (`token`, `bnpo`, `dapo`) or
            sequences (`grpo`, `dr_grpo`) over all microbatches and processes. `dapo` needs it.
        max_length: tokens that a completion may have; `dr_grpo` needs it.
    """
    check_normalization(x, normalization, num_items, max_length)
    return normalize_real(x, mask, normalization, num_items, max_length)


def check_normalization(x: Tensor, normalization: str, num_items: Count | None, max_length: int | None) -> None:
    """Raises unless the arguments of `normalize` are right."""
    lookup("normalization", NORMALIZATIONS, normalization)
    if num_items is not None and not isinstance(num_items, Tensor):
        check_range("num_items", num_items, 0)
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items must be one number; got a tensor of shape {list(num_items.shape)}")
    if max_length is not None:
        check_range("max_length", max_length, 1)
    if x.dim() == 0:
        raise ValueError("a per-token loss must have the tokens as its last axis; got a tensor without axes")


def normalize_real(
    x: Tensor, mask: Tensor, normalization: str, num_items: Count | None, max_length: int | None
) -> Tensor:
    """`normalize` without its checks, also of what a formula is traced with."""
    if isinstance(num_items, Tensor):
        num_items = num_items.reshape(())  # a [1] would make the loss a [1]
    return NORMALIZATIONS[normalization](x, mask, num_items, max_length)


@functools.lru_cache(maxsize=32)
def _normalized(normalization: str, max_length: int | None) -> FusedLoss:
    """The normalisation of losses that stand where the log-probabilities do."""
    return FusedLoss(lambda t: (normalize_real(t.logps, t.mask, normalization, t.num_items, max_length),))


def check_weights(weights: Any, mask: Tensor) -> None:
    """Raises unless these are such as `weighted` takes: of the mask's shape, at least 0 where it is True (looked at on
    the CPU)."""
    check_float("weights", weights, mask.shape, "labels")
    if weights.device.type == "cpu" and bool((weights[mask] < 0).any()):
        raise ValueError(f"weights must be at least 0; got {float(weights[mask].min())}")


def weighted(x: Any, weights: Any, mask: Any, normalization: str, num_items: Count | None) -> Any:
    """The mean of what tokens have, by weights of theirs: over all tokens (`token`), or over sequences of the weighted
    means over theirs (`grpo`). What weighs nothing counts nowhere, as if it were hidden.

    num_items: the sum of all weights, or the number of sequences that weigh something, over all microbatches.
    """
    x, weights = hide(x * weights, mask), hide(weights, mask)
    if normalization == "token":
        sums, count = total(x), total(weights)
    else:
        own = weights.sum(-1)
        sums, count = (x.sum(-1) / _or_one(own)).sum(), (own > 0).sum()
    if num_items is None:
        return sums / _or_one(count)
    return sums / (num_items.reshape(()) if isinstance(num_items, Tensor) else num_items)


def _or_one(count: Any) -> Any:
    """The count, but 1 where it is 0."""
    return torch.where(count > 0, count, torch.ones_like(count))


def token_weights(
    labels: Tensor,
    ignore_index: int,
    normalization: str,
    num_items: Count | None = None,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """What each token's loss counts for in the scalar: the derivative of the (linear) normalisation. float32 or
    float64.

    weights: those of `weighted`, if it is the normalisation.
    """
    x = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    check_normalization(x, normalization, num_items, max_length)
    if not isinstance(num_items, Tensor) and dtype == torch.float32 and weights is None:
        grouping = Grouping(labels.numel() // max(labels.shape[-1], 1))
        fused, inputs = _normalized(normalization, max_length), [Input("num_items", num_items, BATCH)]
        found = fused.derivatives(labels, inputs, grouping, ignore_index, logps=x)
        if found is not None:
            return found[0]
    mask = labels.long() != ignore_index
    with torch.enable_grad():
        x.requires_grad_()
        if weights is None:
            loss = normalize_real(x, mask, normalization, num_items, max_length)
        else:
            loss = weighted(x, weights.detach().to(dtype), mask, normalization, num_items)
        (weight,) = torch.autograd.grad(loss, x)
    return weight


def as_real(x: Tensor, mask: Tensor) -> Tensor:
    """x in float32 at least, with 0 where the mask is False: log-ratios and token counts do not fit half precision."""
    return hide(x.to(torch.promote_types(x.dtype, torch.float32)), mask)
