"""What policy objectives can be told by name, single kinds and all of them, and other names of kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .base import check_range
from .kl import Weighting, check_weighting


class KindOptions(NamedTuple):
    """Options of single kinds; `KIND_OPTIONS` says whose. Names and defaults are those of TRL and verl."""

    sapo_temperature_pos: float = 1.0
    """tau of tokens with A > 0."""
    sapo_temperature_neg: float = 1.05
    """tau of the others."""
    vespo_k_pos: float = 2.0
    """Power of the sequence's weight where A >= 0."""
    vespo_lambda_pos: float = 3.0
    """Its exponential decay there."""
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_ratio_cap: float = 20.0
    """Bound of the ratio that a token's gradient is weighted by."""
    dro_beta: float = 0.1
    """Weight of the squared log-ratio."""
    clip_cov_ratio: float = 2e-4
    """Share of the real tokens that are left out; one at least, if there is a candidate."""
    clip_cov_lb: float = 1.0
    """Candidates have a covariance above it,"""
    clip_cov_ub: float = 5.0
    """and below this."""
    kl_cov_ratio: float = 2e-4
    """Share of the real tokens, those of the largest covariance, that are held to the old policy; one at least."""
    kl_cov_coef: float = 1.0
    """Weight of their |log-ratio|."""


class GeneralOptions(NamedTuple):
    """Options of every kind. Names and defaults are those of TRL where it has them."""

    importance_mode: str = "truncate"
    """What becomes of a sampler's weights out of their bounds: see `importance_weights`."""
    importance_floor: float | None = None
    """Their lower bound; `importance_cap` is the upper one."""
    importance_normalize: bool = False
    """Divide them by their mean."""
    off_policy_mask_threshold: float | None = None
    """Sequences that are further than this from their sampler count no token with A < 0."""
    use_bias_correction_kl: bool = False
    """Weigh the estimated KL to the reference by the ratio."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens, those of the largest entropy, that the policy term is of."""


_DPPO = ("dppo_ratio_cap",)
KIND_OPTIONS: dict[str, tuple[str, ...]] = {
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    "dppo_tv": _DPPO,
    "dppo_kl": _DPPO,
    "dro": ("dro_beta",),
    "clip_cov": ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
    "kl_cov": ("kl_cov_ratio", "kl_cov_coef"),
}
"""Kind → its options."""

OF_UPDATES = ("off_policy_mask_threshold", "use_bias_correction_kl", "top_entropy_quantile")
"""General options that depend on the policy as it is; the others are of the sampler's weights, which are constants."""

KIND_ALIASES = {"vanilla": "clip", "geo_mean": "gmpo"}
"""verl's spelling → ours, where the two differ."""

_ABOVE_ZERO = ("sapo_temperature_pos", "sapo_temperature_neg", "dppo_ratio_cap", "clip_cov_ratio", "kl_cov_ratio")
_AT_MOST_ONE = ("clip_cov_ratio", "kl_cov_ratio")
_ANY = ("clip_cov_lb", "clip_cov_ub")


def named_options(kind: str, given: Mapping[str, Any]) -> tuple[KindOptions, GeneralOptions]:
    """The options given to a kind, and the defaults of all others. Ranges are checked by `check_options` and
    `check_general`.

    Raises:
        TypeError: a name that no kind has.
        ValueError: an option of other kinds.
    """
    general = {name: value for name, value in given.items() if name in GeneralOptions._fields}
    own = {name: value for name, value in given.items() if name not in general}
    for name in own:
        if name not in KindOptions._fields:
            names = f"{', '.join(KindOptions._fields)}, of all kinds {', '.join(GeneralOptions._fields)}"
            raise TypeError(f"there is no argument {name!r}; options of kinds are {names}")
        if name not in KIND_OPTIONS.get(kind, ()):
            owners = " and ".join(owner for owner, names in KIND_OPTIONS.items() if name in names)
            raise ValueError(f"{name} must be left out but for kind {owners}; got it with kind={kind!r}")
    return KindOptions(**own), GeneralOptions(**general)


def options_among(kind: str, args: Any) -> dict[str, Any]:
    """The options of a kind, and those of all kinds, read from the attributes of `args`."""
    names = (*KIND_OPTIONS.get(kind, ()), *OF_UPDATES)
    return {name: getattr(args, name) for name in names}


def check_options(options: KindOptions) -> None:
    """ValueError for a number that is out of its range."""
    for name, value in options._asdict().items():
        if name not in _ANY:
            high = 1.0 if name in _AT_MOST_ONE else float("inf")
            check_range(name, value, 0, high, open_low=name in _ABOVE_ZERO)
    if not options.clip_cov_lb < options.clip_cov_ub:
        raise ValueError(f"clip_cov_ub must be above clip_cov_lb, {options.clip_cov_lb}; got {options.clip_cov_ub}")


def weighting(config: Mapping[str, Any]) -> Weighting:
    """How a policy loss weighs what a sampler drew."""
    g = config["general"]
    return Weighting(
        config["importance_level"],
        config["importance_cap"],
        g.importance_mode,
        g.importance_floor,
        g.importance_normalize,
    )


def check_general(config: Mapping[str, Any]) -> None:
    """ValueError for a general option that is out of its range or goes with nothing."""
    check_weighting(weighting(config))
    general = config["general"]
    if general.off_policy_mask_threshold is not None:
        check_range("off_policy_mask_threshold", general.off_policy_mask_threshold, 0)
    check_range("top_entropy_quantile", general.top_entropy_quantile, 0, 1)
    if general.use_bias_correction_kl and config["kl_estimator"] == "exact":
        raise ValueError("use_bias_correction_kl is of KLs estimated from samples; got kl_estimator='exact'")
