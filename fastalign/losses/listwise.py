"""Losses on ranked lists: Preference Ranking Optimization (PRO), Plackett-Luce and ListMLE, by `list_formula`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.head import Head
from ..ops.call import check_labels, check_tensor
from ..ops.fused_loss import SEQUENCE, FusedLoss, Grouping, Input
from .base import (
    Logits,
    LogitsLoss,
    check_float,
    check_logits,
    check_mask,
    check_range,
    hide,
    lookup,
    masked_mean,
    sum_tokens,
)
from .chunks import Piece, by_parts, flat_head, known_objective
from .list_formula import (
    FORMS,
    ListOutput,
    best_entries,
    check_lists,
    check_ranks,
    comparable,
    compared,
    comparisons,
    differences,
    list_metrics,
    ranked_list_loss,
    stage_losses,
)


class PROOutput(NamedTuple):
    """What PRO returns: scalars, all but `loss` without gradient. loss = list_loss + sft_weight * sft_loss."""

    loss: Tensor
    list_loss: Tensor
    """The ranking term."""
    sft_loss: Tensor
    """Mean over lists of (n - 1)^2 times the best response's negative log-likelihood, n its list's real length."""
    accuracy: Tensor
    """As in `ListOutput`, and so are the following."""
    top1_accuracy: Tensor
    margin: Tensor
    num_lists: Tensor


# ----------------------------------------------------------------------------------------------------------- public API
def plackett_luce_loss(scores: Tensor, *, ranks: Tensor | None = None, mask: Tensor | None = None) -> ListOutput:
    """Plackett-Luce negative log-likelihood of a ranking: -sum_{k=1}^{K-1} log(e^{s_k} / sum_{i>=k} e^{s_i}).

    Plackett 1975 and Luce 1959; as a training loss it is ListMLE (the likelihood loss of Xia et al. 2008,
    "Listwise approach to learning to rank"), which needs no function of its own: `ranks` give the order.

    Args:
        scores: [B, K], floating point, best first unless `ranks` are given. Half precision is computed in float32.
        ranks: [B, K], integer or floating point, lower is better (0 is best), in any order of the list. Entries of
            equal rank are not compared with each other.
        mask: [B, K] bool, True = real. Lists may differ in length; hidden entries may stand anywhere and hold anything.

    Returns:
        ListOutput, whose loss is the mean over the lists that hold a comparison.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    scores, mask = check_lists("scores", scores, mask)
    ranks = None if ranks is None else check_ranks(ranks, scores.shape, "scores")
    return ranked_list_loss(scores, mask, ranks, "plackett_luce")


def pro_loss(
    logps: Tensor,
    *,
    rewards: Tensor | None = None,
    ranks: Tensor | None = None,
    mask: Tensor | None = None,
    sft_weight: float = 0.0,
    sft_logps: Tensor | None = None,
    form: str = "plackett_luce",
) -> PROOutput:
    """Preference Ranking Optimization (Song et al. 2023, arXiv:2306.17492), on log-probabilities of ranked responses.

    Without rewards, the paper's eq. 5: each response against all that are ranked below it,

        -sum_{k=1}^{K-1} log(e^{s_k} / sum_{i>=k} e^{s_i}),

    and with form="infonce" its k = 1 term alone, one-vs-rest. With rewards r, the paper's temperatures, as the authors'
    code has them (the paper divides by 1 / T): T_ki = r_k - r_i, T_k = max_i T_ki and

        sum_k log(e^{s_k T_k} + sum_{i: r_i < r_k} e^{s_i T_ki}) - s_k T_k,

    so that near-equal responses are hardly pushed apart. The order is then that of the rewards, whatever the positions,
    and responses of equal reward (T_ki = 0) leave each other alone. On lists without ties, best first, this is the
    authors' loss, but for the 1e-10 inside their logarithm and for one token in their mask, through which a response
    shorter than the longest of its batch is also scored for a token of padding; that is not reproduced.

    The supervised term is sft_weight times (n - 1)^2 times the negative log-likelihood of the best response (the mean
    over those that tie for best), n the number of real entries of its list: the authors' scaling, which keeps pace with
    a ranking term that grows with n.

    Args:
        logps: [B, K], floating point: each response's score s, in the paper its mean log-probability per completion
            token. Best first unless `rewards` or `ranks` are given. Half precision is computed in float32.
        rewards: [B, K], floating point, constants. None: no temperatures.
        ranks: [B, K], integer or floating point, 0 is best: the order without temperatures; not beside `rewards`.
            Responses of equal rank are not compared.
        mask: [B, K] bool, True = real. Lists may differ in length; hidden entries may stand anywhere and hold anything.
        sft_weight: weight of the supervised term (the paper's beta), at least 0.
        sft_logps: [B, K]: log-probabilities for the supervised term. None: `logps`, that is the mean NLL per token if
            these are means. The authors take sums over the completion here: pass the sums to do the same.
        form: "plackett_luce" or "infonce". Where several responses tie for best, "infonce" averages their terms.

    Returns:
        PROOutput, averaged over the lists that hold a comparison; a list without one contributes to neither term.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, a negative weight, an unknown form.
    """
    scores, real = check_lists("logps", logps, mask)
    check_range("sft_weight", sft_weight, 0.0)
    lookup("form", FORMS, form)
    if ranks is not None:
        if rewards is not None:
            raise ValueError("ranks must be None where rewards give the order; got both")
        ranks = check_ranks(ranks, scores.shape, "logps")
    if rewards is not None:
        rewards = hide(check_float("rewards", rewards, scores.shape, "logps").detach().to(scores.dtype), real)
        ranks = -rewards
    if ranks is None:
        ranks = torch.arange(real.shape[1], device=real.device).expand_as(real)
    if sft_logps is not None:
        sft_logps = hide(check_float("sft_logps", sft_logps, scores.shape, "logps").to(scores.dtype), real)
    return pro_formula(scores, real, ranks, rewards, sft_logps, sft_weight, form)


