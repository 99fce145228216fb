"""Supervised fine-tuning: the masked negative log-likelihood, by tokens or by sequences."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.fused_loss import BATCH, TOKEN, FusedLoss, Grouping, Input, Values
from ..ops.objective import attach_gradient, fused_gradient
from ..ops.results import TokenStats, smoothed
from ..ops.token_programs import TokenProgram, trace_token
from ..utils.checks import check_choice
from .base import Logits, LogitsLoss, check_float, check_mask, check_range, hide, lookup, masked_mean, renamed, trains
from .chunks import Piece, by_parts, flat_head, known_objective
from .reductions import Count, check_normalization, check_weights, normalize_real, token_weights, weighted

__all__ = ["NORMALIZATIONS", "SFTLoss", "SFTOutput", "sft_loss"]


class SFTOutput(NamedTuple):
    """Result of `sft_loss`. All but the loss are detached scalars."""

    loss: Tensor
    """Scalar."""
    nll: Tensor
    """Mean of -logps over the real tokens, in nats, whatever the normalization (label smoothing included)."""
    z_loss: Tensor
    """Mean of lse^2 over the real tokens; 0 where no `lse` was given."""
    num_tokens: Tensor
    """Number of real tokens, int64."""


NORMALIZATIONS = {"token": "token", "sequence": "grpo"}
"""What SFT calls a normalisation → its name among those of all per-token losses, where the formula is."""


LOSS_TYPES = ("nll", "dft")
REDUCTIONS = ("mean", "sum", "none")


def sft_loss(
    logps: Tensor,
    mask: Tensor,
    *,
    normalization: str = "token",
    num_items: Count | None = None,
    lse: Tensor | None = None,
    z_loss: float = 0.0,
    loss_type: str = "nll",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> SFTOutput:
    """Negative log-likelihood, -sum(logps) / N over real tokens, plus z_loss * sum(lse^2) / N (de Brebisson and Vincent
    2016; the coefficient 1e-4 of PaLM, Chowdhery et al. 2022, sec. 5).

    With loss_type="dft" each token's -logps is multiplied by its probability, a constant (dynamic fine-tuning, Wu et
    al. 2025, arXiv:2508.05629).

    Args:
        logps: [..., T] log-probability of each token. bfloat16 and float16 are computed in float32.
        mask: [..., T] boolean, True = real. What it hides may hold anything and changes nothing.
        normalization: "token": mean over all real tokens; "sequence": mean of per-sequence means, over sequences that
            have a real token.
        num_items: divide by this instead of by this batch's own number of tokens (or sequences): with gradient
            accumulation, the number in all micro-batches, as transformers' `num_items_in_batch`. 0 counts as 1. With
            weights, their sum (or the number of sequences that weigh something).
        lse: [..., T] logsumexp of the logits, needed by, and only by, `z_loss`.
        z_loss: weight of the mean of lse^2.
        loss_type: "nll" or "dft".
        weights: [..., T], at least 0: the means are weighted by them, so that a token of weight 0 is as one that is
            hidden.
        reduction: "mean", as `normalization` says; "sum", the same without its division by the number of tokens (or of
            sequences); "none": the loss of each token times its weight, [..., T], 0 where hidden.

    Returns:
        SFTOutput. With no real token the loss is 0 and so are the gradients.

    Raises:
        TypeError: logps that are not floating-point, a mask that is not boolean.
        ValueError: shapes that differ, an unknown name, a negative num_items, z_loss or weight, z_loss without lse,
            num_items with another reduction than the mean.
    """
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_range("z_loss", z_loss, 0.0)
    if z_loss > 0 and lse is None:
        raise ValueError(f"lse, the logsumexp of each token, is needed by z_loss={z_loss}; got None")
    kind = lookup("normalization", NORMALIZATIONS, normalization)
    check_normalization(logps, kind, num_items, None)
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_choice("reduction", reduction, REDUCTIONS)
    num_items = _divisor(num_items, reduction)
    if lse is not None:
        check_float("lse", lse, logps.shape, "logps")
    if weights is not None:
        check_weights(weights, mask)
    given = [Input("num_items", num_items, BATCH), Input("weights", weights, TOKEN)]
    values = Values(mask, {"logps": logps, "lse": lse}, given)
    out = sft_formula(values, kind, z_loss, 0.0, loss_type)
    if reduction != "none":
        return out
    each = _token_losses(values, -values.logps, z_loss, loss_type)
    return out._replace(loss=hide(each if weights is None else each * values.weights, mask))


def _divisor(num_items: Count | None, reduction: str) -> Count | None:
    """What a reduction divides by; None: the batch's own number."""
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is what a mean divides by; got it with reduction={reduction!r}")
    return 1 if reduction == "sum" else num_items


