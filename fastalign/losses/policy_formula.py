"""The policy loss as formulas of what is known of every token: of a batch, and of one token for one launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from ..ops.fused_loss import TOKEN, Input, Values
from ..ops.programs import NotTraced
from ..ops.token_programs import TokenProgram, trace_token
from .base import check_float, mean_over, real_tokens
from .kl import KL_ESTIMATORS, importance_ratio, importance_weights
from .policy_objectives import KINDS, WEIGHS_ITSELF, Objective, Terms, with_penalties
from .policy_selection import SELECTIONS
from .reductions import as_real, normalize_real


class PolicyLossOutput(NamedTuple):
    """`loss` is differentiable; all else is detached and, but for `policy_loss`, the mean over real tokens."""

    loss: Tensor
    """Scalar: policy_loss + kl_coef * KL - entropy_coef * entropy, all under the chosen normalisation."""
    policy_loss: Tensor
    """Scalar: the policy term alone, under the chosen normalisation."""
    kl: Tensor | None
    """Scalar: KL by the chosen estimator, in nats a token; None where there is nothing to compare with."""
    entropy: Tensor | None
    """Scalar, in nats a token; None where no entropy was given."""
    approxkl: Tensor
    """Scalar: half the mean squared log-ratio to the old policy."""
    clipfrac: Tensor
    """Scalar: share of tokens whose ratio was cut, or which were left out."""
    ratio: Tensor
    """Scalar: mean ratio of new to old policy (of sequences, for `gspo`, `luspo`, `gmpo` and `vespo`)."""


class _OfTokens(NamedTuple):
    """What each token contributes."""

    log_ratio: Any
    objective: Objective
    policy: Any
    """The objective's loss, weighted by importance."""
    divergence: Any


def _terms(t: Any, config: dict[str, Any], importance: Any) -> Terms:
    low = config["cliprange"]
    high = low if config["cliprange_high"] is None else config["cliprange_high"]
    given = (t.logps, t.logps - t.old_logps, t.advantages, t.mask, low, high, config["dual_clip"], t.old_logps)
    return Terms(*given, config["options"], importance, t.selected)


def _of_tokens(t: Any, config: dict[str, Any], importance: Any) -> _OfTokens:
    kind = config["kind"]
    if kind in SELECTIONS and t.selected is None:
        raise NotTraced("which tokens it treats apart is decided by the whole batch")
    terms = _terms(t, config, importance)
    objective = KINDS[kind](terms)
    weighted = importance is not None and kind not in WEIGHS_ITSELF
    policy = objective.loss * importance if weighted else objective.loss
    return _OfTokens(terms.log_ratio, objective, policy, _divergence(t, config))


def selected_tokens(
    config: dict[str, Any], mask: Tensor, logps: Tensor, old_logps: Tensor, advantages: Tensor
) -> Tensor | None:
    """[..., T], 1 at the tokens that the kind treats apart and 0 elsewhere; None for a kind that treats all alike."""
    choose = SELECTIONS.get(config["kind"])
    if choose is None:
        return None
    given = [Input("old_logps", old_logps, TOKEN), Input("advantages", advantages, TOKEN)]
    terms = _terms(Values(mask, {"logps": logps.detach()}, given), config, None)
    return choose(terms).to(terms.logps.dtype)


def policy_formula(t: Any, config: dict[str, Any]) -> PolicyLossOutput:
    """The loss and its metrics from what is known of every token: `t` has logps, old_logps, advantages, mask and, where
    they were given, ref_logps, kl, entropy, sampler_logps, selected and num_items."""
    importance = None
    if t.sampler_logps is not None:
        importance = importance_ratio(
            t.old_logps - t.sampler_logps, config["importance_level"], config["importance_cap"]
        )
    log_ratio, objective, policy, divergence = _of_tokens(t, config, importance)

    def reduced(x: Any) -> Any:
        return normalize_real(x, t.mask, config["normalization"], t.num_items, config["max_length"])

    def weighted(x: Any, coefficient: float) -> Any:
        return None if coefficient == 0.0 else reduced(x)

    policy_term = reduced(policy)
    kl_coef, entropy_coef = config["kl_coef"], config["entropy_coef"]
    kl, entropy = weighted(divergence, kl_coef), weighted(t.entropy, entropy_coef)
    count = real_tokens(t.mask, log_ratio.dtype)

    def metric(x: Any) -> Any:
        return mean_over(x.detach(), t.mask, count)

    return PolicyLossOutput(
        with_penalties(policy_term, kl, kl_coef, entropy, entropy_coef),
        policy_term.detach(),
        None if divergence is None else metric(divergence),
        None if t.entropy is None else metric(t.entropy),
        metric(0.5 * log_ratio.square()),
        metric(objective.clipped.to(log_ratio.dtype)),
        metric(objective.ratio),
    )


@functools.lru_cache(maxsize=128)
def token_program(config: tuple[tuple[str, Any], ...], given: tuple[str, ...]) -> TokenProgram:
    """The loss of one token, for the kernels of one launch; NotTraced for kinds that need whole sequences."""
    options = dict(config)

    def loss(t: Any) -> Any:
        found = _of_tokens(t, options, t.importance)
        return with_penalties(found.policy, found.divergence, options["kl_coef"], t.entropy, options["entropy_coef"])

    return trace_token(loss, given)


def _divergence(t: Any, config: dict[str, Any]) -> Any:
    """The KL term: to the reference where one is given, and for `penalty` without one KL(pi_old, pi)."""
    if config["kl_estimator"] == "exact":
        return t.kl
    estimator = KL_ESTIMATORS[config["kl_estimator"]]
    if t.ref_logps is not None:
        return estimator(t.logps - t.ref_logps)
    if config["kind"] == "penalty":
        return estimator(t.old_logps - t.logps)  # the samples are the old policy's: it comes first
    return None


def token_inputs(
    config: dict[str, Any],
    mask: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    sampler_logps: Tensor | None,
) -> dict[str, Tensor]:
    """What the program of a token is given, by name: float32, 0 where hidden."""
    found = {"old_logps": old_logps, "advantages": advantages}
    if ref_logps is not None:
        found["ref_logps"] = ref_logps
    for name, x in found.items():
        found[name] = as_real(check_float(name, x, mask.shape, "labels"), mask).detach().float()
    if sampler_logps is not None:
        level, cap = config["importance_level"], config["importance_cap"]
        found["importance"] = importance_weights(old_logps, sampler_logps, mask, level=level, cap=cap).float()
    return found
