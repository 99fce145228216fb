"""Direct preference losses on pairs: `DPOLoss` from logits, and `dpo_loss` of `preference_on_sums`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.fused_loss import GROUP, TOKEN, FusedLoss, Grouping, Input, Values
from ..ops.results import TokenStats
from ..ops.sequences import cut, sum_tokens
from .base import Logits, LogitsLoss, check_logits, check_range, hide, masked_mean, narrow, stats_of
from .chunks import Piece, by_parts, known_objective
from .pair_weights import shared_length_weights, wpo_weights
from .pairs import F_DIVERGENCES, NLL_NORMALIZATIONS
from .pairwise import PAIRWISE, PairwiseOptions
from .preference_on_sums import PreferenceOutput, Two, check_inputs, dpo_loss, pairwise_formula, pairwise_loss

__all__ = ["F_DIVERGENCES", "NLL_NORMALIZATIONS", "PAIRWISE", "DPOLoss", "PreferenceOutput", "dpo_loss"]


class _Marked(NamedTuple):
    """[2B, T] each, above 0 at the tokens that the completions' sums are of, and at those of the NLL."""

    completion: Tensor
    nll_tokens: Tensor

    def rows(self, at: Tensor) -> _Marked:
        return _Marked(self.completion[at], self.nll_tokens[at])


