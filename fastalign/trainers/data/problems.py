"""What becomes of rows that cannot be used as they are: refused with their reasons, or left out, cut, and counted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field

from ...utils.environment import is_first_process

LIMIT = 10
"""Faulty rows that one message tells of."""


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        columns: names in the data → names that are known here.
        skip_bad_rows: leave faulty rows out and count them, instead of refusing the data.
    """

    columns: dict[str, str] = field(default_factory=dict)
    skip_bad_rows: bool = False


def columns_of(text: str | Mapping[str, str] | None) -> dict[str, str]:
    """`theirs=ours,theirs=ours`, or a mapping of the same, as a mapping. ValueError for another form."""
    if not isinstance(text, str):
        return dict(text or {})
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not equals or not theirs.strip() or not ours.strip() for theirs, equals, ours in pairs):
        raise ValueError(f"columns must be theirs=ours, several with commas between; got {text!r}")
    return {theirs.strip(): ours.strip() for theirs, _, ours in pairs}


@dataclass
class Tally:
    """What one source lost on its way to token ids."""

    rows: int = 0
    """Rows that are used."""
    skipped: int = 0
    """Faulty rows that were left out."""
    dropped: int = 0
    """Rows that were left out because they are too long."""
    prompts_cut: int = 0
    replies_cut: int = 0
    said: list[str] = field(default_factory=list)
    """What else there is to tell, in words."""

    def counts(self) -> dict[str, int]:
        """The numbers, by name."""
        return {name: value for name, value in asdict(self).items() if name != "said"}

    def words(self) -> list[str]:
        """A line for everything that was lost; none where nothing was."""
        parts = [
            (self.dropped, "dropped, being too long"),
            (self.prompts_cut, "with a cut prompt"),
            (self.replies_cut, "with a cut reply, whose end is not trained on"),
        ]
        told = [f"{count} {what}" for count, what in parts if count]
        total = self.rows + self.dropped
        return [*self.said, *([f"of {total} rows {', '.join(told)} (see truncation_mode)"] if told else [])]


_open: ContextVar[Tally | None] = ContextVar("fastalign_tally", default=None)


@contextlib.contextmanager
def tally(key: str, *, told: bool = True) -> Iterator[Tally]:
    """Counts what the rows read and tokenised inside lose, and prints it at the end under the name of the source.

    told: whether to print it.
    """
    counts = Tally()
    token = _open.set(counts)
    try:
        yield counts
    finally:
        _open.reset(token)
    for line in counts.words() if told else ():
        note(f"{key}: {line}")


def report(counts: Tally) -> None:
    """Adds to the open tally; prints at once where there is none."""
    total = _open.get()
    if total is None:
        for line in counts.words():
            note(f"dataset: {line}")
        return
    total.rows = counts.rows or total.rows
    total.said += counts.said
    for name in ("skipped", "dropped", "prompts_cut", "replies_cut"):
        setattr(total, name, getattr(total, name) + getattr(counts, name))


def note(text: str) -> None:
    """A line for the user, from one process of several."""
    if is_first_process():
        print(f"fastalign: {text}", file=sys.stderr)


class Problems:
    """Gathers what is wrong with rows: up to ten go into one refusal, or all are counted and the first ten told."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.texts: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        """One more faulty row. ValueError where ten are known and rows are not to be skipped."""
        self.count += 1
        if len(self.texts) < LIMIT:
            self.texts.append(text)
        if not self.skip and self.count == LIMIT:
            self.close()

    def close(self, used: int | None = None) -> None:
        """ValueError with all that is known unless rows are to be skipped and `used` of them are left; else reports."""
        if not self.count:
            return
        listed = "; ".join(self.texts)
        if not self.skip:
            many = f"{self.count} rows or more cannot be used: " if self.count >= LIMIT else ""
            many = many or (f"{self.count} rows cannot be used: " if self.count > 1 else "")
            raise ValueError(f"{many}{listed}" + (" (skip_bad_rows leaves them out)" if many else ""))
        if used == 0:
            raise ValueError(f"dataset must have a row that can be used; all {self.count} are faulty: {listed}")
        told = "" if self.count <= LIMIT else f", the first {LIMIT} of them"
        rows = "1 faulty row was" if self.count == 1 else f"{self.count} faulty rows were"
        report(Tally(skipped=self.count, said=[f"{rows} left out{told}: {listed}"]))
