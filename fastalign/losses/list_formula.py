"""Losses on ranked lists: Preference Ranking Optimization (PRO), Plackett-Luce and ListMLE.

Everything here is one formula. With A_k the entries that entry k is ranked above, a list costs

    sum_k log(1 + sum_{i in A_k} exp(z_ki))

`comparisons` says who is in A_k, from the positions or from ranks; z_ki is s_i - s_k, or s_i T_ki - s_k T_k with the
temperatures of PRO. The InfoNCE (one-vs-rest, best-of-K) form keeps the term of the best entry alone. Differences are
taken before the exponential and summed by logsumexp, so scores of 1e4 neither overflow nor lose the gradient, and for
K = 2 the term is -log sigmoid(s_1 - s_2) to the last bit. Memory is O(B K^2), which for K = 64 is nothing.

Ties: entries of equal rank (or equal reward) are not in each other's A, so neither is pushed below the other. Hidden
entries are in no A and have none. A list without a single comparison (no entry, one entry, or all of them tied)
contributes nothing: not to the sum, and not to the number of lists that the mean divides by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import check_float, check_mask, hide, lookup, masked_mean


class ListOutput(NamedTuple):
    """What a loss on ranked lists returns: scalars, all but `loss` without gradient."""

    loss: Tensor
    """Mean over the lists that hold a comparison; 0 if there is none."""
    accuracy: Tensor
    """Share of comparisons (better, worse) in which the better entry has strictly the higher score."""
    top1_accuracy: Tensor
    """Share of lists in which a best entry has strictly the highest score."""
    margin: Tensor
    """Mean over comparisons of the better entry's score minus the worse one's."""
    num_lists: Tensor
    """Number of lists that hold a comparison (int64): the weight of this batch when several are averaged."""


def check_lists(name: str, scores: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """(scores with hidden entries set to 0, mask): both [B, K], the scores in float32 or float64."""
    check_float(name, scores)
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"{name} must be [B, K] with K >= 1; got shape {list(scores.shape)}")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    check_mask("mask", mask, scores.shape, name)
    # Half-precision reward heads: differences of scores near 100 would be rounded to 1/16 in float16.
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return hide(wide, mask), mask


def check_ranks(ranks: Any, shape: torch.Size, like: str) -> Tensor:
    """Raises unless ranks is a numeric tensor of the given shape."""
    if not isinstance(ranks, Tensor):
        raise TypeError(f"ranks must be a torch.Tensor; got {type(ranks).__name__}")
    if ranks.dtype == torch.bool or ranks.is_complex():
        raise TypeError(f"ranks must be an integer or floating-point tensor; got {ranks.dtype}")
    if ranks.shape != shape:
        raise ValueError(f"ranks must have shape {list(shape)}, that of {like}; got {list(ranks.shape)}")
    return ranks.detach()


def comparisons(mask: Tensor, ranks: Tensor | None = None) -> Tensor:
    """[B, K, K] bool, True at [b, k, i] where entry k is ranked above entry i and both are real.

    Lower ranks are better and equal ranks are no comparison; without ranks the list is best first, without ties.
    """
    if ranks is None:
        ranks = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return compared(mask, ranks)


def compared(mask: Tensor, ranks: Tensor) -> Tensor:
    """`comparisons` by given ranks, also of what a formula is traced with."""
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def differences(scores: Tensor) -> Tensor:
    """[B, K, K]: scores[b, i] - scores[b, k] at [b, k, i]."""
    return scores.unsqueeze(1) - scores.unsqueeze(2)


def comparable(above: Tensor) -> Tensor:
    """[B] bool: the lists that hold a comparison."""
    return above.flatten(1).any(-1)


def stage_losses(gaps: Tensor, above: Tensor) -> Tensor:
    """[B, K]: log(1 + sum of exp(gaps[b, k, i]) over the i that k is above); 0 where there is none."""
    active = above.any(-1)
    gaps = gaps.masked_fill(~above, -torch.inf)
    # The softmax of nothing but -inf, logsumexp's gradient, is 0/0: rows that are hidden below stay finite until then.
    gaps = gaps.masked_fill(~active.unsqueeze(-1), 0.0)
    return hide(-F.logsigmoid(-gaps.logsumexp(-1)), active)


def best_entries(mask: Tensor, above: Tensor) -> Tensor:
    """[B, K] bool: the real entries that no other is ranked above; several where they tie."""
    return mask & ~above.any(1)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plackett_luce": lambda stages, best: stages.sum(-1),
    "infonce": lambda stages, best: masked_mean(stages, best, -1),
}
"""Form → what a list costs, [B], given its stages and its best entries, [B, K] each. Tied best entries are averaged."""


def list_metrics(scores: Tensor, mask: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(accuracy, top1_accuracy, margin, num_lists) as in `ListOutput`, without gradient."""
    leads, scores = -differences(scores).detach(), scores.detach()
    best, counted = best_entries(mask, above), comparable(above)
    top = scores.masked_fill(~best, -torch.inf).amax(-1) > scores.masked_fill(best | ~mask, -torch.inf).amax(-1)
    accuracy = masked_mean((leads > 0).to(scores.dtype), above)
    return accuracy, masked_mean(top.to(scores.dtype), counted), masked_mean(leads, above), counted.sum()


def ranked_list_loss(scores: Tensor, mask: Tensor, ranks: Tensor | None, form: str) -> ListOutput:
    """The formula at the top of this file for checked scores and mask, with z_ki = s_i - s_k."""
    above = comparisons(mask, ranks)
    per_list = lookup("form", FORMS, form)(stage_losses(differences(scores), above), best_entries(mask, above))
    return ListOutput(masked_mean(per_list, comparable(above)), *list_metrics(scores, mask, above))
