"""Supervised fine-tuning: the masked negative log-likelihood, by tokens or by sequences."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.fused_loss import BATCH, FusedLoss, Grouping, Input, Values
from ..ops.objective import attach_gradient, fused_gradient
from ..ops.results import TokenStats, smoothed
from ..ops.token_programs import TokenProgram, trace_token
from .base import Logits, LogitsLoss, check_float, check_mask, check_range, lookup, masked_mean, renamed, trains
from .chunks import Piece, by_parts, flat_head, known_objective
from .reductions import Count, check_normalization, normalize_real, token_weights

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


def sft_loss(
    logps: Tensor,
    mask: Tensor,
    *,
    normalization: str = "token",
    num_items: Count | None = None,
    lse: Tensor | None = None,
    z_loss: float = 0.0,
) -> SFTOutput:
    """Negative log-likelihood, -sum(logps) / N over real tokens, plus z_loss * sum(lse^2) / N (de Brebisson and Vincent
    2016; the coefficient 1e-4 of PaLM, Chowdhery et al. 2022, sec. 5).

    Args:
        logps: [..., T] log-probability of each token. bfloat16 and float16 are computed in float32.
        mask: [..., T] boolean, True = real. What it hides may hold anything and changes nothing.
        normalization: "token": mean over all real tokens; "sequence": mean of per-sequence means, over sequences that
            have a real token.
        num_items: divide by this instead of by this batch's own number of tokens (or sequences): with gradient
            accumulation, the number in all micro-batches, as transformers' `num_items_in_batch`. 0 counts as 1.
        lse: [..., T] logsumexp of the logits, needed by, and only by, `z_loss`.
        z_loss: weight of the mean of lse^2.

    Returns:
        SFTOutput. With no real token the loss is 0 and so are the gradients.

    Raises:
        TypeError: logps that are not floating-point, a mask that is not boolean.
        ValueError: shapes that differ, an unknown normalization, a negative num_items or z_loss, z_loss without lse.
    """
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_range("z_loss", z_loss, 0.0)
    if z_loss > 0 and lse is None:
        raise ValueError(f"lse, the logsumexp of each token, is needed by z_loss={z_loss}; got None")
    kind = lookup("normalization", NORMALIZATIONS, normalization)
    check_normalization(logps, kind, num_items, None)
    if lse is not None:
        check_float("lse", lse, logps.shape, "logps")
    values = Values(mask, {"logps": logps, "lse": lse}, [Input("num_items", num_items, BATCH)])
    return sft_formula(values, kind, z_loss, 0.0)


def sft_formula(t: Any, normalization: str, z_loss: float, smoothing: float) -> SFTOutput:
    """The loss and its metrics from what is known of every token: logps, mask, and lse, mean, num_items if needed."""
    nll = -smoothed(t.logps, t.lse, t.mean, smoothing)
    squares = torch.zeros_like(nll.detach().sum())
    if t.lse is not None and (z_loss or not smoothing):
        squares = masked_mean(t.lse.square().detach(), t.mask)
    loss = normalize_real(with_z_loss(nll, t.lse, z_loss), t.mask, normalization, t.num_items, None)
    return SFTOutput(loss, masked_mean(nll.detach(), t.mask), squares, t.mask.sum())


def with_z_loss(losses: Any, lse: Any, z_loss: float) -> Any:
    """Losses of tokens plus z_loss * lse^2."""
    return losses + z_loss * lse.square() if z_loss else losses


@functools.lru_cache(maxsize=128)
def _program(z_loss: float, smoothing: float) -> TokenProgram:
    """The loss of one token, for the kernels of one launch."""
    return trace_token(lambda t: with_z_loss(-smoothed(t.logps, t.lse, t.mean, smoothing), t.lse, z_loss))


class SFTLoss(LogitsLoss):
    """`sft_loss` from logits.

    Args:
        normalization: as in `sft_loss`.
        label_smoothing: e in [0, 1]: cross-entropy against (1 - e) of the label and e of the uniform distribution
            (Szegedy et al. 2016, sec. 7).
        z_loss: weight of the mean of lse^2.
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
        lse = ["lse"] if z_loss > 0 else []
        statistics = ["logps", "lse", "mean"] if label_smoothing else ["logps", *lse]
        self.fused = FusedLoss(self._formula, statistics, settings=self._settings)
        self.of_stats = FusedLoss(self._smoothed_formula, ["logps", *lse], settings=self._smoothed_settings)

    def forward(self, logits: Logits, labels: Tensor, *, num_items: Count | None = None) -> SFTOutput:
        """The loss of a batch.

        Args:
            logits: [..., T, V], or a `fastalign.Head` or tuple (hidden, weight) in their place (always in two steps).
            labels: [..., T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.
            num_items: as in `sft_loss`.

        Raises:
            ValueError, TypeError: as `token_stats` and `sft_loss`.
        """
        found = self._fused(logits, labels, num_items)
        if found is not None:
            return found
        mask = labels.long() != self.ignore_index
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None and labels.dim():
            return self._by_parts(head, labels, mask, num_items)
        gradient = None
        if self.fuse_backward and isinstance(logits, Tensor) and trains(logits):
            weight = token_weights(labels, self.ignore_index, NORMALIZATIONS[self.normalization], num_items)
            program = _program(self.z_loss, self.label_smoothing)
            stats, mean, gradient = fused_gradient(
                logits, labels, weight, program, {}, inplace=self.inplace_backward, **self.stats_options
            )
            stats = stats._replace(logps=smoothed(stats.logps, stats.lse, mean, self.label_smoothing))
        else:
            stats = self.stats(logits, labels, label_smoothing=self.label_smoothing)
        output = self._of_statistics(stats, labels, mask, num_items)
        if gradient is None or not isinstance(logits, Tensor):
            return output
        return output._replace(loss=attach_gradient(output.loss, logits, gradient))

    def _settings(self) -> tuple[Any, ...]:
        return "sft", self.normalization, self.z_loss, self.label_smoothing

    def _smoothed_settings(self) -> tuple[Any, ...]:
        return "sft", self.normalization, self.z_loss, 0.0

    def _formula(self, t: Any) -> SFTOutput:
        return sft_formula(t, NORMALIZATIONS[self.normalization], self.z_loss, self.label_smoothing)

    def _smoothed_formula(self, t: Any) -> SFTOutput:
        """Of log-probabilities that are smoothed already."""
        return sft_formula(t, NORMALIZATIONS[self.normalization], self.z_loss, 0.0)

    def _fused(self, logits: Logits, labels: Tensor, num_items: Count | None) -> SFTOutput | None:
        """The results where one program serves; else None, and the general path does it or says what is wrong."""
        if self.fuse_backward or not isinstance(logits, Tensor) or not _is_count(num_items, labels):
            return None
        inputs = () if num_items is None else (Input("num_items", num_items, BATCH),)
        found = self.fused.of_logits(self.call(logits, labels), inputs, _grouping(labels), self.inplace_backward)
        return None if found is None else SFTOutput(*found)

    def _of_statistics(self, stats: TokenStats, labels: Tensor, mask: Tensor, num_items: Count | None) -> SFTOutput:
        """Of log-probabilities that are smoothed already."""
        if _is_count(num_items, labels):
            inputs = [Input("num_items", num_items, BATCH)]
            found = self.of_stats.of_statistics(stats, labels, inputs, _grouping(labels), self.ignore_index)
            if found is not None:
                return SFTOutput(*found)
        lse = stats.lse if self.z_loss > 0 else None
        return sft_loss(
            stats.logps, mask, normalization=self.normalization, num_items=num_items, lse=lse, z_loss=self.z_loss
        )

    def _by_parts(self, head: Head, labels: Tensor, mask: Tensor, num_items: Count | None) -> SFTOutput:
        """Some sequences after the other: see `_parts`."""
        labels, mask = (x.reshape(-1, x.shape[-1]) for x in (labels, mask))  # [T] is one sequence
        tokens = mask.sum()
        total = num_items if num_items is not None else tokens if self.normalization == "token" else mask.any(-1).sum()

        def run(piece: Piece, which: Tensor, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            out = self(piece, labels[rows], num_items=total)
            share = (out.num_tokens.double() / tokens.clamp(min=1)).to(out.loss.dtype)
            return (out.nll * share, out.z_loss * share), out.loss

        numbers = torch.arange(len(labels), device=labels.device).unsqueeze(-1)
        loss, parts = by_parts(flat_head(head), labels, self.ignore_index, numbers, run)
        nll, z_loss = (torch.stack(x).sum() for x in zip(*parts, strict=True))
        return SFTOutput(loss, nll, z_loss, tokens)

    def extra_repr(self) -> str:
        return f"normalization={self.normalization!r}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}"


def _is_count(num_items: Count | None, labels: Tensor) -> bool:
    """Whether a program takes it as it is."""
    if not isinstance(labels, Tensor) or labels.dim() < 1:
        return False
    return num_items is None or (isinstance(num_items, (int, float)) and num_items >= 0)


def _grouping(labels: Tensor) -> Grouping:
    """Sequences along the last axis."""
    return Grouping(labels.numel() // max(labels.shape[-1], 1))
