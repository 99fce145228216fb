"""Rows of text from a file, with their columns checked and the faulty row named."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from datasets import Dataset, load_dataset

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]] | str
"""Where rows come from: a datasets.Dataset, a list of dicts, or the path of a file."""


def load_rows(source: Rows, *, required: Sequence[str], optional: Sequence[str] = ()) -> Dataset:
    """A dataset with the required columns and those of the optional ones that are there; other columns are dropped.

    Args:
        source: path of a .jsonl, .json, .csv or .parquet file, a list of dicts, or a datasets.Dataset.
        required: columns that must be there.
        optional: columns that are kept if all of them are there.

    Raises:
        ValueError: no such file, an unknown kind of file, no rows, a missing column, some of the optional columns
            without the others.
    """
    rows = source if isinstance(source, Dataset) else _read(source)
    if len(rows) == 0:
        raise ValueError(f"dataset must have at least one row; {_called(source)} has none")
    missing = [name for name in required if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"dataset needs the columns {', '.join(required)}; {_called(source)} lacks {', '.join(missing)} "
            f"and has {', '.join(rows.column_names)}"
        )
    found = [name for name in optional if name in rows.column_names]
    if found and len(found) < len(optional):
        raise ValueError(
            f"dataset must have all of the columns {', '.join(optional)} or none; {_called(source)} has only {found}"
        )
    return rows.select_columns([*required, *found])


def _read(source: Sequence[Mapping[str, Any]] | str) -> Dataset:
    if not isinstance(source, (str, os.PathLike)):
        return Dataset.from_list(list(source))
    path = os.path.expanduser(os.fspath(source))
    kind = os.path.splitext(path)[1].lower()
    if kind not in _LOADERS:
        raise ValueError(f"dataset must be a file ending in {', '.join(_LOADERS)}; got {path!r}")
    if not os.path.isfile(path):
        raise ValueError(f"dataset must be an existing file; there is no {path!r}")
    return load_dataset(_LOADERS[kind], data_files=path, split="train")


def _called(source: Rows) -> str:
    return repr(source) if isinstance(source, str) else "the one given"


def text_of(row: Mapping[str, Any], column: str, index: int, *, may_be_empty: bool) -> str:
    """The text of one cell. ValueError naming column and row (from 0) if it is not text, or empty and may not be.

    An empty cell of a CSV file arrives as None and counts as empty text.
    """
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold text; row {index} (from 0) has a {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise ValueError(f"column {column!r} must not be empty; it is in row {index} (from 0)")
    return value
