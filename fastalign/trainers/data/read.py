"""One file of rows to a dataset whose cells are what the file says: no text becomes a number, a date or nothing."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ...utils.text import first_line
from .mixed import from_rows, has_json
from .problems import Problems

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""Endings of files with rows, and what reads them."""

_OPEN: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(path, compression="zstd"),
}
"""Endings of compressed text files, and what unpacks them."""


def kind_of(path: str) -> tuple[str, str]:
    """(ending that says what the file is, ending that says how it is packed); '' for none of these."""
    stem, last = os.path.splitext(path)
    packed = last.lower() if last.lower() in _OPEN else ""
    ending = os.path.splitext(stem if packed else path)[1].lower()
    known = ending in KINDS and not (packed and KINDS[ending] in ("parquet", "arrow"))
    return (ending if known else ""), packed


def endings() -> str:
    """All endings, in words."""
    return f"{', '.join(KINDS)} (.jsonl, .json, .csv and .tsv also with {', '.join(_OPEN)} behind)"


def read_file(path: str, skip_bad_rows: bool = False) -> Dataset:
    """The rows of one file; none for an empty one.

    Args:
        path: an existing file of a kind that is known.
        skip_bad_rows: leave out lines that cannot be read, and count them.

    Raises:
        ValueError: the file, or a line of it, cannot be read; naming it.
    """
    ending, packed = kind_of(path)
    if packed == ".zst" and not pa.Codec.is_available("zstd"):
        raise ValueError(
            f"dataset {path!r} is packed with Zstandard, which this pyarrow cannot unpack: unpack it first"
        )
    try:
        if KINDS[ending] == "csv":
            return _read_csv(path, "\t" if ending == ".tsv" else ",", skip_bad_rows)
        if KINDS[ending] == "json":
            return _read_json(path, skip_bad_rows)
        return _load(path, KINDS[ending])
    except StopIteration:  # what an empty file comes to
        return Dataset.from_dict({})
    except _Named:
        raise
    except (DatasetGenerationError, pa.ArrowException, OSError, EOFError, lzma.LZMAError, ValueError) as error:
        said = f"it is not text in UTF-8: {error}" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(
            f"dataset {path!r} could not be read: {said or first_line(error.__cause__ or error)}"
        ) from error


class _Named(ValueError):
    """An error that names its file already."""


def _load(path: str, kind: str) -> Dataset:
    """What datasets reads of the file. UnicodeDecodeError and the like if a text in it is none."""
    rows = load_dataset(kind, data_files=glob.escape(path), split="train")
    # Nothing before here looks whether bytes that are called a text are one.
    rows.data.table.validate(full=True)
    return rows


def _bytes(path: str) -> Any:
    """The file's content, unpacked."""
    packed = kind_of(path)[1]
    return _OPEN[packed](path) if packed else open(path, "rb")


def _finish(path: str, problems: Problems, used: int) -> None:
    try:
        problems.close(used)
    except ValueError as error:
        raise _Named(f"dataset {path!r} could not be read: {error}") from None


# ---------------------------------------------------------------------------------------------------------------- CSV
def _read_csv(path: str, separator: str, skip: bool) -> Dataset:
    """All cells as text: `NA`, `null` and `007` are what they look like. See `typed` for columns of numbers."""
    problems, names = Problems(skip), []
    columns: list[list[str]] = []
    with io.TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        names = next(lines, [])
        columns = [[] for _ in names]
        if len(set(names)) < len(names):
            raise ValueError(f"the columns must have different names; got {', '.join(names)}")
        _fill(lines, columns, problems, path)
    _finish(path, problems, len(columns[0]) if columns else 0)
    features = Features({name: Value("string") for name in names})
    return Dataset.from_dict(dict(zip(names, columns, strict=True)), features=features)


def _fill(lines: Any, columns: list[list[str]], problems: Problems, path: str) -> None:
    row = 0
    while True:
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            _add(problems, path, f"row {row} (from 0), which ends in line {lines.line_num}: {error}")
            row += 1
            continue
        if not cells:  # a blank line
            continue
        if len(cells) == len(columns):
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
        else:
            _add(problems, path, f"row {row} (from 0) has {len(cells)} cells where the header has {len(columns)}")
        row += 1


def _add(problems: Problems, path: str, text: str) -> None:
    try:
        problems.add(text)
    except ValueError as error:
        raise _Named(f"dataset {path!r} could not be read: {error}") from None