def pro_formula(
    scores: Any, real: Any, ranks: Any, rewards: Any, sft_logps: Any, sft_weight: float, form: str
) -> PROOutput:
    """The loss and its metrics: tensors [B, K] or symbols, 0 where hidden."""
    above = compared(real, ranks)
    gaps = differences(scores) if rewards is None else _tempered(scores, rewards, above)
    best, counted = best_entries(real, above), comparable(above)
    list_loss = masked_mean(FORMS[form](stage_losses(gaps, above), best), counted)
    nll = -masked_mean(scores if sft_logps is None else sft_logps, best, -1)
    sft_loss = masked_mean((real.sum(-1) - 1).square() * nll, counted)
    loss = list_loss + sft_weight * sft_loss if sft_weight else list_loss
    return PROOutput(loss, list_loss.detach(), sft_loss.detach(), *list_metrics(scores, real, above))


def _tempered(scores: Tensor, rewards: Tensor, above: Tensor) -> Tensor:
    """[B, K, K]: s_i T_ki - s_k T_k with T_ki = r_k - r_i and T_k = max_i T_ki over the i that k is above."""
    gaps = rewards.unsqueeze(2) - rewards.unsqueeze(1)
    own = hide(gaps, above).amax(-1)
    return scores.unsqueeze(1) * gaps - (scores * own).unsqueeze(2)


