"""The table of pairwise preference losses: one small function each, from the two sides of every pair to [B] losses.

`pairs` has the notation of the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import check_range, lookup
from .pairs import F_DIVERGENCES, NLL_NORMALIZATIONS, Pairs, alpha_score, with_nll


# --------------------------------------------------------------------------------------------------- the loss functions
def _smoothed(logit: Tensor, smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    if smoothing in (0.0, 1.0):  # the other term is not formed: 0 * inf is NaN
        return -F.logsigmoid(-logit if smoothing else logit)
    return (smoothing - 1) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)


def _sigmoid(p: Pairs) -> Tensor:
    """DPO, -log sigmoid(z): Rafailov et al. 2023, eq. 7. With label smoothing e it is conservative DPO (Mitchell 2023,
    "A note on DPO with noisy preferences and relationship to IPO"): -(1 - e) log sigmoid(z) - e log sigmoid(-z)."""
    return _smoothed(p.logit, p.options.label_smoothing)


def _robust(p: Pairs) -> Tensor:
    """Robust DPO, [-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2e), unbiased under label flips of probability
    e < 0.5: Chowdhury et al. 2024, arXiv 2403.00409."""
    e, z = p.options.label_smoothing, p.logit
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e) if e else -F.logsigmoid(z)


def _hinge(p: Pairs) -> Tensor:
    """SLiC's hinge on the DPO logit, max(0, 1 - z): Zhao et al. 2023, normalised by Liu et al. 2024 (RSO)."""
    return torch.relu(1 - p.logit)


def _ipo(p: Pairs) -> Tensor:
    """IPO on summed log-probabilities, (s_w - s_l - 1/(2 beta))^2: Azar et al. 2023, eq. 17 (beta is their tau)."""
    return (p.chosen.score - p.rejected.score - 0.5 / p.options.beta).square()


def _ipo_avg(p: Pairs) -> Tensor:
    """IPO on per-token averages, (s_w/|y_w| - s_l/|y_l| - 1/(2 beta))^2: Azar et al. 2023, eq. 17, normalised as its
    authors ran it; TRL calls this one `ipo`."""
    return (p.chosen.mean_score - p.rejected.mean_score - 0.5 / p.options.beta).square()


def _exo_pair(p: Pairs) -> Tensor:
    """EXO for two responses, KL(sigmoid(z) || 1 - e) between Bernoulli distributions: Ji et al. 2024, eq. 16; the label
    smoothing e must be above 0 (the paper takes 1e-3)."""
    e, z = p.options.label_smoothing, p.logit
    won, lost = F.logsigmoid(z), F.logsigmoid(-z)
    return won.exp() * (won - math.log1p(-e)) + lost.exp() * (lost - math.log(e))


def _discopop(p: Pairs) -> Tensor:
    """DiscoPOP's log-ratio modulated loss, (1 - m) (-log sigmoid(z)) + m exp(-z) with m = sigmoid(z / tau): Lu et al.
    2024, eq. 5. The product m exp(-z) is formed in the log domain, where it cannot overflow for tau <= 1."""
    z, tau = p.logit, p.options.discopop_tau
    return torch.sigmoid(-z / tau) * -F.logsigmoid(z) + torch.exp(F.logsigmoid(z / tau) - z)


def _rpo(p: Pairs) -> Tensor:
    """NLL-regularised DPO, -log sigmoid(z) + nll_weight NLL(y_w): Pang et al. 2024 ("Iterative reasoning preference
    optimization") with `nll_normalization="sequence"`."""
    return with_nll(_smoothed(p.logit, p.options.label_smoothing), p)


def _dpop(p: Pairs) -> Tensor:
    """DPO-Positive, -log sigmoid(z - beta lambda max(0, -h_w)): Pal et al. 2024 ("Smaug"); lambda = 50 there."""
    by = p.options.dpop_lambda
    logit = p.logit - p.options.beta * by * torch.relu(-p.chosen.ratio) if by else p.logit
    return _smoothed(logit, p.options.label_smoothing)


def _sppo(p: Pairs) -> Tensor:
    """SPPO, win probabilities 1 and 0: (h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2 (Wu et al. 2024, eq. 4.7)."""
    half = 0.5 / p.options.beta
    return (p.chosen.ratio - half).square() + (p.rejected.ratio + half).square()