def typed(rows: Dataset, texts: Sequence[str]) -> Dataset:
    """Rows of text cells with those columns as numbers or truth values that hold nothing else, but for `texts`."""
    for name in [n for n in rows.column_names if n not in texts and rows.features[n] == Value("string")]:
        values = _values(rows[name])
        if values is not None:
            rows = rows.remove_columns(name).add_column(name, values)  # type: ignore[call-arg]
    return rows


_TYPES: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"true|false", re.IGNORECASE), lambda cell: cell.lower() == "true"),
    # A whole number is one that would be written back alike: 007 is a name; so is one that 64 bits do not hold.
    (re.compile(r"0|-?[1-9]\d{0,17}"), int),
    (re.compile(r"[+-]?(0|[1-9]\d*)?(\.\d*)?(?<=[\d.])(?<![+-]\.)([eE][+-]?\d+)?"), float),
)


def _values(cells: Sequence[str]) -> list[Any] | None:
    """The cells as truth values, whole numbers or numbers, an empty one as None; None if one is another text."""
    filled = [cell for cell in cells if cell]
    for pattern, convert in _TYPES:
        if filled and all(pattern.fullmatch(cell) and cell != "." for cell in filled):
            return [convert(cell) if cell else None for cell in cells]
    return None


# --------------------------------------------------------------------------------------------------------------- JSON
def _read_json(path: str, skip: bool) -> Dataset:
    """By datasets' own reader where that keeps the cells as they are; else, and to name faulty lines, one by one."""
    if kind_of(path)[1]:
        return _json_rows(path, skip)
    try:
        with _quiet():
            rows = _load(path, "json")
    except StopIteration:
        raise
    except (DatasetGenerationError, pa.ArrowException, ValueError, TypeError, OverflowError):
        return _json_rows(path, skip)
    # Texts that look like dates have become dates and, in columns of mixed kinds, texts that look like JSON what they
    # say: read them as they stand.
    return _json_rows(path, skip) if _has_dates(rows.features.arrow_schema) or has_json(rows.features) else rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' own words on what it could not read: ours follow."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _has_dates(types: Any) -> bool:
    """Whether a column, or something inside one, is a time."""
    for f in types:
        kind = f.type if hasattr(f, "type") else f
        inside = [kind.field(i).type for i in range(kind.num_fields)] if kind.num_fields else []
        if pa.types.is_temporal(kind) or _has_dates(inside):
            return True
    return False


def _json_rows(path: str, skip: bool) -> Dataset:
    problems = Problems(skip)
    with _bytes(path) as file:
        rows = list(_objects(file, problems, path))
    _finish(path, problems, len(rows))
    return from_rows(rows)


def _objects(file: Any, problems: Problems, path: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, or of one JSON list."""
    start = file.read(1)
    while start and (start.isspace() or start in codecs.BOM_UTF8):
        start = file.read(1)
    if start == b"[":
        found = json.loads(start + file.read())
        numbered: Any = ((f"row {i} (from 0)", item) for i, item in enumerate(found))
    else:
        numbered = _lines(start, file, problems, path)
    for where, item in numbered:
        fault = None if isinstance(item, dict) else f"must be an object; got a {type(item).__name__}"
        fault = fault or _unfit(item)
        if fault:
            _add(problems, path, f"{where}: {fault}")
        else:
            yield item


def _lines(start: bytes, file: Any, problems: Problems, path: str) -> Iterator[tuple[str, Any]]:
    row = 0
    for number, line in enumerate(_split(file)):
        text = (start + line if number == 0 else line).strip()
        if not text:
            continue
        where = f"row {row} (from 0)"
        row += 1
        try:
            yield where, json.loads(text.decode())
        except UnicodeDecodeError as error:
            _add(problems, path, f"{where} is not text in UTF-8: {error}")
        except (ValueError, RecursionError) as error:
            _add(problems, path, f"JSON parse error in {where}: {first_line(error)}")


def _split(file: Any) -> Iterator[bytes]:
    """The file's lines; those of pyarrow's streams cannot be iterated over."""
    rest = b""
    while block := file.read(1 << 20):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def _unfit(value: Any) -> str | None:
    """What no column can hold, in words: half of a surrogate pair, or a whole number beyond 64 bits."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"a text is no Unicode: it holds {value[error.start]!a} alone"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{value} has more than 64 bits"
    elif isinstance(value, Mapping):
        return next((fault for fault in map(_unfit, value.values()) if fault), None)
    elif isinstance(value, list):
        return next((fault for fault in map(_unfit, value) if fault), None)
    return None
