"""The policy objectives, one small function each, in one table.

A kind maps what is known of every token to its loss, the ratio that it weighted by and whether that ratio was cut.
Log-ratios arrive with 0 at hidden tokens; what the functions return there is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import hide, masked_mean
from .kl import MAX_LOG_RATIO
from .policy_options import KindOptions


class Terms(NamedTuple):
    """What a policy objective may look at; tensors are [..., T], constants but for `logps` and `log_ratio`."""

    logps: Tensor
    log_ratio: Tensor
    """log pi(a|s) - log pi_old(a|s)."""
    advantages: Tensor
    mask: Tensor
    low: float
    high: float
    """The ratio is cut to [1 - low, 1 + high]."""
    dual_clip: float | None
    old_logps: Any = None
    options: KindOptions = KindOptions()
    importance: Any = None
    """Weights of what a sampler drew, for kinds that put them into their own (`WEIGHS_ITSELF`)."""
    selected: Any = None
    """Above 0 at the tokens that `policy_selection` chose, for kinds that have some chosen."""


class Objective(NamedTuple):
    """Per-token loss, the ratio of new to old policy that was used, and where that ratio was cut."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _nowhere(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def _reinforce(t: Terms) -> Objective:
    """-A log pi (Williams 1992): the policy gradient; the ratio is reported only."""
    return Objective(-t.advantages * t.logps, _ratio(t.log_ratio), _nowhere(t.mask))


def _surrogate(t: Terms) -> Objective:
    """-A rho (Schulman et al. 2015, eq. 14)."""
    ratio = _ratio(t.log_ratio)
    return Objective(-t.advantages * ratio, ratio, _nowhere(t.mask))


def _clip_with(log_ratio: Tensor, t: Terms) -> Objective:
    """max(-A rho, -A clip(rho)) (Schulman et al. 2017, eq. 7), under dual clip at most -c A where A < 0."""
    ratio = _ratio(log_ratio)
    plain = -t.advantages * ratio
    cut = -t.advantages * ratio.clamp(1 - t.low, 1 + t.high)
    loss, clipped = torch.maximum(plain, cut), cut > plain
    if t.dual_clip is not None:
        bound = -t.dual_clip * t.advantages
        over = (t.advantages < 0) & (loss > bound)
        loss, clipped = torch.where(over, bound, loss), clipped | over
    return Objective(loss, ratio, clipped)


def _clip(t: Terms) -> Objective:
    return _clip_with(t.log_ratio, t)


def _sequence_log_ratio(t: Terms) -> Tensor:
    return masked_mean(t.log_ratio, t.mask, dim=-1).unsqueeze(-1).expand_as(t.log_ratio)


def _gspo(t: Terms) -> Objective:
    """Clip on s = exp(mean_t log rho_t), one ratio for all tokens of a sequence (Zheng et al. 2025)."""
    return _clip_with(_sequence_log_ratio(t), t)


def _gspo_token(t: Terms) -> Objective:
    """Clip on sg[s] pi_t / sg[pi_t]: s in value, the token's own gradient (Zheng et al. 2025)."""
    return _clip_with(_sequence_log_ratio(t).detach() + t.logps - t.logps.detach(), t)


def _cispo(t: Terms) -> Objective:
    """-sg[clip(rho)] A log pi (MiniMax 2025, eq. 4): the weight is cut, the token's gradient never lost."""
    ratio = _ratio(t.log_ratio)
    weight = ratio.clamp(1 - t.low, 1 + t.high).detach()
    return Objective(-weight * t.advantages * t.logps, ratio, weight != ratio)


def _sapo(t: Terms) -> Objective:
    """-A f(rho), f(rho) = 4 / tau sigmoid(tau (rho - 1)) (Gao et al. 2025): a gate for a cut, of slope 1 at rho = 1."""
    ratio = _ratio(t.log_ratio)
    tau = _by_sign(t.advantages > 0, t.options.sapo_temperature_pos, t.options.sapo_temperature_neg, t.advantages)
    return Objective(-t.advantages * (torch.sigmoid(tau * (ratio - 1)) * 4 / tau), ratio, _nowhere(t.mask))


