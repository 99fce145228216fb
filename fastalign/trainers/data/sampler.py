"""The order of training rows: random, with the rows of one update sorted by length among its micro-batches.

Which rows make up an update is as random as ever, and our losses average over all of an update's items, so sorting
inside it changes nothing but the padding. (Grouping rows of like length into whole updates would: with a mean over
tokens, the tokens of short texts would count more than those of long ones.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class UpdateSampler(Sampler[int]):
    """Indices of rows, in an order that depends on the seed and the epoch alone, so that a resumed run sees the same.

    Args:
        lengths: tokens of each row.
        update_size: rows of one update, over all its micro-batches and processes.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], update_size: int, seed: int) -> None:
        self.lengths = lengths
        self.update_size = update_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before every epoch, a resumed one as well."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.update_size):
            yield from sorted(order[start : start + self.update_size], key=lambda i: -self.lengths[i])
