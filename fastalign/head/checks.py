"""Hidden states, weights and rows that `head_token_stats` may be called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.call import check_dtype, check_tensor


def check_head(prefix: str, hidden: Any, weight: Any, bias: Any) -> None:
    for name, value in (("hidden", hidden), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        check_tensor(f"{prefix}{name}", value)
        check_dtype(f"{prefix}{name}", value)
        if value.device != hidden.device:
            raise ValueError(f"{prefix}{name} must be on the device of hidden, {hidden.device}; got {value.device}")
    if weight.numel() == 0:
        raise ValueError(
            f"{prefix}weight must be [V, H] with V, H >= 1; got shape {list(weight.shape)}. Under ZeRO-3 "
            "gather it first: with deepspeed.zero.GatheredParameters(weight)"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden must be [..., H] and {prefix}weight [V, H]; "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [V] = [{weight.shape[0]}]; got shape {list(bias.shape)}")


def check_reference(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Any) -> None:
    check_head("ref_", ref_hidden, ref_weight, ref_bias)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_hidden and ref_weight must be {[*hidden.shape[:-1], 'H']} and [{weight.shape[0]}, 'H']; "
            f"got {list(ref_hidden.shape)} and {list(ref_weight.shape)}"
        )
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(f"ref_hidden must have the dtype of hidden, {hidden.dtype}; got {ref_hidden.dtype}")


def check_rows(hidden: Tensor, rows: Any) -> torch.Size:
    """The shape of an index of hidden states; on the CPU its valid entries are looked at too."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"rows must be an int64 tensor; got {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.device != hidden.device:
        raise ValueError(f"rows must be on the device of hidden, {hidden.device}; got {rows.device}")
    return rows.shape


def check_places(places: Tensor, count: int) -> None:
    """Raises for an index outside [0, count), on the CPU."""
    if places.device.type == "cpu" and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < count:
        raise ValueError(
            f"rows must be in [0, {count}), the number of hidden states, where labels count; "
            f"got {int(places.min())} to {int(places.max())}"
        )