def _nca_pair(p: Pairs) -> Tensor:
    """NCA for two responses, -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2: Chen et al. 2024,
    arXiv 2402.05369, its pairwise form."""
    won, lost = p.rewards
    return -F.logsigmoid(won) - 0.5 * (F.logsigmoid(-won) + F.logsigmoid(-lost))


def _bco_pair(p: Pairs) -> Tensor:
    """BCO on pairs, -log sigmoid(r_w) - log sigmoid(-r_l): Jung et al. 2024, arXiv 2404.04656; delta = 0 there."""
    won, lost = p.rewards
    return -F.logsigmoid(won) - F.logsigmoid(-lost)


def _apo_zero(p: Pairs) -> Tensor:
    """APO-zero, sigmoid(-r_w) + sigmoid(r_l): D'Oosterlinck et al. 2024, eq. 7 (plus 1, so that it is positive)."""
    won, lost = p.rewards
    return torch.sigmoid(-won) + torch.sigmoid(lost)


def _apo_down(p: Pairs) -> Tensor:
    """APO-down, sigmoid(r_w) + sigmoid(-(r_w - r_l)): D'Oosterlinck et al. 2024, eq. 8 (plus 1)."""
    won, lost = p.rewards
    return torch.sigmoid(won) + torch.sigmoid(lost - won)


def _aot(p: Pairs) -> Tensor:
    """AOT, paired: -log sigmoid(beta (u_(i) - v_(i))) over the order statistics of the policy's margins
    u = log pi(y_w) - log pi(y_l) and the reference's v: Melnyk et al. 2024, arXiv 2406.05882. Couples the batch."""
    policy, reference = p.chosen.logps - p.rejected.logps, p.chosen.ref_logps - p.rejected.ref_logps
    gap = policy.sort(0).values - reference.sort(0).values
    return _smoothed(p.options.beta * gap, p.options.label_smoothing)


def _aot_unpaired(p: Pairs) -> Tensor:
    """AOT, unpaired: -log sigmoid(beta (h_w(i) - h_l(i))) over the order statistics of both sides: Melnyk et al. 2024,
    arXiv 2406.05882. Couples the batch."""
    gap = p.chosen.ratio.sort(0).values - p.rejected.ratio.sort(0).values
    return _smoothed(p.options.beta * gap, p.options.label_smoothing)


def _simpo(p: Pairs) -> Tensor:
    """SimPO, -log sigmoid(beta/|y_w| log pi(y_w) - beta/|y_l| log pi(y_l) - gamma): Meng et al. 2024 (there beta
    is 2 to 2.5 and gamma 0.5 to 1.6). No reference."""
    z = p.options.beta * (p.chosen.mean - p.rejected.mean) - p.options.simpo_gamma
    return _smoothed(z, p.options.label_smoothing)


def _sigmoid_norm(p: Pairs) -> Tensor:
    """Length-normalised DPO, -log sigmoid(beta (s_w/|y_w| - s_l/|y_l|)): Lambert et al. 2024 (Tulu 3), sec. 5.1; TRL's
    name of `sigmoid` with `average`."""
    return _smoothed(p.options.beta * (p.chosen.mean_score - p.rejected.mean_score), p.options.label_smoothing)


def _alphapo(p: Pairs) -> Tensor:
    """AlphaPO, SimPO with the reward beta (1 - P^-alpha) / alpha of P = exp(log pi(y) / |y|): Gupta et al. 2025,
    arXiv 2501.03884; alpha = 0 is SimPO. No reference."""
    won, lost = (alpha_score(side.mean, p.options.alphapo_alpha) for side in (p.chosen, p.rejected))
    return _smoothed(p.options.beta * (won - lost) - p.options.simpo_gamma, p.options.label_smoothing)


