"""Losses of reward models: Bradley-Terry on pairs, all pairs of a ranking, best-of-K; and where the score is read.

The Plackett-Luce likelihood of a ranking is `plackett_luce_loss`; it takes reward scores as it takes any others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import check_float, check_mask, check_range, hide, masked_mean
from .listwise import (
    ListOutput,
    check_lists,
    check_ranks,
    comparable,
    comparisons,
    differences,
    list_metrics,
    ranked_list_loss,
)


class RewardOutput(NamedTuple):
    """What a loss on pairs of scores returns: scalars, all but `loss` without gradient, over real pairs only."""

    loss: Tensor
    accuracy: Tensor
    """Share of pairs in which the better one has strictly the higher score."""
    margin: Tensor
    """Mean over pairs of the better score minus the worse."""
    mean_reward: Tensor
    """Mean score of the entries that take part in a pair."""


def _bradley_terry(gaps: Tensor) -> Tensor:
    """-log sigmoid(better - worse): Bradley and Terry 1952."""
    return -F.logsigmoid(gaps)


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coefficient: float = 0.0,
    mask: Tensor | None = None,
) -> RewardOutput:
    """Bradley-Terry loss of a reward model, the mean over pairs of

        -log sigmoid(r_w - r_l - margin) + center_coefficient * (r_w + r_l)^2.

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1 for K = 2; the margin of Touvron et al. 2023 (arXiv:2307.09288), eq. 2;
    the centring term of Eisenstein et al. 2023 (arXiv:2312.09244), which keeps the scores, known only up to a constant
    per prompt, near 0.

    Args:
        chosen, rejected: floating point, any one shape, usually [B]: the scores. Half precision is computed in float32.
        margin: a number, or a tensor of that shape: how much better the chosen one was judged. Metrics leave it out.
        center_coefficient: at least 0.
        mask: bool of that shape, True = real pair; hidden pairs may hold anything.

    Returns:
        RewardOutput; zeros where there is no real pair.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, a negative coefficient.
    """
    check_float("chosen", chosen)
    check_float("rejected", rejected, chosen.shape, "chosen")
    check_range("center_coefficient", center_coefficient, 0.0)
    if mask is None:
        mask = torch.ones_like(chosen, dtype=torch.bool)
    check_mask("mask", mask, chosen.shape, "chosen")
    dtype = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    better, worse = hide(chosen.to(dtype), mask), hide(rejected.to(dtype), mask)
    gaps = better - worse
    shifted = gaps if margin is None else gaps - _margin(margin, mask, dtype)
    loss = masked_mean(_bradley_terry(shifted), mask)
    if center_coefficient:
        loss = loss + center_coefficient * masked_mean((better + worse).square(), mask)
    gaps = gaps.detach()
    accuracy = masked_mean((gaps > 0).to(dtype), mask)
    return RewardOutput(loss, accuracy, masked_mean(gaps, mask), masked_mean((better + worse).detach() / 2, mask))


def _margin(margin: Any, mask: Tensor, dtype: torch.dtype) -> Tensor | float:
    if isinstance(margin, Tensor):
        return hide(check_float("margin", margin, mask.shape, "chosen").to(dtype), mask)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        raise TypeError(f"margin must be None, a number or a torch.Tensor; got {type(margin).__name__}")
    return check_range("margin", float(margin), float("-inf"))


def kwise_reward_loss(
    scores: Tensor, *, ranks: Tensor | None = None, mask: Tensor | None = None, center_coefficient: float = 0.0
) -> RewardOutput:
    """All pairs of a ranking at once: the mean over prompts of 1/C(K, 2) sum_{w above l} -log sigmoid(r_w - r_l).

    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. All pairs of a prompt share one batch element, so each completion is
    scored by one forward pass, and a prompt weighs the same however many completions it has. Ties are no pairs: they
    are left out of the sum and of the count, which is C(K, 2) where there are none. A prompt without a pair contributes
    nothing, not to the number of prompts either.

    Args:
        scores: [B, K], floating point, best first unless `ranks` are given. Half precision is computed in float32.
        ranks: [B, K], integer or floating point, lower is better (0 is best); equal ranks are ties.
        mask: [B, K] bool, True = real. Lists may differ in length; hidden entries may stand anywhere and hold anything.
        center_coefficient: at least 0: weight of (r_w + r_l)^2 beside each pair's loss, as in `reward_loss`.

    Returns:
        RewardOutput, whose metrics average over all pairs of the batch.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    scores, mask = check_lists("scores", scores, mask)
    above = comparisons(mask, None if ranks is None else check_ranks(ranks, scores.shape, "scores"))
    check_range("center_coefficient", center_coefficient, 0.0)
    per_pair = _bradley_terry(-differences(scores))
    if center_coefficient:
        per_pair = per_pair + center_coefficient * (scores.unsqueeze(1) + scores.unsqueeze(2)).square()
    per_prompt = masked_mean(per_pair, above, (1, 2))
    accuracy, _, margin, _ = list_metrics(scores, mask, above)
    paired = above.any(1) | above.any(2)
    return RewardOutput(
        masked_mean(per_prompt, comparable(above)), accuracy, margin, masked_mean(scores.detach(), paired)
    )


