"""Reinforcement learning around the policy losses: advantages, rewards, KL controllers, trust region."""

from .baselines import (
    gdpo_advantages,
    gpg_advantages,
    opo_advantages,
    otb_advantages,
    passk_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    remax_advantages,
)
from .entropy import AdaptiveEntropy
from .gae import discounted_returns, gae, grpo_advantages, masked_whiten, rloo_advantages
from .kl import AdaptiveKL, FixedKL, SchulmanKL
from .off_policy import OffPolicyMetrics, off_policy_metrics, rejection_mask
from .rewards import ShapedRewards, overlong_penalty, shape_rewards
from .trust_region import TrustRegion, TrustRegionStep, conjugate_gradient, exact_kl, sampled_kl

__all__ = [
    "AdaptiveEntropy",
    "AdaptiveKL",
    "FixedKL",
    "OffPolicyMetrics",
    "SchulmanKL",
    "ShapedRewards",
    "TrustRegion",
    "TrustRegionStep",
    "conjugate_gradient",
    "discounted_returns",
    "exact_kl",
    "gae",
    "gdpo_advantages",
    "gpg_advantages",
    "grpo_advantages",
    "masked_whiten",
    "off_policy_metrics",
    "opo_advantages",
    "otb_advantages",
    "overlong_penalty",
    "passk_advantages",
    "reinforce_pp_advantages",
    "reinforce_pp_baseline_advantages",
    "rejection_mask",
    "remax_advantages",
    "rloo_advantages",
    "sampled_kl",
    "shape_rewards",
]