class DPOLoss(LogitsLoss):
    """Any pairwise loss of `dpo_loss`, from logits: DPOLoss(beta=0.1), DPOLoss(loss_type="orpo").

    Args:
        options: those of `dpo_loss`: beta, loss_type, label_smoothing, length_alpha, average, f_divergence, ...
        use_weighting: weigh each pair by `pair_weights.wpo_weights` (WPO), from the same read.
        ld_alpha: in [0, 1], weight of the log-probabilities beyond the shorter length of a pair (LD-DPO), the policy's
            and of `ref_logits`; reference sums that are given must have been taken so. Lengths stay whole.
        report_logits: return the mean logits of both sides, from the same read.
        ignore_index: labels with this value (prompt, padding) do not count.
        temperature: divides the logits, the reference's too.
        softcap: soft-capping of the logits (Gemma 2), the reference's too.
        inplace_backward: the backward writes the policy's gradient over `logits`.

    Raises:
        ValueError, TypeError: as `dpo_loss`, when the module is made.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
        use_weighting: bool = False,
        ld_alpha: float | None = None,
        report_logits: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        self.options = PairwiseOptions(**options)
        if use_weighting and any(variant.couples for variant, _ in self.options.variants):
            raise ValueError(f"use_weighting is of single pairs; loss_type {self.options.loss_type!r} sorts them")
        if ld_alpha is not None:
            check_range("ld_alpha", ld_alpha, 0, 1)
        self.use_weighting, self.ld_alpha, self.report_logits = use_weighting, ld_alpha, report_logits
        self.fused = {wide: self._fused_loss(wide) for wide in (True, False)}

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        *,
        ref_logits: Logits | None = None,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        nll_labels: Tensor | None = None,
    ) -> PreferenceOutput:
        """The loss of B pairs given as 2B rows.

        Args:
            logits: [2B, T, V], the policy's: the B chosen rows, then the B rejected rows in the same order; or a
                `fastalign.Head` or tuple (hidden [2B, T, H], weight [V, H]), from which they are formed by tiles.
            labels: [2B, T], int64 or int32: `labels[i, t]` is the target of `logits[i, t]`.
            ref_logits: [2B, T, V] (or a head) of the reference, a constant; or
            ref_chosen_logps, ref_rejected_logps: [B] precomputed sums; or neither, for reference-free losses. Where
                they are float64 (`sequence_logps(..., dtype=torch.float64)`), the policy's sums are not rounded to
                float32 either.
            nll_labels: [B, T] targets of the chosen rows that the NLL is of in place of their labels, their prompts'
                too for instance (rpo, cpo, orpo, sft). They must be the labels wherever both count: one read of the
                logits serves both. (Checked on the CPU.)

        Returns:
            PreferenceOutput.

        Raises:
            ValueError: an odd number of rows, a reference given twice or not used, and as `token_stats` and `dpo_loss`.
        """
        shape = check_logits("logits", logits).shape
        if len(shape) != 3 or shape[0] % 2:
            raise ValueError(f"logits must be [2B, T, V], the chosen rows, then the rejected rows; got {list(shape)}")
        references: Two = (ref_chosen_logps, ref_rejected_logps)
        if ref_logits is not None:
            if ref_chosen_logps is not None or ref_rejected_logps is not None:
                raise ValueError("give ref_logits or ref_chosen_logps and ref_rejected_logps, not both")
            if not self.options.uses_reference:
                raise ValueError(f"ref_logits must be None: loss_type {self.options.loss_type!r} uses no reference")
            references = _halves(self.reference_logps(ref_logits, labels, torch.float64))
        marked = None
        if nll_labels is not None:
            labels, marked = self._marked(labels, nll_labels)
        by_pairs = self.options.by_pairs and not self.use_weighting
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None and by_pairs:
            return self._by_parts(head, labels, references, marked)
        if head is not None and head.plan == "objective":
            raise ValueError(
                f"plan 'objective' needs a loss of each pair by itself; loss_type {self.options.loss_type!r} with "
                f"nll_normalization={self.options.nll_normalization!r} and use_weighting={self.use_weighting} is none"
            )
        return self._of(logits, labels, references, marked)

    def _marked(self, labels: Tensor, nll_labels: Tensor) -> tuple[Tensor, _Marked]:
        """Labels of all tokens that count for the sums or the NLL, and which count for what."""
        if not any(variant.nll for variant, _ in self.options.variants):
            raise ValueError(f"nll_labels must be None: loss_type {self.options.loss_type!r} has no NLL")
        chosen, rejected = labels.chunk(2)
        if not isinstance(nll_labels, Tensor) or nll_labels.shape != chosen.shape:
            got = list(nll_labels.shape) if isinstance(nll_labels, Tensor) else type(nll_labels).__name__
            raise ValueError(f"nll_labels must be a tensor of shape {list(chosen.shape)}, one row a pair; got {got}")
        of_sums, of_nll = (x.long() != self.ignore_index for x in (chosen, nll_labels))
        if labels.device.type == "cpu" and (of_sums & of_nll & (chosen != nll_labels)).any():
            raise ValueError("nll_labels must be the chosen rows' labels wherever both count; got others")
        merged = torch.cat([torch.where(of_sums, chosen, nll_labels.to(labels.dtype)), rejected])
        nll_tokens = torch.cat([of_nll, torch.zeros_like(of_nll)]).float()
        return merged, _Marked((labels.long() != self.ignore_index).float(), nll_tokens)

    @torch.no_grad()
    def reference_logps(self, ref_logits: Logits, labels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sums of the log-probabilities of each row's labels by a reference, as the loss takes the policy's."""
        logps = stats_of(ref_logits, labels, **self.stats_options).logps
        weights = self._token_weights(labels)
        return sum_tokens(logps, dtype) if weights is None else sum_tokens(logps * weights, dtype or logps.dtype)

    def _token_weights(self, labels: Tensor, marked: _Marked | None = None) -> Tensor | None:
        if self.ld_alpha is None:
            return None
        return shared_length_weights(self._completion(labels, marked), self.ld_alpha)

    def _completion(self, labels: Tensor, marked: _Marked | None) -> Tensor:
        return labels.long() != self.ignore_index if marked is None else marked.completion > 0

    def _statistics(self, logits: Logits, labels: Tensor) -> TokenStats:
        wanted = self.use_weighting * ["log_sum_sq_probs"] + self.report_logits * ["mean_logits"]
        return self.stats(logits, labels, **({"diagnostics": tuple(wanted)} if wanted else {}))

    def _of(self, logits: Logits, labels: Tensor, references: Two, marked: _Marked | None = None) -> PreferenceOutput:
        """The loss of rows whose references are sums."""
        stats, pair_weights = None, None
        if self.use_weighting or not isinstance(logits, Tensor):
            stats = self._statistics(logits, labels)
        if self.use_weighting and stats is not None:
            pair_weights = wpo_weights(stats, self._completion(labels, marked))
        token_weights = self._token_weights(labels, marked) if isinstance(labels, Tensor) else None
        found = self._fused(logits, stats, labels, references, pair_weights, token_weights, marked)
        if found is not None:
            return PreferenceOutput(*found)
        if marked is not None or self.report_logits:
            stats = self._statistics(logits, labels) if stats is None else stats
            return self._in_torch(stats, labels, references, pair_weights, token_weights, marked)
        # Rounded as given references were, so that a policy that is its reference still has rewards of exactly 0.
        wide = references[0] is None or references[0].dtype == torch.float64
        sum_type = torch.float64 if wide else torch.float32
        if stats is None and token_weights is None:
            sums, dtype = self.sums(logits, labels, 2, sum_type)
        else:
            logps = self.stats(logits, labels).logps if stats is None else stats.logps
            weighted = logps if token_weights is None else logps * token_weights
            sums, dtype = cut(sum_tokens(weighted, sum_type), 2), logps.dtype
        lengths: Two = (None, None)
        if self.options.needs_lengths:
            lengths = _halves((labels.long() != self.ignore_index).sum(-1))
        chosen, rejected = sums
        return narrow(pairwise_loss(self.options, (chosen, rejected), references, lengths, pair_weights), dtype)

    def _in_torch(
        self,
        stats: TokenStats,
        labels: Tensor,
        references: Two,
        pair_weights: Tensor | None,
        token_weights: Tensor | None,
        marked: _Marked | None,
    ) -> PreferenceOutput:
        """The formula of tokens as torch operations."""
        first, second = stats.logps.new_zeros(2, len(labels) // 2).unbind()
        check_inputs(self.options, (first, second), references, (first, second))  # lengths are known
        wide = references[0] is None or references[0].dtype == torch.float64
        inputs = _inputs(references, pair_weights, token_weights, marked, stats)
        values = Values(labels.long() != self.ignore_index, {"logps": stats.logps}, inputs)
        return narrow(self._formula(wide, values), stats.logps.dtype)

    def _fused_loss(self, wide: bool) -> FusedLoss:
        statistics = ("logps", "mean") if self.report_logits else ("logps",)
        settings = functools.partial(self._settings, wide)
        return FusedLoss(functools.partial(self._formula, wide), statistics, settings=settings)

    def _settings(self, wide: bool) -> tuple[Any, ...]:
        return "pairwise", wide, self.report_logits, self.options.key

    def _formula(self, wide: bool, t: Any) -> PreferenceOutput:
        """Of both sides' tokens. A policy that is its reference has rewards of exactly 0: sums are rounded as the
        references were."""
        dtype = torch.float64 if wide else torch.float32
        own, nll = (t.mask, None) if t.completion is None else (t.completion > 0, t.nll_tokens)
        logps = t.logps if nll is None else hide(t.logps, own)
        logps = logps if t.token_weights is None else logps * t.token_weights
        sums = sum_tokens(logps, dtype).chunk(2)
        lengths = own.sum(-1).chunk(2) if self.options.needs_lengths else (None, None)
        references = t.ref_chosen_logps, t.ref_rejected_logps
        if nll is not None:
            nll = sum_tokens(hide(t.logps, nll > 0), dtype).chunk(2)[0], (nll > 0).sum(-1).chunk(2)[0]
        found = pairwise_formula(self.options, sums, references, lengths, t.pair_weights, nll)
        if not self.report_logits:
            return found
        mean = t.mean if t.mean_logits is None else t.mean_logits
        won, lost = masked_mean(mean.detach(), own, dim=-1).chunk(2)
        return found._replace(chosen_logits=won, rejected_logits=lost)

    def _fused(
        self,
        logits: Logits,
        stats: TokenStats | None,
        labels: Tensor,
        references: Two,
        pair_weights: Tensor | None,
        token_weights: Tensor | None,
        marked: _Marked | None,
    ) -> list[Any] | None:
        """The results where one program serves; else None, and the general path does it or says what is wrong."""
        if not isinstance(labels, Tensor) or labels.dim() < 1 or (stats is None and not isinstance(logits, Tensor)):
            return None
        pairs = labels.shape[0] // 2
        if any(x is not None and (not isinstance(x, Tensor) or x.shape != (pairs,)) for x in references):
            return None
        first, second = references
        if (first is None) != (second is None) or (first is not None and not self.options.uses_reference):
            return None
        if first is not None and second is not None and first.dtype != second.dtype:
            return None
        wide = first is None or first.dtype == torch.float64
        inputs = _inputs(references, pair_weights, token_weights, marked, stats)
        fused, grouping = self.fused[wide], Grouping(2 * pairs)
        if isinstance(logits, Tensor) and stats is None:
            return fused.of_logits(self.call(logits, labels), inputs, grouping, self.inplace_backward)
        return None if stats is None else fused.of_statistics(stats, labels, inputs, grouping, self.ignore_index)

    def _by_parts(self, head: Head, labels: Tensor, references: Two, marked: _Marked | None) -> PreferenceOutput:
        """Some pairs after the other: see `_parts`."""
        count = labels.shape[0] // 2

        def run(piece: Piece, pairs: Tensor, rows: Tensor) -> tuple[PreferenceOutput, Tensor]:
            chosen, rejected = (None if x is None else x[pairs] for x in references)
            out = self._of(piece, labels[rows], (chosen, rejected), None if marked is None else marked.rows(rows))
            return out, out.loss * (len(pairs) / count)

        pairs = torch.arange(2 * count, device=labels.device).view(2, count).t()
        loss, parts = by_parts(head, labels, self.ignore_index, pairs, run, by_place=True)
        _, *fields = zip(*parts, strict=True)
        joined: list[Any] = [None if x[0] is None else torch.cat(x) for x in fields]
        return PreferenceOutput(loss, *joined)

    def extra_repr(self) -> str:
        return repr(self.options)


def _inputs(
    references: Two,
    pair_weights: Tensor | None,
    token_weights: Tensor | None,
    marked: _Marked | None,
    stats: TokenStats | None,
) -> list[Input]:
    """What the formula is given beside the statistics that it is traced with."""
    inputs = [Input(f"ref_{s}_logps", x, GROUP) for s, x in zip(("chosen", "rejected"), references, strict=True)]
    of_tokens = {} if marked is None else marked._asdict()
    of_tokens |= {"token_weights": token_weights, "mean_logits": None if stats is None else stats.mean_logits}
    inputs += [Input(name, x, TOKEN) for name, x in of_tokens.items() if x is not None]
    return inputs if pair_weights is None else [*inputs, Input("pair_weights", pair_weights, GROUP)]


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    half = rows.shape[0] // 2
    return rows[:half], rows[half:]
