"""Reinforcement learning around the policy losses: advantages, rewards, KL controllers, trust region."""

from .gae import discounted_returns, gae, grpo_advantages, masked_whiten, rloo_advantages
from .kl import AdaptiveKL, FixedKL, SchulmanKL
from .rewards import ShapedRewards, shape_rewards
from .trust_region import TrustRegion, TrustRegionStep, conjugate_gradient, exact_kl, sampled_kl

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "SchulmanKL",
    "ShapedRewards",
    "TrustRegion",
    "TrustRegionStep",
    "conjugate_gradient",
    "discounted_returns",
    "exact_kl",
    "gae",
    "grpo_advantages",
    "masked_whiten",
    "rloo_advantages",
    "sampled_kl",
    "shape_rewards",
]