def best_of_k_loss(scores: Tensor, *, best: Tensor | None = None, mask: Tensor | None = None) -> ListOutput:
    """Softmax over the list: -log(e^{r_best} / sum_i e^{r_i}), where only the best of K completions is known.

    The first factor of the Plackett-Luce likelihood (Luce 1959, choice axiom); for K = 2 it is Bradley-Terry.

    Args:
        scores: [B, K], floating point. Half precision is computed in float32.
        best: [B], int64 or int32: position of the best completion. None: the first real one.
        mask: [B, K] bool, True = real. Lists may differ in length; hidden entries may stand anywhere and hold anything.

    Returns:
        ListOutput, whose comparisons are those of the best completion with each other one. Lists of fewer than two
        real entries contribute nothing.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape; a `best` that is out of range or hidden, in a list that has a real entry (checked on
            CPU; elsewhere such a list contributes nothing).
    """
    scores, mask = check_lists("scores", scores, mask)
    others = ~_first(mask) if best is None else ~_one_hot(best, scores, mask)
    return ranked_list_loss(scores, mask, others.long(), "infonce")


def _first(mask: Tensor) -> Tensor:
    """[B, K] bool: the first real entry of each list."""
    return mask & (mask.cumsum(-1) == 1)


def _one_hot(best: Any, scores: Tensor, mask: Tensor) -> Tensor:
    """[B, K] bool: the entry that `best` points at."""
    if not isinstance(best, Tensor) or best.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"best must be an int64 or int32 tensor; got {getattr(best, 'dtype', type(best).__name__)}")
    if best.shape != scores.shape[:1]:
        raise ValueError(f"best must have shape {list(scores.shape[:1])}, one per list; got {list(best.shape)}")
    chosen = torch.arange(scores.shape[1], device=scores.device) == best.unsqueeze(-1)
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = mask.any(-1) & ~(mask & chosen).any(-1)
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"best must point at a real entry of its list; got {int(best[at])} for list {at}")
    return chosen


def last_token_scores(token_scores: Tensor, mask: Tensor) -> Tensor:
    """The score at each row's last real token, [...], whatever the padding side, its amount and its token.

    Args:
        token_scores: [..., T], floating point, T >= 1: the reward head at every position.
        mask: [..., T] bool, True = real; what it hides may hold anything and gets no gradient.

    Returns:
        [...], in the dtype of `token_scores`. A row without a real token has the score 0 and no gradient; it is the
        filler of a ragged list, and the losses' own mask is to hide it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """
    check_float("token_scores", token_scores)
    if token_scores.dim() == 0 or token_scores.shape[-1] == 0:
        raise ValueError(f"token_scores must be [..., T] with T >= 1; got shape {list(token_scores.shape)}")
    check_mask("mask", mask, token_scores.shape, "token_scores")
    last = (torch.arange(mask.shape[-1], device=mask.device) * mask).amax(-1, keepdim=True)
    return hide(token_scores.gather(-1, last).squeeze(-1), mask.any(-1))
