"""Every row through a function that may refuse it, with all refusals told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from .mixed import from_rows, has_json
from .problems import Problems, Tally, report

Row = Mapping[str, Any]
Convert = Callable[[Row, int], dict[str, Any]]

_FAULT, _DROPPED = "_fault", "_dropped"
"""Columns that exist while rows are converted: what is wrong with the row, and whether it is left out."""


class Dropped(ValueError):
    """Says of a row that the run's settings leave it out: it is too long, say."""


def map_rows(rows: Dataset, convert: Convert, gone: Sequence[str], *, skip_bad_rows: bool, desc: str) -> Dataset:
    """The rows as `convert` makes them.

    Args:
        rows: at least one.
        convert: takes a row and its number; returns the same columns for all rows; ValueError refuses a row, `Dropped`
            leaves it out.
        gone: columns that are not kept.
        skip_bad_rows: leave out refused rows as well, and tell of them.
        desc: what the progress bar says.

    Raises:
        ValueError: up to ten refusals; or no row that is left.
    """
    sample = _first_good(rows, convert, skip_bad_rows)

    def one(row: Row, index: int) -> dict[str, Any]:
        out, fault, dropped = _try(row, index, convert)
        return {**(sample if out is None else out), _FAULT: fault, _DROPPED: dropped}

    kept = {name: feature for name, feature in rows.features.items() if name not in gone}
    found = None if has_json(kept) else rows.map(one, with_indices=True, remove_columns=list(gone), desc=desc)
    if found is None or has_json(found.features):  # which map would not give back as they were
        found = from_rows([{**_without(row, gone), **one(row, i)} for i, row in enumerate(rows)])
    faults, dropped = list(found[_FAULT]), list(found[_DROPPED])
    left = [i for i, fault in enumerate(faults) if not fault and not dropped[i]]
    found = found.remove_columns([_FAULT, _DROPPED])
    problems = Problems(skip_bad_rows)
    for fault in filter(None, faults):
        problems.add(fault)
    problems.close(len(left))
    if any(dropped):
        report(Tally(dropped=sum(dropped)))
    return found if len(left) == len(faults) else found.select(left)


def _try(row: Row, index: int, convert: Convert) -> tuple[dict[str, Any] | None, str, bool]:
    """(the converted row or None, what is wrong with it or '', whether it is left out)."""
    try:
        return convert(row, index), "", False
    except Dropped:
        return None, "", True
    except ValueError as error:
        text = str(error)
        return None, text if f"row {index} " in text else f"row {index} (from 0): {text}", False


def _without(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _first_good(rows: Dataset, convert: Convert, skip_bad_rows: bool) -> dict[str, Any]:
    """What the first row becomes that can be converted: it stands for the others until they are taken out."""
    problems, dropped = Problems(skip_bad_rows), 0
    for index, row in enumerate(rows):
        out, fault, left_out = _try(row, index, convert)
        if out is not None:
            return out
        dropped += left_out
        if fault:
            problems.add(fault)
    problems.close(0)
    raise ValueError(f"dataset must have a row that fits max_length; none of its {dropped} does")
