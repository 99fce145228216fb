"""Several short sequences in one row, so that none of it is padding; what each token sees stays its own sequence."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .collate import pad


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Tokenised SFT rows, best fit in order of falling length, as rows of at most `max_length` tokens.

    Returns:
        `input_ids`, `position_ids` (from 0 for every sequence), `labels` (aligned: the target of each position, -100
        at the last one of a sequence, so nothing is predicted across a border), `length`, `longest`, that of one
        sequence, and `rows`, the sequences' numbers, where they have them.
    """
    bins = best_fit(rows["length"], max_length)
    return Dataset.from_list([_joined([rows[i] for i in indices]) for indices in bins])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the items in each bin: long ones first, each into the fullest bin that has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([])
            left, chosen = capacity, len(bins) - 1
        else:
            left, chosen = room.pop(at)
        bins[chosen].append(i)
        bisect.insort(room, (left - lengths[i], chosen))
    return bins


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        alone = pad([(row["prompt_ids"], row["completion_ids"])], 0, own=[row.get("own")])
        for name, values in out.items():
            values += alone[name][0].tolist()
    numbers = [i for row in rows for i in row.get("rows", ())]
    return {**out, "length": len(out["input_ids"]), "longest": max(out["position_ids"]) + 1, "rows": numbers}