def sft_formula(t: Any, normalization: str, z_loss: float, smoothing: float, loss_type: str = "nll") -> SFTOutput:
    """The loss and its metrics from what is known of every token: logps, mask, and lse, mean, num_items, weights if
    needed."""
    nll = -smoothed(t.logps, t.lse, t.mean, smoothing)
    squares = torch.zeros_like(nll.detach().sum())
    if t.lse is not None and (z_loss or not smoothing):
        squares = masked_mean(t.lse.square().detach(), t.mask)
    each = _token_losses(t, nll, z_loss, loss_type)
    if t.weights is None:
        loss = normalize_real(each, t.mask, normalization, t.num_items, None)
    else:
        loss = weighted(each, t.weights, t.mask, normalization, t.num_items)
    return SFTOutput(loss, masked_mean(nll.detach(), t.mask), squares, t.mask.sum())


def _token_losses(t: Any, nll: Any, z_loss: float, loss_type: str) -> Any:
    """The loss of every token, from its negative log-likelihood."""
    return with_z_loss(nll * t.logps.detach().exp() if loss_type == "dft" else nll, t.lse, z_loss)


def with_z_loss(losses: Any, lse: Any, z_loss: float) -> Any:
    """Losses of tokens plus z_loss * lse^2."""
    return losses + z_loss * lse.square() if z_loss else losses


@functools.lru_cache(maxsize=128)
def _program(z_loss: float, smoothing: float, loss_type: str) -> TokenProgram:
    """The loss of one token, for the kernels of one launch."""
    return trace_token(lambda t: _token_losses(t, -smoothed(t.logps, t.lse, t.mean, smoothing), z_loss, loss_type))


