"""Keys of samples that are not the trainer's own and of entropy, and what is done to a step's responses by them.

What a sampler says of its draws differs from what the trainer computes: by its precision, by what `top_k` and `top_p`
leave out. Responses are weighed for it, and those left out that are too far off. Names of keys are verl's and TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ... import rl
from ...losses.base import check_range
from ...losses.kl import IMPORTANCE_LEVELS, IMPORTANCE_MODES, Weighting, check_weighting, importance_weights
from ...losses.policy_options import GeneralOptions
from ...rl.off_policy import REJECTIONS, Bound, check_rejections
from ...utils.checks import check_choice
from ..common.arguments import key
from .rollout import Episode, response_mask, stacked, unstack

_OFF, _ENTROPY = "Off-policy", "Entropy"
_DEFAULT = GeneralOptions()


@dataclass
class CorrectionConfig:
    """What is done about the distance of sampler and trainer, and about entropy."""

    rollout_is: str | None = key(
        "token",
        f"Weigh the policy loss by trainer / sampler, the ratio of: {', '.join(IMPORTANCE_LEVELS)} (a sequence's "
        "geometric mean); null for no weights",
        group=_OFF,
    )
    rollout_is_mode: str = key(
        "truncate", f"Weights out of bounds: {', '.join(IMPORTANCE_MODES)} (which sets them to 0)", group=_OFF
    )
    rollout_is_threshold: float | None = key(2.0, "Upper bound of these weights", group=_OFF)
    rollout_is_threshold_lower: float | None = key(None, "Lower bound of them", group=_OFF)
    rollout_is_batch_normalize: bool = key(False, "Divide them by their mean over a step's responses", group=_OFF)
    rollout_rs: list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None,
        f"Leave tokens or responses that are too far from their sampler out of the loss, by: {', '.join(REJECTIONS)}",
        group=_OFF,
    )
    rollout_rs_threshold: list[str] | None = key(  # noqa: RUF009
        None, "The bound of each of these, or one of all; of k1 high or low_high, as 0.5_2.0, of the ratio", group=_OFF
    )
    off_policy_mask_threshold: float | None = key(
        _DEFAULT.off_policy_mask_threshold,
        "Responses whose policy is further than this from the sampler, in nats a token, count where their advantage is "
        "not negative alone (DeepSeek-V3.2)",
        group=_OFF,
    )
    use_bias_correction_kl: bool = key(
        _DEFAULT.use_bias_correction_kl, "Weigh the KL in the loss by the policy's ratio (DeepSeek-V3.2)", group=_OFF
    )
    top_entropy_quantile: float = key(
        _DEFAULT.top_entropy_quantile,
        "The policy loss is of this share of the tokens, of largest entropy",
        group=_ENTROPY,
    )
    use_adaptive_entropy: bool = key(
        False, "Let the weight of the entropy bonus follow the entropy, from entropy_coef on", group=_ENTROPY
    )
    entropy_target: float = key(0.2, "Entropy of a token, in nats, up to which the bonus acts", group=_ENTROPY)
    entropy_coef_delta: float = key(0.005, "What its weight grows or falls by in a step", group=_ENTROPY)
    entropy_coef_min: float = key(0.0, "Least weight of it", group=_ENTROPY)
    entropy_coef_max: float = key(1.0, "Largest weight of it", group=_ENTROPY)

    def check_corrections(self, args: Any) -> None:
        """ValueError for a key that is out of its range or goes with nothing; `args` is the whole configuration."""
        check_choice("rollout_is_mode", self.rollout_is_mode, tuple(IMPORTANCE_MODES))
        if self.rollout_is is not None:
            check_choice("rollout_is", self.rollout_is, tuple(IMPORTANCE_LEVELS))
            check_weighting(weighting(self))
        check_rejections(rejections(self))
        if self.off_policy_mask_threshold is not None:
            check_range("off_policy_mask_threshold", self.off_policy_mask_threshold, 0)
        check_range("top_entropy_quantile", self.top_entropy_quantile, 0, 1)
        if self.use_bias_correction_kl and (args.kl_in != "loss" or args.kl_estimator == "exact"):
            got = f"kl_in={args.kl_in} and kl_estimator={args.kl_estimator}"
            raise ValueError(f"use_bias_correction_kl is of a KL that is estimated in the loss; got {got}")
        entropy_control(args)


def weighting(args: CorrectionConfig) -> Weighting:
    """How a step's responses are weighed."""
    bounds = {"cap": args.rollout_is_threshold, "floor": args.rollout_is_threshold_lower}
    how = {"level": args.rollout_is, "mode": args.rollout_is_mode, "normalize": args.rollout_is_batch_normalize}
    return Weighting(**how, **bounds)  # type: ignore[arg-type]


def rejections(args: CorrectionConfig) -> dict[str, Bound]:
    """Rules → bounds, from the two keys; ValueError where their numbers do not match or a bound is none."""
    rules, bounds = _listed(args.rollout_rs), _listed(args.rollout_rs_threshold)
    if len(bounds) not in ({len(rules), 1} if rules else {0}):
        got = f"{bounds} for {rules}"
        raise ValueError(f"rollout_rs_threshold must be a bound for each of rollout_rs, or one for all; got {got}")
    return dict(zip(rules, map(_bound, bounds * len(rules) if len(bounds) == 1 else bounds), strict=True))


def _listed(given: Any) -> list[str]:
    if isinstance(given, (list, tuple)):
        return [str(part) for part in given]
    return [] if given is None else [part.strip() for part in str(given).split(",")]


def _bound(text: str) -> Bound:
    try:
        numbers = [float(part) for part in text.split("_")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"rollout_rs_threshold must be numbers, of k1 also low_high; got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def entropy_control(args: Any) -> rl.AdaptiveEntropy | None:
    """The controller of the entropy bonus, if it is to adapt."""
    if not isinstance(args, CorrectionConfig) or not args.use_adaptive_entropy:
        return None
    bounds = {"low": args.entropy_coef_min, "high": args.entropy_coef_max}
    start: float = args.entropy_coef  # type: ignore[attr-defined]
    return rl.AdaptiveEntropy(start, target=args.entropy_target, delta=args.entropy_coef_delta, **bounds)


def correct(args: Any, episodes: Sequence[Episode]) -> dict[str, float]:
    """Sets the responses' importance weights and the tokens that stay; returns how far sampler and trainer are apart.

    Nothing for responses of a sampler that says nothing of its draws, and for losses that have no such keys.
    """
    if not isinstance(args, CorrectionConfig) or any(e.sampler_logps is None for e in episodes):
        return {}
    mask = response_mask(episodes)
    both = stacked(episodes, "logps"), stacked(episodes, "sampler_logps")
    weights = None
    if args.rollout_is is not None:
        weights = importance_weights(*both, mask, **weighting(args)._asdict())
        unstack(weights, episodes, "importance_weights")
    found = {
        f"sampling/{name}": float(x)
        for name, x in rl.off_policy_metrics(*both, mask, weights=weights)._asdict().items()
    }
    rules = rejections(args)
    if rules:
        kept = rl.rejection_mask(*both, mask, rules=rules)
        unstack(kept, episodes, "kept")
        found["sampling/rejected"] = 1 - float(kept.sum() / mask.sum())
    return found
