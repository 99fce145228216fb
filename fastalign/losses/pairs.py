"""What pairwise losses are made of: both sides of every pair, f-divergences, and the NLL of the chosen responses.

Notation of the docstrings: w is the chosen response and l the rejected one, h = log pi(y|x) - log pi_ref(y|x) (without
a reference h = log pi), s = f'(pi / pi_ref) the score of h under the chosen f-divergence (s = h for the reverse KL),
r = beta h, |y| the number of completion tokens, and z the pairwise logit beta (s_w - s_l) + alpha (|y_w| - |y_l|).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import count_of

if TYPE_CHECKING:
    from .pairwise import PairwiseOptions

_EXP_LIMIT = 30.0  # Above it exp continues along its tangent: gradients stay finite and non-zero where exp would
# overflow, and with |h| up to 1e4 even the square of such a score (1e34) still is a float32.


# ------------------------------------------------------------------------------------------------- what a loss is given
class Side(NamedTuple):
    """One side of every pair, [B] each: the chosen or the rejected responses."""

    total: Tensor
    """Summed log-probability under the policy, as the caller gave it."""
    logps: Tensor
    """log pi: the sum, or under `average` the per-token mean."""
    ref_logps: Tensor
    """log pi_ref, likewise; zeros without a reference."""
    lengths: Tensor | None
    """|y|, at least 1."""
    score: Tensor
    """s = f'(pi / pi_ref); h itself for the reverse KL."""
    averaged: bool

    @property
    def ratio(self) -> Tensor:
        """h = log pi - log pi_ref."""
        return self.logps - self.ref_logps

    @property
    def mean(self) -> Tensor:
        """Mean log-probability of a token under the policy."""
        return self.total / _required(self.lengths)

    @property
    def mean_score(self) -> Tensor:
        """s / |y|."""
        return self.score if self.averaged else self.score / _required(self.lengths)


class Pairs(NamedTuple):
    """A batch of pairs as the functions of the table see it."""

    chosen: Side
    rejected: Side
    options: PairwiseOptions
    nll: Side | None = None
    """What the NLL is of, where that is not the chosen responses' own tokens."""

    @property
    def logit(self) -> Tensor:
        """z = beta (s_w - s_l) + alpha (|y_w| - |y_l|); `losses.preference.dpo_loss` derives the sign of alpha."""
        logit = self.options.beta * (self.chosen.score - self.rejected.score)
        if self.options.length_alpha == 0.0:
            return logit
        gap = _required(self.chosen.lengths) - _required(self.rejected.lengths)
        return logit + self.options.length_alpha * gap

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """r_w and r_l."""
        return self.options.beta * self.chosen.ratio, self.options.beta * self.rejected.ratio


def _required(lengths: Tensor | None) -> Tensor:
    if lengths is None:  # `PairwiseOptions.needs_lengths` is checked before any function runs
        raise ValueError("chosen_lengths and rejected_lengths are needed here; got None")
    return lengths


# -------------------------------------------------------------------------------------------------------- f-divergences
def _expm1(x: Tensor) -> Tensor:
    tangent = math.expm1(_EXP_LIMIT) + (x - _EXP_LIMIT) * math.exp(_EXP_LIMIT)
    return torch.where(x < _EXP_LIMIT, torch.expm1(x.clamp(max=_EXP_LIMIT)), tangent)


def alpha_score(h: Tensor, alpha: float) -> Tensor:
    return h if alpha == 0.0 else -_expm1(-alpha * h) / alpha


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda h, alpha: h,
    "forward_kl": lambda h, alpha: alpha_score(h, 1.0),
    "js_divergence": lambda h, alpha: math.log(2) + F.logsigmoid(h),
    "alpha_divergence": alpha_score,
}
"""f'(u) at u = pi / pi_ref = exp(h), Wang et al. 2024 ("Beyond Reverse KL"): log u; 1 - 1/u;
log(2u / (1 + u)); (1 - u^-alpha) / alpha, which is the reverse KL at alpha = 0 and the forward KL at alpha = 1."""


# ------------------------------------------------------------------------------------------------------------ NLL terms
NLL_NORMALIZATIONS: dict[str, Callable[[Side], Tensor]] = {
    "token": lambda w: -w.total * (count_of(w.total) / _required(w.lengths).sum()),
    "sequence": lambda w: -w.mean,
    "sum": lambda w: -w.total,
}
"""[B] terms whose mean is the chosen responses' NLL: over all tokens, of per-sequence means, of per-sequence sums."""


def nll_of(p: Pairs) -> Tensor:
    """[B] terms of the NLL."""
    return NLL_NORMALIZATIONS[p.options.nll_normalization](p.chosen if p.nll is None else p.nll)


def with_nll(loss: Tensor, p: Pairs) -> Tensor:
    """The loss and the weighted NLL of the chosen responses; of weight 0 it is not formed: 0 * inf is NaN."""
    weight = p.options.nll_weight
    return loss + weight * nll_of(p) if weight else loss
