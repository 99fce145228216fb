"""Distillation: a student's distribution drawn to a teacher's, over the whole vocabulary or the teacher's likeliest
tokens, from logits or from the heads of two models of different size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.call import as_softcap, check_positive
from ..ops.fused_loss import attach_gradients
from ..ops.transforms import transformed
from .base import Logits, LogitsLoss, check_range, lookup, masked_mean
from .distillation_rows import Known, Rows, TopK, compare, tile_rows
from .distillation_sources import Options, Student, Teacher, check_temperature, formed, student_of, teacher_of
from .divergences import mixture_of
from .reductions import NORMALIZATIONS, Count, check_weights, normalize_real, token_weights, weighted

__all__ = ["DistillationLoss", "DistillationOutput", "TopK", "distillation_loss"]


class DistillationOutput(NamedTuple):
    """Result of `distillation_loss`. All but the loss are detached scalars."""

    loss: Tensor
    """Scalar."""
    divergence: Tensor
    """Mean of the divergence over the real tokens, in nats, whatever normalization and weights."""
    nll: Tensor
    """Mean of -log p of the labels over the real tokens, by the student at the loss's temperature."""
    num_tokens: Tensor
    """Number of real tokens, int64."""


class DistillationLoss(LogitsLoss):
    """A student's divergence from a teacher, with p the student's distribution of a token and q the teacher's.

    "forward_kl" is KL(q || p) (Hinton et al. 2015, sec. 2), "reverse_kl" KL(p || q) (Gu et al. 2024, eq. 1), "jsd"
    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Agarwal et al. 2024, sec. 2: GKD),
    "skewed_kl" KL(q || a q + (1 - a) p) and "skewed_reverse_kl" KL(p || a p + (1 - a) q) (Ko et al. 2024, sec. 3.1:
    DistiLLM).

    Loss and gradient are formed in one visit to the logits, those of a head a tile of tokens at a time, so the gradient
    can be used once.

    Args:
        divergence: one of these; also GKD's and DistiLLM's names "gkd", "fkl", "rkl", "sfkl", "srkl".
        beta: of "jsd", in [0, 1]; as in TRL's GKD 0 stands for the forward and 1 for the reverse KL.
        skew_alpha: a of the skewed ones, in [0, 1).
        nll_weight: adds so many times -log p of the labels; needs temperature 1.
        normalization: what the loss is averaged over: "token", "bnpo", "grpo" (sequences), "dapo" or "dr_grpo", as in
            `policy_loss`.
        max_length: tokens that a completion may have, of "dr_grpo".
        ignore_index: labels with this value (prompt, padding) do not count.
        temperature: divides both models' logits. The loss is not multiplied by its square.
        softcap: soft-capping of both models' logits (Gemma 2), but for a head that says itself how it caps its own.
        inplace_backward: the gradient of logits that are a tensor is written over them, in the forward.

    Raises:
        ValueError: an unknown name, a number out of range, nll_weight at another temperature.
    """

    fuse_backward = True

    def __init__(
        self,
        *,
        divergence: str = "jsd",
        beta: float = 0.5,
        skew_alpha: float = 0.1,
        nll_weight: float = 0.0,
        normalization: str = "token",
        max_length: int | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        self.mixture = mixture_of(divergence, beta, skew_alpha)
        self.divergence, self.beta, self.skew_alpha = divergence, beta, skew_alpha
        self.nll_weight = check_range("nll_weight", nll_weight, 0.0)
        lookup("normalization", NORMALIZATIONS, normalization)
        self.normalization, self.max_length = normalization, max_length
        check_positive("temperature", temperature)
        as_softcap(softcap)
        self._check_nll(temperature)

    def _check_nll(self, temperature: float | Tensor) -> None:
        if self.nll_weight and (isinstance(temperature, Tensor) or temperature != 1.0):
            got = "one for each token" if isinstance(temperature, Tensor) else temperature
            raise ValueError(f"temperature must be 1 with nll_weight, which is of the student's own log p; got {got}")

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        teacher: Teacher,
        *,
        temperature: Tensor | None = None,
        weights: Tensor | None = None,
        num_items: Count | None = None,
    ) -> DistillationOutput:
        """The loss of a batch.

        Args:
            logits: [..., T, V], the student's, or a `fastalign.Head` or tuple (hidden, weight) in their place.
            labels: [..., T], int64 or int32: which tokens count, and whose NLL is reported.
            teacher: a constant: [..., T, V], or a `Head` or tuple, of any hidden size; or `TopK(ids, logps)`.
            temperature: [..., T] or [...]: one for each token or sequence, in place of the module's.
            weights: [..., T], at least 0: the means are weighted by them, as in `sft_loss`.
            num_items: the count to divide by in place of this batch's own, as in `policy_loss`; of weights their sum.

        Raises:
            TypeError, ValueError: as `token_stats`; another vocabulary of the teacher's, or other tokens.
            RuntimeError: under a transform of `torch.func`.
        """
        student: Any = formed(logits)
        if transformed(*(student[:3] if isinstance(student, tuple) else (student,))):
            raise RuntimeError("a distillation's gradient is a kernel's, which a transform of torch.func cannot see")
        asked: Any = self.stats_options["temperature"] if temperature is None else temperature
        self._check_nll(asked)
        asked = check_temperature(asked, labels, self.ignore_index)
        options = Options(self.ignore_index, asked, self.stats_options["softcap"])
        own = student_of(student, labels, options)
        other = teacher_of(teacher, labels, own, student.shape[-1], options)
        mask = labels.long() != self.ignore_index
        dtype = torch.promote_types(own.rows.dtype, torch.float32)
        if weights is not None:
            check_weights(weights, mask)
            if self.normalization == "dr_grpo":
                raise ValueError("weights need a normalization that counts tokens; got 'dr_grpo'")
            weights = weights.detach().to(dtype)
        kind = self.normalization if weights is None else {"grpo": "grpo"}.get(self.normalization, "token")
        counts = token_weights(labels, self.ignore_index, kind, num_items, self.max_length, dtype, weights=weights)
        divergence, nll, gradients = self._compared(own, other, own.of_rows(counts), student.shape[-1])
        divergence, nll = own.place(divergence, labels.shape), own.place(nll, labels.shape)
        each = divergence + self.nll_weight * nll if self.nll_weight else divergence
        if weights is None:
            loss = normalize_real(each, mask, kind, num_items, self.max_length)
        else:
            loss = weighted(each, weights.to(each.dtype), mask, kind, num_items)
        if gradients is not None:
            loss = attach_gradients(loss, own.leaves, gradients)
        return DistillationOutput(loss, masked_mean(divergence, mask), masked_mean(nll, mask), mask.sum())

    def _compared(
        self, own: Student, other: Rows | TopK, counts: Tensor, vocab: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...] | None]:
        """(divergence and NLL of every row, gradients of the student's leaves if any is wanted)."""
        dtype = torch.promote_types(own.rows.dtype, torch.float32 if isinstance(other, TopK) else other.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for rows in (own.rows, other):
            if isinstance(rows, Rows):
                rows.dtype, rows.scale = dtype, rows.scale.to(wide)
        counts = counts.to(wide)
        known = Known(own.labels, self.mixture, counts, -self.nll_weight * counts if self.nll_weight else None)
        size = tile_rows(len(counts), vocab, dtype, 2, own.chunk_bytes)
        gradient = own.gradient(size, self.inplace_backward)
        with torch.no_grad():
            divergence, logps = compare(own.rows, other, known, size, gradient)
        return divergence, -logps, None if gradient is None else gradient.results()

    def extra_repr(self) -> str:
        return f"divergence={self.divergence!r}, beta={self.beta}, normalization={self.normalization!r}"


def distillation_loss(
    logits: Logits,
    labels: Tensor,
    teacher: Teacher,
    *,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    num_items: Count | None = None,
    **options: Any,
) -> DistillationOutput:
    """The divergence of a student from a teacher, and the student's gradient: `DistillationLoss` in one call.

    Args:
        logits, labels, teacher, weights, num_items: as there, of its `forward`.
        temperature: a number, or [..., T] or [...]: one for each token or sequence.
        options: those of `DistillationLoss`.

    Returns:
        DistillationOutput.
    """
    given = temperature if isinstance(temperature, Tensor) else None
    module = DistillationLoss(temperature=1.0 if isinstance(temperature, Tensor) else temperature, **options)
    return module(logits, labels, teacher, temperature=given, weights=weights, num_items=num_items)
