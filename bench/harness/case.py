"""What is measured: one job at one size, its inputs, and the bytes that it cannot avoid moving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """`job` is what is timed: "forward", "backward" or "both"; rows are tokens."""

    suite: str
    job: str
    rows: int
    vocab: int
    dtype: str

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes that have to be read by a pass that writes nothing: the forward's, once over the logits.

        Labels and per-token results, 20 bytes or so a row, do not count.
        """
        return 0 if self.job == "backward" else self.logits_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes that have to be read and written as in a copy: the backward's, logits in and gradient out."""
        return 0 if self.job == "forward" else 2 * self.logits_bytes

    def limit_seconds(self, read_rate: float, copy_rate: float) -> float:
        """Time the case takes at the given rates, bytes a second (a copy's bytes are those read and those written)."""
        return self.read_bytes / read_rate + self.copied_bytes / copy_rate

    def __str__(self) -> str:
        return f"{self.suite}-{self.job}-{self.rows}x{self.vocab}-{self.dtype}"

    def to_dict(self) -> dict[str, object]:
        traffic = ("logits_bytes", "read_bytes", "copied_bytes")
        return asdict(self) | {name: getattr(self, name) for name in traffic}


def sequences(rows: int) -> int:
    """How many sequences the rows are cut into: 8 (four pairs) where that divides them, else 2 (one pair)."""
    if rows < 2 or rows % 2:
        raise ValueError(f"rows must be even and at least 2, since preferences come in pairs; got {rows}")
    return 8 if rows % 8 == 0 else 2


class Problem:
    """Inputs of a case, made once on its device and used by every variant in turn.

    `logits` [B, T, V] is normal with a standard deviation of 2. Some variants write over what they are given, so they
    all get `fresh()`: the same working buffer, refilled each time outside the timed region, for every variant alike,
    so that they find the same values in the same caches.
    """

    def __init__(self, case: Case, seed: int = 0, device: str = "cpu", batch: int | None = None):
        batch = sequences(case.rows) if batch is None else batch
        length = case.rows // batch
        draw, on = torch.Generator(device).manual_seed(seed), torch.device(device)
        self.logits = torch.empty(batch, length, case.vocab, dtype=DTYPES[case.dtype], device=on)
        for sequence in self.logits:  # one at a time, since the draw is in float32
            sequence.copy_(torch.randn(sequence.shape, generator=draw, device=on).mul_(2))
        self.labels = torch.randint(case.vocab, (batch, length), generator=draw, device=on)
        self.ref_logps = -length * math.log(case.vocab) + 5 * torch.randn(batch, generator=draw, device=on)
        # Gradients of the per-token results, exact in bfloat16: their rounding is nobody's error.
        self.weights = torch.empty(batch, length, device=on).uniform_(-1, 1, generator=draw).bfloat16().float()
        self._work = self.logits.clone()

    def fresh(self) -> Tensor:
        self._work.copy_(self.logits)
        return self._work.detach()

    def weights_for(self, output: Tensor) -> Tensor | None:
        return None if output.dim() == 0 else self.weights.to(output.dtype)

    def blocks(self, elements: int = 1 << 23) -> Iterator[slice]:
        """Slices over the rows such that a block's logits have about the given number of elements."""
        rows, vocab = self.labels.numel(), self.logits.shape[-1]
        step = max(1, elements // vocab)
        return (slice(i, i + step) for i in range(0, rows, step))
