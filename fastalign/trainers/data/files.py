"""Rows from files, folders or a hub, with their columns checked and the faulty row named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ...utils.text import first_line

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_OPTIONS: dict[str, dict[str, Any]] = {".tsv": {"sep": "\t"}}
_SAVED = ("state.json", "dataset_dict.json")
"""What Dataset.save_to_disk and DatasetDict.save_to_disk leave in their folder."""

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]] | str
"""Where rows come from: a datasets.Dataset, a list of dicts, or the path of a file or folder, or a hub's name."""


def load_rows(source: Rows, *, required: Sequence[str], optional: Sequence[str] = ()) -> Dataset:
    """A dataset with the required columns and those of the optional ones that are there; other columns are dropped.

    Args:
        source: as in `read_rows`.
        required: columns that must be there.
        optional: columns that are kept if all of them are there.

    Raises:
        ValueError: no such file, an unknown kind of file, no rows, a missing column, some of the optional columns
            without the others.
    """
    rows = read_rows(source)
    missing = [name for name in required if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"dataset needs the columns {', '.join(required)}; {_called(source)} lacks {', '.join(missing)} "
            f"and has {', '.join(rows.column_names)}"
        )
    return rows.select_columns([*required, *together(rows, optional, source)])


def together(rows: Dataset, names: Sequence[str], source: Rows) -> list[str]:
    """The names, if the rows have all of these columns; none of them, if they have none. ValueError in between."""
    found = [name for name in names if name in rows.column_names]
    if found and len(found) < len(names):
        raise ValueError(
            f"dataset must have all of the columns {', '.join(names)} or none; {_called(source)} has only {found}"
        )
    return found


def read_rows(source: Rows) -> Dataset:
    """All rows and columns of a source.

    Args:
        source: a datasets.Dataset; a list of dicts; the path of a .jsonl, .json, .csv, .tsv, .parquet or .arrow file;
            a folder that `save_to_disk` wrote, or one of such files; or, where no such path exists, a name on the hub.
            Of a folder or name with several splits the one called train is read; `path:test` names another.

    Raises:
        ValueError: nothing there, an unknown kind of file, no such split, no rows.
    """
    rows = source if isinstance(source, Dataset) else _read(source)
    if len(rows) == 0:
        raise ValueError(f"dataset must have at least one row; {_called(source)} has none")
    return rows


def check_sources(args: Any, names: Sequence[str]) -> None:
    """Before anything slow: that the keys of these names hold None, or what could be read.

    Raises:
        ValueError: no such file, or an unknown kind of file; naming the key.
    """
    for name in names:
        source = getattr(args, name)
        if isinstance(source, str):
            with named(name):
                _kind(_split(os.path.expanduser(source))[0])


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Has errors about rows name the key that gave these, where it is not `dataset`."""
    try:
        yield
    except ValueError as error:
        if key == "dataset":
            raise
        raise ValueError(f"{key}: {error}") from error


def _read(source: Sequence[Mapping[str, Any]] | str) -> Dataset:
    if not isinstance(source, (str, os.PathLike)):
        return Dataset.from_list([dict(row) for row in source])
    path, split = _split(os.path.expanduser(os.fspath(source)))
    kind = _kind(path)
    if kind is None:
        return _read_folder(path, split) if os.path.isdir(path) else _from_hub(path, split)
    if split not in (None, "train"):
        raise ValueError(f"dataset {path!r} is one file, whose only split is train; got {split!r}")
    try:
        return load_dataset(_LOADERS[kind], data_files=path, split="train", **_OPTIONS.get(kind, {}))
    except StopIteration:  # what an empty file of JSON lines comes to
        return Dataset.from_dict({})
    except DatasetGenerationError as error:
        raise ValueError(f"dataset {path!r} could not be read: {first_line(error.__cause__ or error)}") from error


def _kind(path: str) -> str | None:
    """The ending of a file that can be read; None for a folder or what may be a hub's name. ValueError otherwise."""
    if os.path.isdir(path):
        return None
    kind = os.path.splitext(path)[1].lower()
    if kind in _LOADERS:
        if not os.path.isfile(path):
            raise ValueError(f"dataset must be an existing file; there is no {path!r}")
        return kind
    named = kind and not kind[1:].isdigit()  # a hub's names may end in versions: owner/pairs-v0.2
    if os.path.exists(path) or named or path.startswith((".", "/")) or path.count("/") > 1:
        raise ValueError(f"dataset must be a folder, or a file ending in {', '.join(_LOADERS)}; got {path!r}")
    return None


def _split(path: str) -> tuple[str, str | None]:
    """(path, split) of `path:split`; a path that exists is taken whole."""
    head, colon, tail = path.rpartition(":")
    return (head, tail) if colon and tail.isidentifier() and not os.path.exists(path) else (path, None)


def _read_folder(path: str, split: str | None) -> Dataset:
    if any(os.path.exists(os.path.join(path, name)) for name in _SAVED):
        saved = load_from_disk(path)
        return _pick(saved, split, path) if isinstance(saved, DatasetDict) else saved
    files = [p for p in sorted(Path(path).iterdir()) if p.suffix.lower() in _LOADERS]
    if not files:
        raise ValueError(f"dataset folder must hold files ending in {', '.join(_LOADERS)}; {path!r} has none")
    return _pick(load_dataset(path), split, path)


def _pick(splits: Any, split: str | None, called: str) -> Dataset:
    """The split asked for; without a name `train`, or the only one there is."""
    name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"dataset {called!r} has the splits {', '.join(splits)}; got {name!r}")
    return splits[name]


def _from_hub(name: str, split: str | None) -> Dataset:
    try:
        return _pick(load_dataset(name), split, name)
    except (OSError, ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"dataset: there is no file or folder {name!r}, and no hub gave one: {first_line(error)}"
        ) from error


def _called(source: Rows) -> str:
    return repr(source) if isinstance(source, str) else "the one given"


def text_of(row: Mapping[str, Any], column: str, index: int, *, may_be_empty: bool) -> str:
    """The text of one cell. ValueError naming column and row (from 0) if it is not text, or empty and may not be.

    An empty cell of a CSV file arrives as None and counts as empty text.
    """
    return checked_text(row[column], f"column {column!r}", index, may_be_empty=may_be_empty)


def checked_text(value: Any, where: str, index: int, *, may_be_empty: bool) -> str:
    """`text_of` for a value that was already taken from its row; `where` names its column."""
    text = "" if value is None else value
    if not isinstance(text, str):
        raise ValueError(f"{where} must hold text; row {index} (from 0) has a {type(text).__name__}")
    if not may_be_empty and not text.strip():
        raise ValueError(f"{where} must not be empty; it is in row {index} (from 0)")
    return text