def _cpo(p: Pairs) -> Tensor:
    """CPO, -log sigmoid(beta log pi(y_w) - beta log pi(y_l)) + nll_weight NLL(y_w): Xu et al. 2024, eq. 3 (their
    NLL is `nll_normalization="sum"`). No reference."""
    z = p.options.beta * (p.chosen.logps - p.rejected.logps)
    return with_nll(_smoothed(z, p.options.label_smoothing), p)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(mean_logps); a P that rounds to 1 counts as the largest number below 1."""
    logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    # log(1 - exp(x)): each form is accurate where the other cancels (Maechler 2012)
    near_one = torch.log(-torch.expm1(logps.clamp(min=-math.log(2))))
    return logps - torch.where(logps > -math.log(2), near_one, torch.log1p(-torch.exp(logps.clamp(max=-math.log(2)))))


def _orpo(p: Pairs) -> Tensor:
    """ORPO, nll_weight NLL(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l)), where odds(y) = P / (1 - P) and
    P = exp(log pi(y) / |y|): Hong et al. 2024, eq. 7 (beta is their lambda). No reference."""
    return with_nll(-p.options.beta * F.logsigmoid(_log_odds(p.chosen.mean) - _log_odds(p.rejected.mean)), p)


def _sft(p: Pairs) -> Tensor:
    """NLL of the chosen responses times nll_weight, for weighted sums as MPO's (Wang et al. 2024, arXiv 2411.10442)."""
    return with_nll(torch.zeros_like(p.chosen.total), p)


# ------------------------------------------------------------------------------------------------------------ the table
@dataclass(frozen=True)
class Variant:
    """A row of the table: the function, the options it honours, whether it needs lengths, its implicit rewards, and
    whether a pair's loss depends on other pairs."""

    losses: Callable[[Pairs], Tensor]
    honours: frozenset[str]
    lengths: bool = False
    nll: bool = False
    rewards_per_token: bool = False
    couples: bool = False


def _row(losses: Callable[[Pairs], Tensor], honours: str, **flags: bool) -> Variant:
    return Variant(losses, frozenset(honours.split()), **flags)


_DELTA = "reference f_divergence"
_LOGIT = f"{_DELTA} length_alpha"
_SMOOTH = "label_smoothing"
PAIRWISE: dict[str, Variant] = {
    "sigmoid": _row(_sigmoid, f"{_LOGIT} {_SMOOTH}"),
    "robust": _row(_robust, f"{_LOGIT} {_SMOOTH}"),
    "hinge": _row(_hinge, _LOGIT),
    "ipo": _row(_ipo, _DELTA),
    "ipo_avg": _row(_ipo_avg, _DELTA, lengths=True),
    "exo_pair": _row(_exo_pair, f"{_LOGIT} {_SMOOTH}"),
    "discopop": _row(_discopop, _LOGIT),
    "rpo": _row(_rpo, f"{_LOGIT} {_SMOOTH}", nll=True),
    "dpop": _row(_dpop, f"{_LOGIT} {_SMOOTH}"),
    "sppo": _row(_sppo, "reference"),
    "nca_pair": _row(_nca_pair, "reference"),
    "bco_pair": _row(_bco_pair, "reference"),
    "apo_zero": _row(_apo_zero, "reference"),
    "apo_down": _row(_apo_down, "reference"),
    "aot": _row(_aot, f"reference {_SMOOTH}", couples=True),
    "aot_unpaired": _row(_aot_unpaired, f"reference {_SMOOTH}", couples=True),
    "sigmoid_norm": _row(_sigmoid_norm, f"{_DELTA} {_SMOOTH}", lengths=True),
    "alphapo": _row(_alphapo, _SMOOTH, lengths=True, rewards_per_token=True),
    "simpo": _row(_simpo, _SMOOTH, lengths=True, rewards_per_token=True),
    "cpo": _row(_cpo, _SMOOTH, nll=True),
    "orpo": _row(_orpo, "", lengths=True, nll=True, rewards_per_token=True),
    "sft": _row(_sft, "", nll=True),
}
"""Every pairwise loss: `loss_type` of `dpo_loss` and `DPOLoss`."""

ALIASES = {"sppo_hard": "sppo", "aot_pair": "aot"}
"""Other libraries' names of rows of the table."""

_UNPAIRED = "is of single completions, not of pairs: `fastalign kto` trains it, KTOLoss is it"
_ELSEWHERE = {
    **dict.fromkeys(("kto", "kto_pair", "apo_zero_unpaired"), _UNPAIRED),
    "bco": "is of single completions, and not among ours; bco_pair is its form for pairs",
    "tpo-l": "is of triples, with a gold completion of each prompt: `fastalign tpo` trains it, TPOLoss is it",
}
"""Names by which other libraries know a loss that is none of the table's, and what there is instead."""


