"""TPO: a loss of pairs without a reference, and the NLL of gold responses, from sums of log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.triple import TPOLoss
from .case import Case, Sizes
from .preference import log_sigmoid, ragged_labels, smoothed, sums

_BETA, _ALPHA, _GAMMA = 0.3, 0.7, 0.4
_OF_A_PAIR: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "sigmoid": ({}, lambda pw, pl, nw, nl: -log_sigmoid(_BETA * (pw - pl))),
    "sigmoid:smoothed": ({"label_smoothing": 0.1}, lambda pw, pl, nw, nl: smoothed(_BETA * (pw - pl))),
    "hinge": ({}, lambda pw, pl, nw, nl: torch.clamp(1 - _BETA * (pw - pl), min=0)),
    "ipo": ({}, lambda pw, pl, nw, nl: (pw / nw - pl / nl - 1 / (2 * _BETA)) ** 2),
    "tpo_l": ({"tpo_l_gamma": _GAMMA}, lambda pw, pl, nw, nl: -log_sigmoid(_BETA * (pw / nw - pl / nl) - _GAMMA)),
}
"""Saeidi et al. 2024: loss type → (options, its loss of a pair, of sums pw, pl and lengths nw, nl)."""


def _case(name: str, options: dict[str, Any], formula: Callable[..., Tensor]) -> Case:
    module = TPOLoss(loss_type=name.partition(":")[0].replace("_", "-"), beta=_BETA, tpo_alpha=_ALPHA, **options)

    def reference(logits: Tensor, labels: Tensor) -> Tensor:
        (pw, pl, gold), (nw, nl, tokens) = (x.chunk(3) for x in sums(logits, labels))
        return formula(pw, pl, nw, nl).mean() - _ALPHA * gold.sum() / tokens.sum()

    return Case(f"tpo:{name}", lambda logits, labels: module(logits, labels).loss, reference, _inputs)


def _inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    shape = (3 * sizes.batch, sizes.length, sizes.vocab)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"logits": logits, "labels": ragged_labels(3 * sizes.batch, sizes, generator)}


CASES = [_case(name, options, formula) for name, (options, formula) in _OF_A_PAIR.items()]
