"""The policy objectives, one small function each, in one table.

A kind maps what is known of every token to its loss, the ratio that it weighted by and whether that ratio was cut.
Log-ratios arrive with 0 at hidden tokens; what the functions return there is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import masked_mean
from .kl import MAX_LOG_RATIO


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


KINDS: dict[str, Callable[[Terms], Objective]] = {
    "reinforce": _reinforce,
    "trpo": _surrogate,
    "penalty": _surrogate,  # plus kl_coef times a KL, which `policy_loss` adds: KL(old, new) unless given a reference
    "clip": _clip,
    "gspo": _gspo,
    "gspo_token": _gspo_token,
    "cispo": _cispo,
}


def with_penalties(policy: Any, kl: Any, kl_coef: float, entropy: Any, entropy_coef: float) -> Any:
    """policy + kl_coef KL - entropy_coef H, of tokens or of what they were reduced to.

    A term whose weight is 0 is not formed: 0 times an infinite divergence would be NaN.
    """
    total = policy
    if kl_coef != 0.0:
        total = total + kl_coef * kl
    return total if entropy_coef == 0.0 else total - entropy_coef * entropy
