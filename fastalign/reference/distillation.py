"""Distillation: a student's divergence from a teacher, straight from both models' logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.distillation import DistillationLoss, TopK
from .case import Case, Sizes
from .preference import ragged_labels

_IGNORED = -100
_KEPT = 3
"""Tokens of a teacher whose likeliest are known."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""From the student's and the teacher's log-probabilities [..., V] to [...]."""


def kl(one: Tensor, other: Tensor) -> Tensor:
    """KL between distributions given by their log-probabilities."""
    return (one.exp() * (one - other)).sum(-1)


def mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The log-probabilities of share * one + (1 - share) * other."""
    return torch.log(share * one.exp() + (1 - share) * other.exp())


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hinton et al. 2015, sec. 2, without the teacher's own entropy."""
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Gu et al. 2024, eq. 1."""
    return kl(student, teacher)


def jsd(beta: float) -> Divergence:
    """Agarwal et al. 2024, sec. 2."""

    def found(student: Tensor, teacher: Tensor) -> Tensor:
        mixture = mixed(teacher, student, beta)
        return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)

    return found


def skewed_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Ko et al. 2024, sec. 3.1, with alpha = 0.1."""
    return kl(teacher, mixed(teacher, student, 0.1))


def skewed_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Ko et al. 2024, sec. 3.1, with alpha = 0.1."""
    return kl(student, mixed(student, teacher, 0.1))


def bucketed(logps: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens `ids` and of all others together, [..., K + 1]."""
    others = logps.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logps.gather(-1, ids), others], -1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def average(each: Tensor, mask: Tensor, normalization: str) -> Tensor:
    """Over tokens, or over sequences that have one of the means over theirs."""
    if normalization == "token":
        return each[mask].mean()
    return torch.stack([row[valid].mean() for row, valid in zip(each, mask, strict=True) if valid.any()]).mean()


def _inputs(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """One row has no real token. The models are far apart: a small divergence is known to float32's error alone."""
    rows = sizes.batch + 1
    shape = rows, sizes.length, sizes.vocab
    logits, other = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    ref_logits = other - logits
    labels = ragged_labels(rows, sizes, generator)
    labels[rows // 2] = _IGNORED
    temperature = 0.5 + torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    return {"logits": logits, "ref_logits": ref_logits, "labels": labels, "temperature": temperature}


def _case(name: str, formula: Divergence, *, per_token: bool = False, few: bool = False, **options: Any) -> Case:
    """per_token: a temperature for each token. few: of the teacher only the likeliest tokens are known."""
    module = DistillationLoss(**options)
    softcap, nll_weight = options.get("softcap"), options.get("nll_weight", 0.0)
    normalization = options.get("normalization", "token")

    def likeliest(ref_logits: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.log_softmax(ref_logits, -1).topk(min(_KEPT, ref_logits.shape[-1] - 1), -1)
        return found.indices, found.values

    def fused(logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        teacher: Any = ref_logits
        if few:
            ids, logps = likeliest(ref_logits.double())
            teacher = TopK(ids, logps)
        return module(logits, labels, teacher, temperature=temperature if per_token else None).loss

    def reference(logits: Tensor, ref_logits: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        by = temperature.unsqueeze(-1) if per_token else options.get("temperature", 1.0)
        student = torch.log_softmax(capped(logits, softcap) / by, -1)
        teacher = torch.log_softmax(capped(ref_logits, softcap) / by, -1)
        nll = -student.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if few:
            ids, _ = likeliest(ref_logits)
            student, teacher = bucketed(student, ids), bucketed(teacher, ids)
        return average(formula(student, teacher) + nll_weight * nll, labels != _IGNORED, normalization)

    return Case(f"distillation:{name}", fused, reference, _inputs)


CASES = [
    _case("forward_kl", forward_kl, divergence="forward_kl"),
    _case("reverse_kl", reverse_kl, divergence="reverse_kl"),
    _case("jsd", jsd(0.5)),
    _case("jsd:beta", jsd(0.1), beta=0.1, normalization="grpo"),
    _case("skewed_kl", skewed_kl, divergence="skewed_kl"),
    _case("skewed_reverse_kl", skewed_reverse_kl, divergence="skewed_reverse_kl"),
    _case("jsd:tempered", jsd(0.5), temperature=0.7, softcap=5.0),
    _case("jsd:temperatures", jsd(0.5), per_token=True),
    _case("forward_kl:nll", forward_kl, divergence="forward_kl", nll_weight=0.5),
    _case("jsd:top_k", jsd(0.5), few=True),
    _case("reverse_kl:top_k", reverse_kl, divergence="reverse_kl", few=True),
]
