"""The last batch of an epoch on several processes: as many rows as there are, no more, and nobody left waiting.

Processes step together, so each needs as many batches as the others. Repeating rows to even the batches out, as is
usual, would count those rows twice. Here the batches are filled up with fillers that no mean counts: a process without
a real row left computes the loss of one filler with weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from ...utils.batch import Batch

FILLER = "is_filler"
"""Key of a batch that holds no real row, and of a row that is not one."""

ROWS = "rows"
"""Key of a batch's row numbers in the data that was given, where they are known."""


class EvenRows(Dataset):
    """Rows, and fillers behind them up to the next multiple."""

    def __init__(self, rows: Any, multiple: int) -> None:
        self.rows, self.count = rows, len(rows)
        self.length = -(-self.count // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index] if index < self.count else {**self.rows[0], FILLER: True}


class EvenSampler(Sampler[int]):
    """Another sampler's order of the real rows, then the fillers."""

    def __init__(self, inner: Any, rows: EvenRows) -> None:
        self.inner, self.rows = inner, rows

    def set_epoch(self, epoch: int) -> None:
        """Passed on."""
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        yield from self.inner
        yield from range(self.rows.count, len(self.rows))


class EvenCollator:
    """A collator that leaves the fillers out, marks a batch that has nothing else, and passes the rows' numbers on."""

    def __init__(self, collate: Callable[..., Batch]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        real = [row for row in rows if FILLER not in row]
        if real:
            numbers = [i for row in real for i in row.get(ROWS, ())]
            return {**self.collate(real), ROWS: torch.tensor(numbers)} if numbers else self.collate(real)
        only = {name: value for name, value in rows[0].items() if name != FILLER}
        return {**self.collate([only]), FILLER: torch.ones(1, dtype=torch.bool)}


def even(rows: Any, sampler_fn: Callable[[Any], Any], multiple: int) -> tuple[EvenRows, Callable[[Any], EvenSampler]]:
    """The rows filled up to a multiple of the rows that all processes take at once, and a sampler of them."""
    filled = EvenRows(rows, multiple)

    def sampler(_: Any) -> EvenSampler:
        inner = sampler_fn(rows) or SequentialSampler(rows)
        if isinstance(inner, RandomSampler):
            # What accelerate puts in its place: an order that all processes agree on. It does not look inside ours.
            inner = SeedableRandomSampler(data_source=rows, generator=torch.Generator())
        return EvenSampler(inner, filled)

    return filled, sampler
