"""Distances between policies at the tokens they sampled: KL estimators and importance weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .base import check_float, check_mask, check_range, hide, lookup, masked_mean, resolve
from .reductions import as_real, normalize_real

MAX_LOG_RATIO = 60.0
"""Bound of every exponent of a log-ratio: e^60 is finite in float32, with room for an advantage. Beyond it one odd
token would make a loss infinite, and inf * 0 turn a clipped one into NaN."""


def _k1(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1((-log_ratio).clamp(max=MAX_LOG_RATIO)) + log_ratio


def _k3_plus(log_ratio: Tensor) -> Tensor:
    """k3 in value, k2 in gradient."""
    as_loss = _k2(log_ratio)
    return as_loss - as_loss.detach() + _k3(log_ratio).detach()


def _k3_clamped(log_ratio: Tensor) -> Tensor:
    return _k3(log_ratio.clamp(-20.0, 20.0)).clamp(max=10.0)


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": _k1,
    "k2": _k2,
    "k3": _k3,
    "k3+": _k3_plus,
    "k3_clamped": _k3_clamped,
    "abs": torch.abs,
}
KL_ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "low_var_kl+": "k3+", "full": "exact"}
"""verl's spelling → ours."""


def estimator_name(argument: str, name: str) -> str:
    """Our name of an estimator that is used as a loss or in a reward; ValueError for what is none."""
    return resolve(argument, {**KL_ESTIMATORS, "exact": None}, KL_ALIASES, name)


def kl_estimate(logps: Tensor, ref_logps: Tensor, *, kind: str = "k1") -> Tensor:
    """Per-token estimates of KL(pi, pi_ref) from tokens that pi sampled, elementwise (Schulman 2020).

    With d = logps - ref_logps: `k1` = d (unbiased, of either sign), `k2` = d^2 / 2 (biased, low variance),
    `k3` = exp(-d) - 1 + d (unbiased, never negative; the exponent is at most 60), `k3+` = k3 with the gradient of k2.
    Bounded ones, for losses that one odd token shall not rule: `k3_clamped` = min(k3(d), 10) with d in [-20, 20], and
    no gradient beyond these; `abs` = |d|, whose gradient is a sign (verl's `low_var_kl` and `abs`).

    Unbiased in value is not unbiased in gradient. Differentiated as a loss over pi's samples, k1 has gradient
    E[grad log pi] = 0: it regularises nothing, and belongs in the reward. k2 has the gradient of KL(pi, pi_ref), k3
    that of KL(pi_ref, pi); so k3+ is right in both, as the exact per-token KL (`token_stats(..., kl=True)`) is.

    Args:
        logps, ref_logps: log-probabilities of any one shape, floating point.
        kind: "k1", "k2", "k3", "k3+", "k3_clamped" or "abs"; "kl", "mse", "low_var_kl" and "low_var_kl+" are k1, k2, k3
            and k3+.

    Returns:
        Estimates of that shape, in nats.

    Raises:
        ValueError: an unknown kind, or shapes that differ.
        TypeError: not a floating-point tensor.
    """
    estimator = KL_ESTIMATORS[resolve("kind", KL_ESTIMATORS, KL_ALIASES, kind)]
    check_float("logps", logps)
    check_float("ref_logps", ref_logps, logps.shape, "logps")
    return estimator(logps - ref_logps)


def token_kl(
    logps: Tensor, ref_logps: Tensor | None, kl: Tensor | None, kl_estimator: str, mask: Tensor
) -> Tensor | None:
    """Per-token KL by estimator name, 0 where hidden; `exact` takes the given `kl`. None with nothing to compare with.

    The reference is a constant.
    """
    kl_estimator = estimator_name("kl_estimator", kl_estimator)
    if (kl is not None) != (kl_estimator == "exact"):
        got = f"kl_estimator={kl_estimator!r} {'with' if kl is not None else 'without'} kl"
        raise ValueError(f"kl, the exact KL of each token, goes with kl_estimator='exact' and with no other; got {got}")
    if kl is not None:
        return as_real(check_float("kl", kl, mask.shape, "logps"), mask)
    if ref_logps is None:
        return None
    ref = as_real(check_float("ref_logps", ref_logps, mask.shape, "logps"), mask).detach()
    return kl_estimate(as_real(logps, mask), ref, kind=kl_estimator)


