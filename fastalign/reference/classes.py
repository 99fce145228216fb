"""Cross-entropy with class weights, soft-capped logits and a z-loss, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.cross_entropy import cross_entropy
from .case import Case, Sizes
from .sft import CASES as _SFT

_CAP, _Z, _SMOOTHING = 5.0, 0.02, 0.1


def _weights(classes: int) -> Tensor:
    """0.5, 1.5, 2.5, 0.5, ..."""
    return 0.5 + torch.arange(classes, dtype=torch.float64) % 3


def weighted(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """-(1 - e) w_y log p_y - e / C sum_c w_c log p_c over sum w_y, with p of cap tanh(x / cap) (Gemma 2), and z times
    the mean of (log sum exp)^2 (Chowdhery et al. 2022, sec. 5)."""
    x, w = _CAP * torch.tanh(logits / _CAP), _weights(logits.shape[-1]).to(logits.dtype)
    real = labels != -100
    x, y = x[real], labels[real]
    lse = x.exp().sum(-1).log()
    logp = x - lse[:, None]
    own = w[y] * logp[torch.arange(len(y)), y]
    terms = (1 - smoothing) * own + smoothing / len(w) * (w * logp).sum(-1)
    return -terms.sum() / w[y].sum() + _Z * (lse**2).mean()


def _case(name: str, smoothing: float) -> Case:
    inputs = _SFT[0].inputs

    def fused(logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        options = {"softcap": _CAP, "z_loss": _Z, "label_smoothing": smoothing}
        weight = _weights(logits.shape[-1]).to(wide)
        return cross_entropy(logits.flatten(0, -2), labels.flatten(), weight, **options)  # type: ignore[arg-type]

    def made(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: t for name, t in inputs(sizes, generator).items() if name in ("logits", "labels")}

    return Case(name, fused, lambda **given: weighted(**given, smoothing=smoothing), made)


CASES = [_case("cross_entropy:weighted", 0.0), _case("cross_entropy:weighted_smoothed", _SMOOTHING)]
