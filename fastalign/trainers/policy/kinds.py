"""Keys of single kinds of policy losses, and the names that other libraries give to kinds and estimators."""

from __future__ import annotations

from dataclasses import dataclass

from ...losses.policy_options import KindOptions, check_options
from ..common.arguments import key

_GROUP = "Loss of one kind"
_DEFAULT = KindOptions()


@dataclass
class KindConfig:
    """What single kinds of losses can be told; the others do not look at it."""

    sapo_temperature_pos: float = key(
        _DEFAULT.sapo_temperature_pos, "sapo: how sharp the gate is where the advantage is positive", group=_GROUP
    )
    sapo_temperature_neg: float = key(_DEFAULT.sapo_temperature_neg, "sapo: the same elsewhere", group=_GROUP)
    vespo_k_pos: float = key(
        _DEFAULT.vespo_k_pos, "vespo: power of the sequence's weight, advantage not negative", group=_GROUP
    )
    vespo_lambda_pos: float = key(_DEFAULT.vespo_lambda_pos, "vespo: exponential decay in it", group=_GROUP)
    vespo_k_neg: float = key(_DEFAULT.vespo_k_neg, "vespo: the power where it is negative", group=_GROUP)
    vespo_lambda_neg: float = key(_DEFAULT.vespo_lambda_neg, "vespo: the decay there", group=_GROUP)
    dppo_ratio_cap: float = key(
        _DEFAULT.dppo_ratio_cap, "dppo_tv, dppo_kl: bound of the ratio that weighs a token", group=_GROUP
    )
    dro_beta: float = key(_DEFAULT.dro_beta, "dro: weight of half the squared log-ratio", group=_GROUP)
    clip_cov_ratio: float = key(
        _DEFAULT.clip_cov_ratio, "clip_cov: share of the tokens that is left out, at random among", group=_GROUP
    )
    clip_cov_lb: float = key(_DEFAULT.clip_cov_lb, "clip_cov: those of a covariance above this", group=_GROUP)
    clip_cov_ub: float = key(_DEFAULT.clip_cov_ub, "clip_cov: and below this", group=_GROUP)
    kl_cov_ratio: float = key(
        _DEFAULT.kl_cov_ratio, "kl_cov: share of the tokens, of the largest covariance, that is held", group=_GROUP
    )
    kl_cov_coef: float = key(_DEFAULT.kl_cov_coef, "kl_cov: weight of their |log-ratio|", group=_GROUP)

    def check_kind_options(self) -> None:
        """ValueError for an option that is out of its range."""
        check_options(KindOptions(*(getattr(self, name) for name in KindOptions._fields)))
