"""Supervised fine-tuning, straight from logits: the mean of -log p over tokens or over sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.sft import SFTLoss
from .case import Case, Sizes
from .preference import ragged_labels

_IGNORED = -100


def tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of every label, 0 where ignored, and which labels count."""
    mask = labels != _IGNORED
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -logps * mask, mask


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all real tokens."""
    nll, mask = tokens(logits, labels)
    return nll.sum() / mask.sum()


def per_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of the means of the sequences that have a real token."""
    nll, mask = tokens(logits, labels)
    means = [row.sum() / live.sum() for row, live in zip(nll, mask, strict=True) if live.any()]
    return torch.stack(means).mean()


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against 0.9 of the label and 0.1 of the uniform distribution: Szegedy et al. 2016, sec. 7."""
    nll, mask = tokens(logits, labels)
    uniform = -torch.log_softmax(logits, -1).mean(-1) * mask
    return (0.9 * nll + 0.1 * uniform).sum() / mask.sum()


def with_z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Plus 0.01 times the mean square of log Z."""
    nll, mask = tokens(logits, labels)
    return (nll + 0.01 * torch.logsumexp(logits, -1) ** 2 * mask).sum() / mask.sum()


def accumulated(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over this micro-batch's tokens over the 50 tokens of all micro-batches."""
    return tokens(logits, labels)[0].sum() / 50


def tempered(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits soft-capped at 5 (Gemma 2), then divided by a temperature of 0.7."""
    return per_token(5 * torch.tanh(logits / 5) / 0.7, labels)


def _inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """One row has no real token."""
    rows = sizes.batch + 1
    logits = torch.randn((rows, sizes.length, sizes.vocab), generator=generator, dtype=torch.float64)
    labels = ragged_labels(rows, sizes, generator)
    labels[rows // 2] = _IGNORED
    return {"logits": logits, "labels": labels}


def _case(
    name: str, reference: Callable[[Tensor, Tensor], Tensor], num_items: int | None = None, **options: Any
) -> Case:
    module = SFTLoss(**options)
    return Case(
        f"sft:{name}", lambda logits, labels: module(logits, labels, num_items=num_items).loss, reference, _inputs
    )


CASES = [
    _case("token", per_token),
    _case("sequence", per_sequence, normalization="sequence"),
    _case("token:smoothed", smoothed, label_smoothing=0.1),
    _case("token:z_loss", with_z_loss, z_loss=0.01),
    _case("token:num_items", accumulated, num_items=50),
    _case("token:tempered", tempered, temperature=0.7, softcap=5.0),
]