class PROLoss(LogitsLoss):
    """PRO from logits: scores each response by its log-probability and applies `pro_loss`.

    Args:
        sft_weight, form: as in `pro_loss`.
        average: score a response by the mean over its tokens (as the paper does); False: by their sum.
        sft_average: the supervised term takes the mean per token; False: the sum, as the authors do.
        ignore_index, temperature, softcap, inplace_backward: as in `fastalign.token_stats`.

    Raises:
        ValueError: a negative weight or an unknown form.
    """

    def __init__(
        self,
        *,
        sft_weight: float = 0.0,
        form: str = "plackett_luce",
        average: bool = True,
        sft_average: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(ignore_index, temperature, softcap, inplace_backward)
        self.sft_weight = check_range("sft_weight", sft_weight, 0.0)
        lookup("form", FORMS, form)
        self.form, self.average, self.sft_average = form, average, sft_average
        self.fused = FusedLoss(self._formula, lists=True, settings=self._settings)

    def extra_repr(self) -> str:
        return f"form={self.form!r}, sft_weight={self.sft_weight}, average={self.average}"

    def forward(
        self,
        logits: Logits,
        labels: Tensor,
        *,
        rewards: Tensor | None = None,
        mask: Tensor | None = None,
        list_size: int | None = None,
    ) -> PROOutput:
        """PROOutput of the ranked responses.

        Args:
            logits: [B, K, T, V], or [B*K, T, V] with the responses of one prompt next to each other; or a
                `fastalign.Head` or tuple (hidden, weight) in their place.
            labels: [B, K, T] or [B*K, T]: `labels[..., t]` is the target of `logits[..., t, :]`, `ignore_index` at the
                prompt and the padding. A response without a label counts as hidden.
            rewards: [B, K] as in `pro_loss`.
            mask: [B, K] bool as in `pro_loss`; logits and labels of hidden responses are not read.
            list_size: K; needed for [B*K, T, V] where neither `rewards` nor `mask` tells.

        Raises:
            TypeError, ValueError: as `pro_loss` and `fastalign.token_stats` do, and for a K that does not divide B*K.
        """
        shape = _list_shape(logits, labels, rewards, mask, list_size)
        if mask is not None:
            check_mask("mask", mask, shape)
            labels = labels.long().masked_fill(~mask.reshape(labels.shape[:-1]).unsqueeze(-1), self.ignore_index)
        head = known_objective(logits, labels, self.ignore_index)
        if head is not None:
            return self._by_parts(head, labels, rewards, shape)
        return self._of(logits, labels, rewards, shape)

    def _by_parts(self, head: Head, labels: Tensor, rewards: Tensor | None, shape: tuple[int, int]) -> PROOutput:
        """Some lists after the other: see `_parts`."""
        labels, numbers = labels.flatten(0, -2), torch.arange(labels[..., 0].numel(), device=labels.device).view(shape)
        real = (labels.long() != self.ignore_index).any(-1).view(shape)
        above = comparisons(real, None if rewards is None else -rewards)
        lists, pairs = comparable(above).double(), above.flatten(1).sum(-1).double()

        def run(piece: Piece, which: Tensor, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            size = (len(which), shape[1])
            out = self._of(piece, labels[rows], None if rewards is None else rewards[which], size)
            per_list, per_pair = ((x[which].sum() / x.sum().clamp(min=1)).to(out.loss.dtype) for x in (lists, pairs))
            shares = (per_list, per_list, per_list, per_pair, per_list, per_pair, torch.ones_like(per_list))
            return tuple(x * share for x, share in zip(out, shares, strict=True)), out.loss * per_list

        loss, parts = by_parts(flat_head(head), labels, self.ignore_index, numbers, run)
        return PROOutput(loss, *(torch.stack(x).sum(0).detach() for x in list(zip(*parts, strict=True))[1:]))

    def _settings(self) -> tuple[Any, ...]:
        return "pro", self.form, self.average, self.sft_average, self.sft_weight

    def _formula(self, t: Any) -> PROOutput:
        sums, counts = sum_tokens(t.logps), t.mask.sum(-1)
        real = counts > 0
        means = sums / counts.clamp(min=1)
        scores, sft_logps = hide(means if self.average else sums, real), means if self.sft_average else sums
        rewards = None if t.rewards is None else hide(t.rewards, real)
        ranks = t.position if rewards is None else -rewards
        return pro_formula(scores, real, ranks, rewards, hide(sft_logps, real), self.sft_weight, self.form)

    def _of(self, logits: Logits, labels: Tensor, rewards: Tensor | None, shape: tuple[int, int]) -> PROOutput:
        inputs = [Input("rewards", rewards, SEQUENCE)]
        sound = rewards is None or (isinstance(rewards, Tensor) and rewards.shape == shape)
        grouping, found = Grouping(shape[0] * shape[1], shape[1]), None
        if sound and isinstance(logits, Tensor):
            found = self.fused.of_logits(self.call(logits, labels), inputs, grouping, self.inplace_backward)
        if found is None:
            stats = self.stats(logits, labels)
            if sound:
                found = self.fused.of_statistics(stats, labels, inputs, grouping, self.ignore_index)
        if found is not None:
            return PROOutput(*found)
        sums = sum_tokens(stats.logps.flatten(0, -2)).reshape(shape)
        counts = (labels.long() != self.ignore_index).sum(-1).reshape(shape)
        means = sums / counts.clamp(min=1).to(sums.dtype)
        return pro_loss(
            means if self.average else sums,
            rewards=rewards,
            mask=counts > 0,
            sft_weight=self.sft_weight,
            sft_logps=means if self.sft_average else sums,
            form=self.form,
        )


def _list_shape(logits: Any, labels: Any, rewards: Any, mask: Any, list_size: int | None) -> tuple[int, int]:
    """(B, K) of the lists, from the shapes of the arguments."""
    given = check_logits("logits", logits).shape
    check_tensor("labels", labels)
    if len(given) not in (3, 4):
        raise ValueError(f"logits must be [B, K, T, V] or [B*K, T, V]; got shape {list(given)}")
    check_labels(labels, "logits without the vocabulary", given[:-1], "logits", labels.device)
    if len(given) == 4:
        sizes = {int(given[1])}
    else:
        sizes = {int(t.shape[1]) for t in (rewards, mask) if isinstance(t, Tensor) and t.dim() == 2}
    sizes |= set() if list_size is None else {list_size}
    if len(sizes) != 1:
        raise ValueError(
            "list_size must agree with logits, rewards and mask, and is needed where none of them tells; "
            f"got {sorted(sizes) or None}"
        )
    (size,) = sizes
    rows = given[:-2].numel()
    if size < 1 or rows % size:
        raise ValueError(f"list_size must divide the {rows} responses of logits; got {size}")
    return rows // size, size