class Weighting(NamedTuple):
    """How importance weights are made: see `importance_weights`."""

    level: str = "token"
    cap: float | None = 2.0
    mode: str = "truncate"
    floor: float | None = None
    normalize: bool = False


def importance_weights(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    cap: float | None = 2.0,
    mode: str = "truncate",
    floor: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """Importance weights pi / pi_sampler within [floor, cap], for tokens that another policy or engine sampled.

    An inference engine's log-probabilities differ from the trainer's in precision and sampling options; weighting the
    loss by the ratio of the two corrects for it. What lies outside is moved to the nearer bound ("truncate", TIS: Yao
    et al. 2025; Ionides 2008), or has weight 0 ("mask", by sequences MIS: Liu et al. 2025, "When speed kills
    stability"; by tokens IcePop: Shen et al. 2025, arXiv:2510.18855).

    Args:
        logps: [..., T], log-probabilities by the trainer of the policy that was sampled: the old ones.
        sampler_logps: [..., T], those that the sampler reported.
        mask: [..., T], boolean.
        level: "token" for each token's own ratio, "sequence" for their product over the sequence, "geometric" for
            their geometric mean over it.
        cap: upper bound of a weight; None for none but e^60.
        mode: "truncate" or "mask".
        floor: lower bound of a weight; None for none.
        normalize: divide by the weights' mean, over tokens, or over sequences where each of them has one weight.

    Returns:
        [..., T], detached; without meaning at hidden tokens.

    Raises:
        TypeError: not a floating-point tensor, a mask that is not boolean.
        ValueError: shapes that differ, an unknown name, a bound below 0, a floor above the cap.
    """
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_float("sampler_logps", sampler_logps, logps.shape, "logps")
    how = Weighting(level, cap, mode, floor, normalize)
    check_weighting(how)
    return importance_ratio((as_real(logps, mask) - as_real(sampler_logps, mask)).detach(), mask, how)


def check_weighting(how: Weighting) -> None:
    """ValueError for what is no way to weigh."""
    lookup("importance_level", IMPORTANCE_LEVELS, how.level)
    lookup("importance_mode", IMPORTANCE_MODES, how.mode)
    for name, bound in (("importance_cap", how.cap), ("importance_floor", how.floor)):
        if bound is not None:
            check_range(name, bound, 0)
    if how.cap is not None and how.floor is not None and not how.floor <= how.cap:
        raise ValueError(f"importance_floor must be at most importance_cap, {how.cap}; got {how.floor}")


def _whole(x: Tensor, like: Tensor) -> Tensor:
    return x.unsqueeze(-1).expand_as(like)


IMPORTANCE_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_weight, mask: log_weight,
    "sequence": lambda log_weight, mask: _whole(hide(log_weight, mask).sum(-1), log_weight),
    "geometric": lambda log_weight, mask: _whole(masked_mean(log_weight, mask, dim=-1), log_weight),
}
IMPORTANCE_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "truncate": lambda weight, within: within,
    "mask": lambda weight, within: hide(weight, weight == within),
}
"""From a weight and what it is when moved to the nearer bound."""
_LEAST_MEAN = 1e-8
"""Weights of a smaller mean are not divided by it: masked ones may all be 0."""


def importance_ratio(log_weight: Tensor, mask: Tensor, how: Weighting) -> Tensor:
    """exp(log_weight) by level, within its bounds; 0 stands at hidden tokens. The exponent is at most 60."""
    weight = IMPORTANCE_LEVELS[how.level](log_weight, mask).clamp(max=MAX_LOG_RATIO).exp()
    within = weight if how.floor is None else weight.clamp(min=how.floor)
    within = within if how.cap is None else within.clamp(max=how.cap)
    weight = IMPORTANCE_MODES[how.mode](weight, within)
    if not how.normalize:
        return weight
    mean = normalize_real(weight, mask, "token" if how.level == "token" else "grpo", None, None)
    return weight / torch.where(mean > _LEAST_MEAN, mean, torch.ones_like(mean))