def _by_sign(positive: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    return torch.where(positive, torch.full_like(like, one), torch.full_like(like, other))


def _luspo(t: Terms) -> Objective:
    """GSPO's loss times the sequence's length (Liu et al. 2026), which undoes that length's division."""
    found = _gspo(t)
    return found._replace(loss=found.loss * t.mask.sum(-1).to(found.loss.dtype).unsqueeze(-1))


_LEAST_WEIGHT, _MOST_LOG_WEIGHT = math.log(1e-8), 20.0
"""VESPO's own bounds of the logarithm of a sequence's weight; the upper one, and its negative, for each token too."""


def _vespo(t: Terms) -> Objective:
    """-sg[phi(W)] A log pi, phi(W) = e^lambda W^k e^(-lambda W), W = prod_t rho_t (Shen et al. 2026): phi(1) = 1.

    Importance weights of a sampler are factors of W.
    """
    o = t.options
    log_ratio = t.log_ratio.detach().clamp(-_MOST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    total = hide(log_ratio, t.mask).sum(-1)
    if t.importance is not None:
        total = total + hide(t.importance.log().clamp(min=_LEAST_WEIGHT), t.mask).sum(-1)
    total = total.unsqueeze(-1).expand_as(t.log_ratio)
    log_weight = total.clamp(_LEAST_WEIGHT, _MOST_LOG_WEIGHT)
    weight = log_weight.exp()
    gain = t.advantages >= 0
    k = _by_sign(gain, o.vespo_k_pos, o.vespo_k_neg, t.advantages)
    decay = _by_sign(gain, o.vespo_lambda_pos, o.vespo_lambda_neg, t.advantages)
    phi = (decay + k * log_weight - decay * weight).clamp(max=MAX_LOG_RATIO).exp()
    return Objective(-phi * t.advantages * t.logps, weight, total != log_weight)


def _gmpo(t: Terms) -> Objective:
    """-A exp(mean_t of log rho_t, cut to [-low, high] on the side that A pushes to) (Zhao et al. 2025, eq. 4)."""
    gain = t.advantages > 0
    cut = torch.where(gain, t.log_ratio.clamp(max=t.high), t.log_ratio.clamp(min=-t.low))
    ratio = _ratio(masked_mean(cut, t.mask, dim=-1).unsqueeze(-1).expand_as(t.log_ratio))
    clipped = (gain & (t.log_ratio > t.high)) | ((t.advantages < 0) & (t.log_ratio < -t.low))
    return Objective(-t.advantages * ratio, ratio, clipped)


def _within(t: Terms, far: Tensor) -> Objective:
    """-sg[min(rho, cap)] A log pi where the policy has not gone too far, 0 where it has."""
    ratio = _ratio(t.log_ratio)
    weight = ratio.clamp(max=t.options.dppo_ratio_cap).detach()
    return Objective(hide(-weight * t.advantages * t.logps, ~far), ratio, far)


def _dppo_tv(t: Terms) -> Objective:
    """DPPO by total variation of taking the token or not, |pi - pi_old| (Qi et al. 2026), where A pushes further."""
    change = t.logps.detach().exp() - t.old_logps.clamp(max=0).exp()
    return _within(t, torch.where(t.advantages > 0, change > t.high, change < -t.low))


def _dppo_kl(t: Terms) -> Objective:
    """DPPO by the KL of taking the token or not, of pi_old to pi (Qi et al. 2026), where A pushes further."""
    logps, old = t.logps.detach(), t.old_logps.clamp(max=0)
    others = ((1e-8 - torch.expm1(old)) / (1e-8 - torch.expm1(logps))).log()
    kl = old.exp() * (old - logps) - torch.expm1(old) * others
    rose, fell = t.log_ratio > 0, t.log_ratio < 0
    return _within(t, torch.where(t.advantages > 0, (kl > t.high) & rose, (kl > t.low) & fell))


def _dro(t: Terms) -> Objective:
    """-A log pi + beta / 2 (log rho)^2 (Richemond et al. 2024): a square for a cut."""
    loss = -t.advantages * t.logps + 0.5 * t.options.dro_beta * t.log_ratio.square()
    return Objective(loss, _ratio(t.log_ratio), _nowhere(t.mask))


def _clip_cov(t: Terms) -> Objective:
    """PPO-clip without some tokens of large covariance of A and log pi (Cui et al. 2025): these count as cut."""
    found, left_out = _clip(t), t.selected > 0
    return Objective(hide(found.loss, ~left_out), found.ratio, found.clipped | left_out)


def _kl_cov(t: Terms) -> Objective:
    """-A rho, and coef |log rho| more at the tokens of the largest covariance of A and log pi (Cui et al. 2025)."""
    found = _surrogate(t)
    return found._replace(loss=found.loss + hide(t.options.kl_cov_coef * t.log_ratio.abs(), t.selected > 0))


KINDS: dict[str, Callable[[Terms], Objective]] = {
    "reinforce": _reinforce,
    "trpo": _surrogate,
    "penalty": _surrogate,  # plus kl_coef times a KL, which `policy_loss` adds: KL(old, new) unless given a reference
    "clip": _clip,
    "gspo": _gspo,
    "gspo_token": _gspo_token,
    "cispo": _cispo,
    "sapo": _sapo,
    "luspo": _luspo,
    "vespo": _vespo,
    "gmpo": _gmpo,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "dro": _dro,
    "gpg": _reinforce,  # the paper's own is its advantages: see `rl.gpg_advantages`
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
}

WEIGHS_ITSELF = {"vespo"}
"""Kinds that take a sampler's importance weights into a weight of their own."""


def with_penalties(policy: Any, kl: Any, kl_coef: float, entropy: Any, entropy_coef: float) -> Any:
    """policy + kl_coef KL - entropy_coef H, of tokens or of what they were reduced to.

    A term whose weight is 0 is not formed: 0 times an infinite divergence would be NaN.
    """
    total = policy
    if kl_coef != 0.0:
        total = total + kl_coef * kl
    return total if entropy_coef == 0.0 else total - entropy_coef * entropy
