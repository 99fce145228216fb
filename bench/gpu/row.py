"""What is known of a GPU kernel without a GPU: one row for each kernel, architecture, dtype and vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

ROWS = 264
"""Rows of logits that are simulated: two for each multiprocessor of an H100."""
VOCABS = (1000, 1001, 32000, 128256, 151937)
DTYPES = ("float32", "bfloat16", "float16")
CHIP = "H100"


class Row(NamedTuple):
    """The last four are None where no simulator is at hand, or where it cannot run the architecture."""

    backend: str
    kernel: str
    kind: str
    """forward, backward, objective (one read), objective_two_read."""
    arch: str
    dtype: str
    vocab: int
    registers: int | None
    """Per thread."""
    spill_bytes: int | None
    """Per thread, stores and loads together."""
    shared_bytes: int | None
    """Per block."""
    vector_bytes: int
    """Of the widest global access to the logits, loads and stores alike (the narrower of the two)."""
    reads: float | None
    """Bytes of logits read over the logits' size; `writes` alike."""
    writes: float | None
    bound: str | None
    """What binds by the simulator's lower bounds: memory, issue, sfu or shared."""
    margin: float | None
    """Memory bound over the next one: above 1, memory binds."""


_NAMES = {"mem": "memory", "issue": "issue", "sfu": "sfu", "shared": "shared"}


def limits(stats) -> tuple[str, float]:
    """(what binds, memory's lower bound over the largest of the others) of a simulated launch."""
    bound = stats.bound(CHIP)
    times = {name: bound[f"t_{key}"] for key, name in _NAMES.items()}
    others = max(time for name, time in times.items() if name != "memory")
    return max(times, key=lambda name: times[name]), times["memory"] / others


def as_json(rows: Iterable[Row]) -> str:
    return json.dumps([row._asdict() for row in rows], indent=1)


def as_table(rows: Iterable[Row]) -> str:
    cells = [list(Row._fields), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
