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


def dynamic(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's -log p times p, a constant: Wu et al. 2025, arXiv:2508.05629."""
    nll, mask = tokens(logits, labels)
    return (nll * torch.exp(-nll.detach())).sum() / mask.sum()


def weights_of(labels: Tensor) -> Tensor:
    """0, 1/2, 1, 3/2, 0, ... by place, another beginning in each row."""
    rows, length = labels.shape
    place = torch.arange(rows, device=labels.device).unsqueeze(-1) + torch.arange(length, device=labels.device)
    return (place % 4) / 2


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """The weighted mean over tokens."""
    nll, mask = tokens(logits, labels)
    weights = weights_of(labels) * mask
    return (nll * weights).sum() / weights.sum() if weights.any() else 0 * nll.sum()


def weighted_by_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the sequences that weigh something of the weighted means over their tokens."""
    nll, mask = tokens(logits, labels)
    weights = weights_of(labels) * mask
    means = [(row * w).sum() / w.sum() for row, w in zip(nll, weights, strict=True) if w.any()]
    return torch.stack(means).mean() if means else 0 * nll.sum()


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return tokens(logits, labels)[0].sum()


def _inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """One row has no real token."""
    rows = sizes.batch + 1
    logits = torch.randn((rows, sizes.length, sizes.vocab), generator=generator, dtype=torch.float64)
    labels = ragged_labels(rows, sizes, generator)
    labels[rows // 2] = _IGNORED
    return {"logits": logits, "labels": labels}


def _case(
    name: str,
    reference: Callable[[Tensor, Tensor], Tensor],
    num_items: int | None = None,
    by_weight: bool = False,
    **options: Any,
) -> Case:
    module = SFTLoss(**options)

    def fused(logits: Tensor, labels: Tensor) -> Tensor:
        weights = weights_of(labels) if by_weight else None
        return module(logits, labels, num_items=num_items, weights=weights).loss

    return Case(f"sft:{name}", fused, reference, _inputs)


CASES = [
    _case("token", per_token),
    _case("sequence", per_sequence, normalization="sequence"),
    _case("token:smoothed", smoothed, label_smoothing=0.1),
    _case("token:z_loss", with_z_loss, z_loss=0.01),
    _case("token:num_items", accumulated, num_items=50),
    _case("token:tempered", tempered, temperature=0.7, softcap=5.0),
    _case("token:dft", dynamic, loss_type="dft"),
    _case("token:weighted", weighted, by_weight=True),
    _case("sequence:weighted", weighted_by_sequence, by_weight=True, normalization="sequence"),
    _case("token:sum", summed, reduction="sum"),
]
