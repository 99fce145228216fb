"""What a row of the oracle looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes of a case's inputs: batch B (pairs, lists or prompts), tokens T, vocabulary V and list length K."""

    batch: int = 4
    length: int = 7
    vocab: int = 33
    list_length: int = 3


@dataclass(frozen=True)
class Case:
    """One objective three times: as users call it, as the paper prints it, and inputs for both.

    `fused(**inputs)` and `reference(**inputs)` return the same scalar loss; `inputs(sizes, generator)` makes named
    tensors in float64 on the CPU. `leaves` names those that are differentiated. Inputs called `logits` or `ref_logits`
    are what a test casts to the dtype under test; the reference always computes in float64 on the values so cast.
    """

    name: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[Sizes, torch.Generator], dict[str, Tensor]]
    leaves: tuple[str, ...] = ("logits",)


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs as a user would hold them: logits in `dtype`, other floats in float32 (float64 if dtype is)."""
    other = torch.float64 if dtype == torch.float64 else torch.float32

    def one(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return t.to(dtype if name in ("logits", "ref_logits") else other)

    return {name: one(name, t) for name, t in inputs.items()}
