"""The policy loss as formulas of what is known of every token: of a batch, and of one token for one launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from ..ops.fused_loss import TOKEN, Input, Values
from ..ops.programs import NotTraced
from ..ops.token_programs import TokenProgram, trace_token
from .base import check_float, hide, masked_mean, mean_over, real_tokens
from .kl import KL_ESTIMATORS, importance_ratio, importance_weights
from .policy_objectives import KINDS, WEIGHS_ITSELF, Objective, Terms, with_penalties
from .policy_options import weighting
from .policy_selection import SELECTIONS, high_entropy
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
    return _OfTokens(terms.log_ratio, objective, _of_some(policy, t, config), _divergence(t, config))


_MOST_LOG_RATIO_OF_KL = 20.0
"""Bound of the log-ratio that a KL is multiplied with: times k3, of up to e^60, it still is a float32."""


def _of_some(policy: Any, t: Any, config: dict[str, Any]) -> Any:
    """The policy term without the tokens that the general options leave out of it."""
    general = config["general"]
    if general.off_policy_mask_threshold is not None:
        sampled_by = t.old_logps if t.sampler_logps is None else t.sampler_logps
        drift = masked_mean(sampled_by - t.logps.detach(), t.mask, dim=-1).unsqueeze(-1).expand_as(policy)
        policy = hide(policy, ~((t.advantages < 0) & (drift > general.off_policy_mask_threshold)))
    if general.top_entropy_quantile < 1.0:
        if t.high_entropy is None:
            raise NotTraced("which tokens have the largest entropy is decided by the whole batch")
        policy = hide(policy, t.high_entropy > 0)
    return policy


def chosen_tokens(
    config: dict[str, Any],
    mask: Tensor,
    logps: Tensor,
    entropy: Tensor | None,
    old_logps: Tensor,
    advantages: Tensor,
) -> dict[str, Tensor]:
    """[..., T] each, 1 at tokens that are chosen among the batch's and 0 elsewhere, by the name of the choice: those
    that the kind treats apart (`selected`), those of large entropy (`high_entropy`). None where nothing is chosen."""
    found, choose = {}, SELECTIONS.get(config["kind"])
    if choose is not None:
        given = [Input("old_logps", old_logps, TOKEN), Input("advantages", advantages, TOKEN)]
        terms = _terms(Values(mask, {"logps": logps.detach()}, given), config, None)
        found["selected"] = choose(terms).to(terms.logps.dtype)
    share = config["general"].top_entropy_quantile
    if share < 1.0 and entropy is not None:
        found["high_entropy"] = high_entropy(entropy.detach(), mask, share).to(entropy.dtype)
    return found


def chooses(config: dict[str, Any]) -> str | None:
    """The option by which tokens are chosen among a batch's, as it is written, if there is such a one."""
    if config["kind"] in SELECTIONS:
        return f"kind={config['kind']!r}"
    share = config["general"].top_entropy_quantile
    return f"top_entropy_quantile={share}" if share < 1.0 else None


def policy_formula(t: Any, config: dict[str, Any]) -> PolicyLossOutput:
    """The loss and its metrics from what is known of every token: `t` has logps, old_logps, advantages, mask and, where
    they were given, ref_logps, kl, entropy, sampler_logps, importance_weights, what was chosen, and num_items."""
    importance = t.importance_weights
    if importance is None and t.sampler_logps is not None:
        importance = importance_ratio(t.old_logps - t.sampler_logps, t.mask, weighting(config))
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
        found = _of_tokens(t, options, t.importance_weights)
        return with_penalties(found.policy, found.divergence, options["kl_coef"], t.entropy, options["entropy_coef"])

    return trace_token(loss, given)


def _divergence(t: Any, config: dict[str, Any]) -> Any:
    """The KL term: to the reference where one is given, and for `penalty` without one KL(pi_old, pi)."""
    if config["kl_estimator"] == "exact":
        return t.kl
    estimator = KL_ESTIMATORS[config["kl_estimator"]]
    if t.ref_logps is not None:
        found = estimator(t.logps - t.ref_logps)
        if config["general"].use_bias_correction_kl:
            log_ratio = t.logps - t.old_logps
            found = found * log_ratio.clamp(-_MOST_LOG_RATIO_OF_KL, _MOST_LOG_RATIO_OF_KL).exp()
        return found
    if config["kind"] == "penalty":
        return estimator(t.old_logps - t.logps)  # the samples are the old policy's: it comes first
    return None


def token_inputs(
    config: dict[str, Any],
    mask: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    given: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    """What the program of a token is given, by name: float32, 0 where hidden."""
    found = {"old_logps": old_logps, "advantages": advantages}
    given = weighted_once(config, mask, old_logps, given)
    found |= {name: x for name in ("ref_logps", "importance_weights") if (x := given[name]) is not None}
    for name, x in found.items():
        found[name] = as_real(check_float(name, x, mask.shape, "labels"), mask).detach().float()
    return found


def weighted_once(
    config: dict[str, Any], mask: Tensor, old_logps: Tensor, given: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """What is given of tokens, with a sampler's weights made of all of them."""
    sampler_logps = given["sampler_logps"]
    if sampler_logps is None or given["importance_weights"] is not None:
        return given
    how = weighting(config)._asdict()
    return given | {"importance_weights": importance_weights(old_logps, sampler_logps, mask, **how)}
