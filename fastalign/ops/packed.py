"""Packed sequences: several of them end to end in one row, as losses of whole sequences see them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """S sequences out of a packed row, side by side."""

    labels: Tensor
    """[S, L], ignored beyond the end of each sequence."""
    rows: Tensor
    """[S, L], int64: the token of the packed row that each label belongs to, for `Head(hidden, weight, rows=...)`."""


def packed_sequences(
    labels: Tensor, *, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None, ignore_index: int = -100
) -> Packed:
    """Labels and hidden-state numbers of a packed row's sequences: `loss(Head(hidden, weight, rows=rows), labels)`.

    Args:
        labels: [N] or [1, N], int64 or int32, aligned with the hidden states as ever: `labels[t]` is the target of
            `hidden[t]`, ignored at the last token of each sequence, whose successor belongs to the next one.
        cu_seqlens: [S + 1], integers, 0 first and N last: where sequences begin, as FlashAttention takes them; or
        position_ids: [N] or [1, N], integers: a sequence begins wherever they return to 0.
        ignore_index: fills up shorter sequences.

    Raises:
        TypeError: not a tensor, or not of integers.
        ValueError: neither or both of cu_seqlens and position_ids, a shape that does not fit, bounds out of order.
    """
    flat = _row("labels", labels)
    if (cu_seqlens is None) == (position_ids is None):
        raise ValueError("give cu_seqlens or position_ids, and not both")
    bounds = (
        _starts(_row("position_ids", position_ids)) if cu_seqlens is None else _row("cu_seqlens", cu_seqlens).long()
    )
    if position_ids is not None and position_ids.numel() != flat.numel():
        raise ValueError(f"position_ids must be [{flat.numel()}] as labels are; got {list(position_ids.shape)}")
    if position_ids is not None and int(bounds[0]):
        raise ValueError(f"position_ids must begin with 0; got {int(position_ids.reshape(-1)[0])}")
    ends = [int(bounds[0]), int(bounds[-1])] if bounds.numel() > 1 else []
    if ends != [0, flat.numel()] or bool((bounds.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to the {flat.numel()} tokens of labels; got {bounds.tolist()}")
    lengths = bounds.diff()
    steps = torch.arange(int(lengths.max()), device=flat.device)
    inside = steps < lengths.unsqueeze(1)
    rows = torch.where(inside, bounds[:-1].unsqueeze(1) + steps, 0)
    return Packed(torch.where(inside, flat[rows], ignore_index), rows)


def _row(name: str, x: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if x.is_floating_point() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers; got {x.dtype}")
    flat = x[0] if x.dim() == 2 and x.shape[0] == 1 else x
    if flat.dim() != 1 or flat.numel() == 0:
        raise ValueError(f"{name} must be one row that is not empty; got shape {list(x.shape)}")
    return flat


def _starts(positions: Tensor) -> Tensor:
    starts = (positions == 0).nonzero().squeeze(-1)
    return torch.cat([starts, starts.new_tensor([positions.numel()])])
