"""Samples of another policy than the trainer's: how far off they are, and which to leave out.

A sampler (an inference engine, a policy of some updates ago, the policy under top-k or top-p) reports the
log-probability of each token that it drew; the trainer computes its own. Weights for what lies between the two are
`losses.importance_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses.base import check_float, check_mask, check_range, hide, lookup, masked_mean
from ..losses.kl import KL_ESTIMATORS, MAX_LOG_RATIO
from ..losses.reductions import as_real


class OffPolicyMetrics(NamedTuple):
    """Scalars, over real tokens; those of ratios are of pi / pi_sampler."""

    kl: Tensor
    """Mean log(pi_sampler / pi): KL(pi_sampler, pi) by k1, in nats a token."""
    k3: Tensor
    """The same by k3, which is never negative."""
    difference: Tensor
    """Mean |log pi - log pi_sampler|."""
    effective_sample_size: Tensor
    """(sum w)^2 / (n sum w^2) of the tokens' weights, in (0, 1]: the share of the samples that is as good as drawn by
    pi. 0 where all weights are 0."""
    least_ratio: Tensor
    largest_ratio: Tensor
    """Of a token."""
    least_sequence_ratio: Tensor
    largest_sequence_ratio: Tensor
    """Of a whole sequence: the product over its tokens."""


def off_policy_metrics(
    logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, weights: Tensor | None = None
) -> OffPolicyMetrics:
    """How far sampler and trainer are from each other.

    Args:
        logps: [B, T], by the trainer. sampler_logps: [B, T], by the sampler.
        mask: [B, T], boolean, True = real.
        weights: [B, T], importance weights as they are used, for the effective sample size; by default the ratios.

    Returns:
        OffPolicyMetrics, each a scalar without gradient. Exponents are at most 60. Of no tokens ratios are 1.

    Raises:
        TypeError: not a floating-point tensor, a mask that is not boolean. ValueError: shapes that differ.
    """
    log_ratio = _log_ratio(logps, sampler_logps, mask)
    ratio = _ratio(log_ratio)
    weights = ratio if weights is None else as_real(check_float("weights", weights, mask.shape, "logps"), mask).detach()
    mean, square = masked_mean(weights, mask), masked_mean(weights.square(), mask)
    whole = _ratio(log_ratio.sum(-1))
    return OffPolicyMetrics(
        masked_mean(-log_ratio, mask),
        masked_mean(KL_ESTIMATORS["k3"](-log_ratio), mask),
        masked_mean(log_ratio.abs(), mask),
        torch.where(square > 0, mean.square() / square, torch.zeros_like(mean)),
        *_extremes(ratio, mask),
        *_extremes(whole, mask.any(-1)),
    )


def _log_ratio(logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> Tensor:
    check_float("logps", logps)
    check_mask("mask", mask, logps.shape, "logps")
    check_float("sampler_logps", sampler_logps, logps.shape, "logps")
    return (as_real(logps, mask) - as_real(sampler_logps, mask)).detach()


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _extremes(ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of the real ones."""
    one = ratio.new_ones(1)
    least = torch.cat([ratio.masked_fill(~mask, torch.inf).flatten(), one * torch.inf]).amin()
    largest = torch.cat([ratio.masked_fill(~mask, -torch.inf).flatten(), -one * torch.inf]).amax()
    there = mask.any()
    return torch.where(there, least, one[0]), torch.where(there, largest, one[0])


# ------------------------------------------------------------------------------------------------------------ rejection
def _of_sequence(reduce: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, mask: reduce(x, mask).unsqueeze(-1).expand_as(x)


_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda x, mask: x,
    "seq_sum": _of_sequence(lambda x, mask: hide(x, mask).sum(-1)),
    "seq_mean": _of_sequence(lambda x, mask: masked_mean(x, mask, dim=-1)),
    "seq_max": _of_sequence(lambda x, mask: x.masked_fill(~mask, -torch.inf).amax(-1)),
}
REJECTIONS = {f"{level}_{k}": (level, k) for level in _LEVELS for k in ("k1", "k2", "k3")}
"""Rule → what is measured, of a token or of all tokens of a sequence, and the estimator that measures it."""
del REJECTIONS["seq_max_k1"]  # of either sign: its largest is no distance

Bound = float | tuple[float, float]
_PAIR = ", or two"


def check_rejections(rules: Mapping[str, Bound]) -> dict[str, tuple[float, float]]:
    """Bounds of each rule's estimate: [log low, log high] of k1, [-inf, high] of the others.

    Raises:
        ValueError: an unknown rule, a bound that is not above 0, a pair of bounds but for k1, a low one above the high.
    """
    found = {}
    for name, bound in rules.items():
        _, estimator = lookup("rejection rule", REJECTIONS, name)
        if not isinstance(bound, tuple):
            high = check_range(f"the bound of {name}", float(bound), 0, open_low=True)
            low = 1 / high if estimator == "k1" else high
        elif estimator == "k1" and len(bound) == 2:
            low, high = bound
        else:
            raise ValueError(f"the bound of {name} must be one number{_PAIR * (estimator == 'k1')}; got {bound}")
        check_range(f"the lower bound of {name}", low, 0, high, open_low=True)
        found[name] = (math.log(low), math.log(high)) if estimator == "k1" else (-math.inf, high)
    return found


def rejection_mask(logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, rules: Mapping[str, Bound]) -> Tensor:
    """The real tokens that are close enough to their sampler by every rule: rejection sampling (Liu et al. 2025, "When
    speed kills stability"), which verl calls `rollout_rs`.

    A rule measures KL(pi_sampler, pi) by an estimator, k1 = log(pi_sampler / pi), k2 or k3 (`losses.kl_estimate`), of a
    token (`token_k1` to `token_k3`) or of a sequence, all of whose tokens stay or go (`seq_sum_k1`, `seq_mean_k1`, ...,
    `seq_max_k2`, `seq_max_k3`), and keeps what is within its bound.

    Args:
        logps: [B, T], by the trainer. sampler_logps: [B, T], by the sampler.
        mask: [B, T], boolean, True = real.
        rules: rule → bound, above 0: the largest estimate; of k1 the largest exp(k1), (low, high) or for one number c
            (1 / c, c). {"token_k1": (0.5, 2.0), "seq_mean_k3": 0.01}

    Returns:
        [B, T], boolean: False at what to leave out, and where the mask is False. Labels set to `ignore_index` there are
        in no loss and in no count.

    Raises:
        TypeError: not a floating-point tensor, a mask that is not boolean.
        ValueError: shapes that differ, an unknown rule, a bound that is none.
    """
    bounds = check_rejections(rules)
    k1 = -_log_ratio(logps, sampler_logps, mask)
    kept = mask
    for name, (low, high) in bounds.items():
        level, estimator = REJECTIONS[name]
        distance = _LEVELS[level](KL_ESTIMATORS[estimator](k1), mask)
        kept = kept & (distance >= low) & (distance <= high)
    return kept
