"""Rows from files, folders, a hub or Python's own objects, in the columns that the trainers know."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, load_dataset, load_from_disk

from ...utils.text import first_line
from .forms import TEXTS, renamed, standard
from .mixed import from_rows
from .paths import expand, folder_splits, split_of
from .problems import Reading
from .read import KINDS, kind_of, read_file, typed

_SAVED = ("state.json", "dataset_dict.json")
"""What Dataset.save_to_disk and DatasetDict.save_to_disk leave in their folder."""

Rows: TypeAlias = Any
"""Where rows come from: a datasets.Dataset or DatasetDict, a pandas DataFrame, a list of dicts, the path of a file or
folder, a pattern of files, a list of these, or a hub's name."""


def load_rows(
    source: Rows, *, required: Sequence[str], optional: Sequence[str] = (), reading: Reading | None = None
) -> Dataset:
    """A dataset with the required columns and those of the optional ones that are there; other columns are dropped.

    Args:
        source: as in `read_rows`.
        required: columns that must be there.
        optional: columns that are kept if all of them are there.
        reading: as in `read_rows`.

    Raises:
        ValueError: no such file, an unknown kind of file, no rows, a missing column, some of the optional columns
            without the others.
    """
    rows = read_rows(source, reading)
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


def read_rows(source: Rows, reading: Reading | None = None) -> Dataset:
    """All rows and columns of a source; columns of well-known data sets become ours (see `forms`).

    Args:
        source: a datasets.Dataset; a DatasetDict; a pandas DataFrame; a list of dicts; the path of a .jsonl, .json,
            .csv, .tsv, .parquet or .arrow file, the texts among them packed or not; a pattern of such files, several
            with commas between, or a list of paths; a folder that `save_to_disk` wrote, or one of such files; or,
            where no such path exists, a name on the hub. Of several splits the one called train is read; `path:test`
            names another.
        reading: names of columns, and whether faulty rows are left out; by default as they are, and not.

    Raises:
        TypeError: an object of another kind.
        ValueError: nothing there, an unknown kind of file, no such split, no rows, faulty rows.
    """
    reading = reading or Reading()
    rows = _read(source, reading)
    if len(rows) == 0:
        raise ValueError(f"dataset must have at least one row; {_called(source)} has none")
    return standard(renamed(rows, reading.columns), reading.skip_bad_rows)


def check_sources(args: Any, names: Sequence[str]) -> None:
    """Before anything slow: that the keys of these names hold None, or what could be read.

    Raises:
        ValueError: no such file, or an unknown kind of file; naming the key.
    """
    for name in names:
        source = getattr(args, name)
        with named(name):
            for each in source.values() if isinstance(source, Mapping) else [source]:
                for path in each if isinstance(each, list) else [each]:
                    if isinstance(path, (str, os.PathLike)):
                        expand(os.fspath(path))


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Has errors about rows name the key that gave these, where it is not `dataset`."""
    try:
        yield
    except ValueError as error:
        if key == "dataset":
            raise
        raise ValueError(f"{key}: {error}") from error


# ------------------------------------------------------------------------------------------------------ kinds of source
def _read(source: Rows, reading: Reading) -> Dataset:
    if isinstance(source, Dataset):
        return source.with_format(None)  # tensors are no texts and numbers
    if isinstance(source, DatasetDict):
        return _pick(source, None, "the one given").with_format(None)
    if isinstance(source, (str, os.PathLike)):
        return _read_path(os.fspath(source), reading)
    if type(source).__module__.partition(".")[0] == "pandas" and hasattr(source, "columns"):
        return Dataset.from_pandas(source, preserve_index=False)
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, os.PathLike)) for s in source):
        return _read_all([os.fspath(s) for s in source], reading)
    if isinstance(source, (list, tuple)) and all(isinstance(row, Mapping) for row in source):
        return from_rows(source)
    said = "; rows that come one by one cannot be counted, sorted or seen twice: make a Dataset of them"
    raise TypeError(
        "dataset must be a datasets.Dataset, a DatasetDict, a pandas DataFrame, a list of dicts, a path or a list of "
        f"paths; got {type(source).__name__}" + (said if isinstance(source, (IterableDataset, Iterator)) else "")
    )


def _read_all(paths: Sequence[str], reading: Reading) -> Dataset:
    """The rows of files, or of files, folders and hubs' names one after the other."""
    parts = [(path, _read_path(path, reading)) for path in paths]
    return _joined([(path, rows) for path, rows in parts if len(rows)] or parts[:1])


def _read_path(source: str, reading: Reading) -> Dataset:
    found = expand(source)
    if found is not None:
        files, split = found
        if split not in (None, "train"):
            raise ValueError(f"dataset {files[0]!r} is one file, whose only split is train; got {split!r}")
        return _read_files(files, reading)
    path, split = split_of(os.path.expanduser(source))
    return _read_folder(path, split, reading) if os.path.isdir(path) else _from_hub(path, split)


def _read_files(files: Sequence[str], reading: Reading) -> Dataset:
    parts = []
    for file in files:
        rows = read_file(file, reading.skip_bad_rows)
        if KINDS[kind_of(file)[0]] == "csv":
            rows = typed(rows, [*TEXTS, *reading.columns, *reading.columns.values()])
        parts.append((file, rows))
    return _joined([(file, rows) for file, rows in parts if len(rows)] or parts[:1])


def _joined(parts: Sequence[tuple[str, Dataset]]) -> Dataset:
    """One dataset of several. ValueError naming the one that has other columns, or cells of another kind."""
    (first, rows), *others = parts
    for path, other in others:
        if set(other.column_names) != set(rows.column_names):
            lacks = sorted(set(rows.column_names) - set(other.column_names))
            more = sorted(set(other.column_names) - set(rows.column_names))
            what = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(more)} besides"] * bool(more)
            raise ValueError(
                f"dataset of several files must have the same columns in all of them; {path!r} {' and '.join(what)} "
                f"(beside {first!r}): give files of one form, or name them one by one"
            )
        try:
            concatenate_datasets([rows.select([0]), other.select([0])])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"dataset of several files must have cells of the same kind in all of them; {path!r} differs from "
                f"{first!r}: {first_line(error)}"
            ) from error
    return concatenate_datasets([each for _, each in parts]) if others else rows


def _read_folder(path: str, split: str | None, reading: Reading) -> Dataset:
    if any(os.path.exists(os.path.join(path, name)) for name in _SAVED):
        saved = load_from_disk(path)
        return _pick(saved, split, path) if isinstance(saved, DatasetDict) else saved
    return _read_files(_pick(folder_splits(path), split, path), reading)


def _pick(splits: Any, split: str | None, called: str) -> Any:
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
