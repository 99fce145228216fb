"""What single kinds of policy objectives can be told, beside what all of them can, and their other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .base import check_range


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

KIND_ALIASES = {"vanilla": "clip", "geo_mean": "gmpo"}
"""verl's spelling → ours, where the two differ."""

_ABOVE_ZERO = ("sapo_temperature_pos", "sapo_temperature_neg", "dppo_ratio_cap", "clip_cov_ratio", "kl_cov_ratio")
_AT_MOST_ONE = ("clip_cov_ratio", "kl_cov_ratio")
_ANY = ("clip_cov_lb", "clip_cov_ub")


def kind_options(kind: str, given: Mapping[str, float]) -> KindOptions:
    """The options given to a kind, and the defaults of all others. Ranges are checked by `check_options`.

    Raises:
        TypeError: a name that no kind has.
        ValueError: an option of other kinds.
    """
    for name in given:
        if name not in KindOptions._fields:
            raise TypeError(f"there is no argument {name!r}; options of kinds are {', '.join(KindOptions._fields)}")
        if name not in KIND_OPTIONS.get(kind, ()):
            owners = " and ".join(owner for owner, names in KIND_OPTIONS.items() if name in names)
            raise ValueError(f"{name} must be left out but for kind {owners}; got it with kind={kind!r}")
    return KindOptions(**given)


def options_among(kind: str, args: Any) -> dict[str, Any]:
    """The options of a kind, read from the attributes of `args`."""
    return {name: getattr(args, name) for name in KIND_OPTIONS.get(kind, ())}


def check_options(options: KindOptions) -> None:
    """ValueError for a number that is out of its range."""
    for name, value in options._asdict().items():
        if name not in _ANY:
            high = 1.0 if name in _AT_MOST_ONE else float("inf")
            check_range(name, value, 0, high, open_low=name in _ABOVE_ZERO)
    if not options.clip_cov_lb < options.clip_cov_ub:
        raise ValueError(f"clip_cov_ub must be above clip_cov_lb, {options.clip_cov_lb}; got {options.clip_cov_ub}")