class SFTLoss(LogitsLoss):
    """`sft_loss` from logits.

    Args:
        normalization: as in `sft_loss`.
        label_smoothing: e in [0, 1]: cross-entropy against (1 - e) of the label and e of the uniform distribution
            (Szegedy et al. 2016, sec. 7).
        z_loss: weight of the mean of lse^2.
        loss_type: "nll", or "dft": each token's loss times its probability, a constant (Wu et al. 2025,
            arXiv:2508.05629); without label smoothing.
        reduction: "mean", "sum" or "none", as in `sft_loss`.
        ignore_index: labels with this value (prompt, padding) do not count.
        temperature: divides the logits.
        softcap: soft-capping of the logits (Gemma 2).
        inplace_backward: the backward writes the gradient over `logits`; with fuse_backward the forward already does.
        fuse_backward: compute loss and gradient in one visit to the logits (`fastalign.token_objective`): one read and
            one write of them instead of two reads and a write. The gradient can then be used once.
        one_launch: deprecated name of fuse_backward.
    """

    def __init__(
        self,
        *,
        normalization: str = "token",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_type: str = "nll",
        reduction: str = "mean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
        fuse_backward: bool = False,
        one_launch: bool | None = None,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        lookup("normalization", NORMALIZATIONS, normalization)
        self.fuse_backward = renamed("fuse_backward", fuse_backward, "one_launch", one_launch)
        self.normalization = normalization
        self.z_loss = check_range("z_loss", z_loss, 0.0)
        self.label_smoothing = check_range("label_smoothing", label_smoothing, 0.0, 1.0)
        self.loss_type, self.reduction = loss_type, reduction
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_choice("reduction", reduction, REDUCTIONS)
        if label_smoothing and loss_type != "nll":
            raise ValueError(f"label_smoothing must be 0 with loss_type={loss_type!r}; got {label_smoothing}")
        if self.fuse_backward and reduction == "none":
            raise ValueError("fuse_backward forms the gradient of one number; got it with reduction='none'")
        lse = ["lse"] if z_loss > 0 else []
        statistics = ["logps", "lse", "mean"] if label_smoothing else ["logps", *lse]
        self.fused = FusedLoss(self._formula, statistics, settings=self._settings)
        self.of_stats = FusedLoss(self._smoothed_formula, ["logps", *lse], settings=self._smoothed_settings)

    def forward(
        self, logits: Logits, labels: Tensor, *, num_items: Count | None = None, weights: Tensor | None = None
    ) -> SFTOutput:
        """The loss of a batch.

        Args:
            logits: [..., T, V], or a `fastalign.Head` or tuple (hidden, weight) in their place (always in two steps).
            labels: [..., T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.
            num_items, weights: as in `sft_loss`.

        Raises:
            ValueError, TypeError: as `token_stats` and `sft_loss`.
        """
        if weights is not None:
            check_weights(weights, labels.long() != self.ignore_index)
        divisor = _divisor(num_items, self.reduction)
        found = self._fused(logits, labels, divisor, weights)
        if found is not None:
            return found
        mask = labels.long() != self.ignore_index
        head = None if self.reduction == "none" else known_objective(logits, labels, self.ignore_index)
        if head is not None and labels.dim():
            return self._by_parts(head, labels, mask, divisor, weights)
        gradient = None
        if self.fuse_backward and isinstance(logits, Tensor) and trains(logits):
            kind = NORMALIZATIONS[self.normalization]
            weight = token_weights(labels, self.ignore_index, kind, divisor, weights=weights)
            program = _program(self.z_loss, self.label_smoothing, self.loss_type)
            stats, mean, gradient = fused_gradient(
                logits, labels, weight, program, {}, inplace=self.inplace_backward, **self.stats_options
            )
            stats = stats._replace(logps=smoothed(stats.logps, stats.lse, mean, self.label_smoothing))
        else:
            stats = self.stats(logits, labels, label_smoothing=self.label_smoothing)
        output = self._of_statistics(stats, labels, mask, divisor, weights)
        if gradient is None or not isinstance(logits, Tensor):
            return output
        return output._replace(loss=attach_gradient(output.loss, logits, gradient))

    def _settings(self) -> tuple[Any, ...]:
        return "sft", self.normalization, self.z_loss, self.label_smoothing, self.loss_type

    def _smoothed_settings(self) -> tuple[Any, ...]:
        return "sft", self.normalization, self.z_loss, 0.0, self.loss_type

    def _formula(self, t: Any) -> SFTOutput:
        return sft_formula(t, NORMALIZATIONS[self.normalization], self.z_loss, self.label_smoothing, self.loss_type)

    def _smoothed_formula(self, t: Any) -> SFTOutput:
        """Of log-probabilities that are smoothed already."""
        return sft_formula(t, NORMALIZATIONS[self.normalization], self.z_loss, 0.0, self.loss_type)

    def _fused(
        self, logits: Logits, labels: Tensor, num_items: Count | None, weights: Tensor | None
    ) -> SFTOutput | None:
        """The results where one program serves; else None, and the general path does it or says what is wrong."""
        if self.fuse_backward or self.reduction == "none":
            return None
        if not isinstance(logits, Tensor) or not _is_count(num_items, labels):
            return None
        inputs = _inputs(num_items, weights)
        found = self.fused.of_logits(self.call(logits, labels), inputs, _grouping(labels), self.inplace_backward)
        return None if found is None else SFTOutput(*found)

    def _of_statistics(
        self, stats: TokenStats, labels: Tensor, mask: Tensor, num_items: Count | None, weights: Tensor | None
    ) -> SFTOutput:
        """Of log-probabilities that are smoothed already."""
        if self.reduction != "none" and _is_count(num_items, labels):
            inputs = _inputs(num_items, weights)
            found = self.of_stats.of_statistics(stats, labels, inputs, _grouping(labels), self.ignore_index)
            if found is not None:
                return SFTOutput(*found)
        return sft_loss(
            stats.logps,
            mask,
            normalization=self.normalization,
            num_items=num_items,
            lse=stats.lse if self.z_loss > 0 else None,
            z_loss=self.z_loss,
            loss_type=self.loss_type,
            weights=weights,
            reduction="none" if self.reduction == "none" else "mean",
        )

    def _by_parts(
        self, head: Head, labels: Tensor, mask: Tensor, num_items: Count | None, weights: Tensor | None
    ) -> SFTOutput:
        """Some sequences after the other: see `_parts`."""
        labels, mask = (x.reshape(-1, x.shape[-1]) for x in (labels, mask))  # [T] is one sequence
        weights = None if weights is None else weights.reshape(labels.shape)
        tokens = mask.sum()
        total = self._items(mask, weights) if num_items is None else num_items

        def run(piece: Piece, which: Tensor, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            given = None if weights is None else weights[rows]
            out = self._of_piece(piece, labels[rows], mask[rows], total, given)
            share = (out.num_tokens.double() / tokens.clamp(min=1)).to(out.loss.dtype)
            return (out.nll * share, out.z_loss * share), out.loss

        numbers = torch.arange(len(labels), device=labels.device).unsqueeze(-1)
        loss, parts = by_parts(flat_head(head), labels, self.ignore_index, numbers, run)
        nll, z_loss = (torch.stack(x).sum() for x in zip(*parts, strict=True))
        return SFTOutput(loss, nll, z_loss, tokens)

    def _of_piece(
        self, piece: Piece, labels: Tensor, mask: Tensor, num_items: Count, weights: Tensor | None
    ) -> SFTOutput:
        stats = self.stats(piece, labels, label_smoothing=self.label_smoothing)
        return self._of_statistics(stats, labels, mask, num_items, weights)

    def _items(self, mask: Tensor, weights: Tensor | None) -> Tensor:
        """What the mean divides by."""
        if weights is None:
            return mask.sum() if self.normalization == "token" else mask.any(-1).sum()
        real = hide(weights, mask)
        found = real.sum() if self.normalization == "token" else (real > 0).any(-1).sum()
        return torch.where(found > 0, found, torch.ones_like(found))

    def extra_repr(self) -> str:
        shown = ("normalization", "loss_type", "reduction", "label_smoothing", "z_loss")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _inputs(num_items: Count | None, weights: Tensor | None) -> list[Input]:
    """What a program is given, of what there is."""
    found = [Input("num_items", num_items, BATCH), Input("weights", weights, TOKEN)]
    return [x for x in found if x.value is not None]


def _is_count(num_items: Count | None, labels: Tensor) -> bool:
    """Whether a program takes it as it is."""
    if not isinstance(labels, Tensor) or labels.dim() < 1:
        return False
    return num_items is None or (isinstance(num_items, (int, float)) and num_items >= 0)


def _grouping(labels: Tensor) -> Grouping:
    """Sequences along the last axis."""
    return Grouping(labels.numel() // max(labels.shape[-1], 1))