# -------------------------------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class PairwiseOptions:
    """What `dpo_loss` documents as options, checked once."""

    loss_type: str | Sequence[str] | Mapping[str, float] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_alpha: float = 0.0
    average: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    nll_weight: float = 1.0
    nll_normalization: str = "token"
    dpop_lambda: float = 50.0
    discopop_tau: float = 0.05
    variants: tuple[tuple[Variant, float], ...] = field(init=False, repr=False)
    needs_lengths: bool = field(init=False, repr=False)
    """Whether these losses need the number of tokens of each completion."""
    uses_reference: bool = field(init=False, repr=False)
    key: tuple[Any, ...] = field(init=False, repr=False, compare=False)  # all that the losses depend on

    def __post_init__(self) -> None:
        weights = _weights(self.loss_type)
        object.__setattr__(self, "variants", tuple((PAIRWISE[name], weight) for name, weight in weights.items()))
        check_range("beta", self.beta, 0.0, open_low=True)
        check_range("label_smoothing", self.label_smoothing, 0.0, 1.0)
        check_range("length_alpha", self.length_alpha, -math.inf)
        check_range("f_alpha", self.f_alpha, 0.0, 1.0)
        check_range("simpo_gamma", self.simpo_gamma, -math.inf)
        check_range("alphapo_alpha", self.alphapo_alpha, -math.inf)
        check_range("nll_weight", self.nll_weight, 0.0)
        check_range("dpop_lambda", self.dpop_lambda, 0.0)
        check_range("discopop_tau", self.discopop_tau, 0.0, 1.0, open_low=True)
        lookup("f_divergence", F_DIVERGENCES, self.f_divergence)
        lookup("nll_normalization", NLL_NORMALIZATIONS, self.nll_normalization)
        if "robust" in weights and not self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be below 0.5 for loss_type 'robust'; got {self.label_smoothing}")
        if "exo_pair" in weights and not 0.0 < self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in (0, 1) for loss_type 'exo_pair'; got {self.label_smoothing}")
        self._no_option_in_vain()
        object.__setattr__(self, "needs_lengths", self._looks_at_lengths())
        object.__setattr__(self, "uses_reference", self.honours("reference"))
        rest = (getattr(self, f.name) for f in fields(self) if f.init and f.name != "loss_type")
        object.__setattr__(self, "key", (*weights.items(), *rest))

    def _no_option_in_vain(self) -> None:
        """An option that no selected loss honours would be dropped silently: it raises."""
        for name, default in (("label_smoothing", 0.0), ("length_alpha", 0.0), ("f_divergence", "reverse_kl")):
            value = getattr(self, name)
            if value != default and not self.honours(name):
                able = ", ".join(kind for kind, variant in PAIRWISE.items() if name in variant.honours)
                raise ValueError(
                    f"{name} has no effect on loss_type {self.loss_type!r} (only on {able}); got {name}={value!r}"
                )

    def honours(self, name: str) -> bool:
        """Whether any of the selected losses makes use of the named option."""
        return any(name in variant.honours for variant, _ in self.variants)

    def _looks_at_lengths(self) -> bool:
        nll = self.nll_normalization != "sum" and any(variant.nll for variant, _ in self.variants)
        return self.average or self.length_alpha != 0.0 or nll or any(variant.lengths for variant, _ in self.variants)

    @property
    def by_pairs(self) -> bool:
        """Whether the loss is a mean of what each pair has by itself."""
        per_token = self.nll_normalization == "token"  # over all pairs' tokens
        return not any(variant.couples or (variant.nll and per_token) for variant, _ in self.variants)


def _weights(loss_type: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """{name: weight} of one name, of several (weight 1 each), or of a mapping."""
    if isinstance(loss_type, str):
        loss_type = (loss_type,)
    if not isinstance(loss_type, Mapping):
        if len(set(loss_type)) != len(loss_type):
            raise ValueError(f"loss_type must name each loss once (weights go in a mapping); got {loss_type!r}")
        loss_type = dict.fromkeys(loss_type, 1.0)
    if not loss_type:
        raise ValueError("loss_type must name at least one loss; got none")
    for name, weight in loss_type.items():
        if name in _ELSEWHERE:
            raise ValueError(f"loss_type {name!r} {_ELSEWHERE[name]}")
        lookup("loss_type", PAIRWISE, ALIASES.get(name, name))
        check_range(f"the weight of loss_type {name!r}", weight, -math.inf)
    return {ALIASES.get(name, name): float(weight) for name, weight in loss_type.items()}
