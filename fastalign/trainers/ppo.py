"""Proximal policy optimisation from a reward (Ouyang et al. 2022, sec. 3.5), its adaptive-KL form, and TRPO.

    fastalign ppo --model runs/sft --dataset prompts.jsonl --reward_model runs/reward --output_dir runs/ppo

or from Python, with any function as the reward:

    trainer = PPOTrainer(model, PPOConfig(output_dir="runs/ppo"), "prompts.jsonl", reward=lambda completions: ...)
    trainer.train()
    trainer.save_model()

Rows have a `prompt`. A step samples a response to each of a batch of prompts, gives it the reward's score at its last
token and the KL penalty at every token, estimates advantages (GAE) with a value function that starts at zero, and makes
`num_ppo_epochs` passes over the batch. What it leaves out: the value function is trained from scratch, never
pretrained, and responses are sampled by transformers' `generate`, not by an inference server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import rl
from ..losses.base import check_range, masked_mean
from ..losses.policy import PPOLoss
from ..losses.policy_options import KIND_ALIASES, options_among
from ..models.actor_critic import ActorCritic, with_values
from ..rl.gae import centred
from ..utils.checks import check_choice, check_positive
from .common.arguments import key
from .policy.config import PolicyConfig
from .policy.correction import CorrectionConfig
from .policy.rollout import Episode, applicable, response_mask, stacked, unstack
from .policy.run import run_policy
from .policy.trainer import PolicyTrainer
from .policy.trust_region import trust_region_updates
from .policy.update import ValueOptions

_OF_TOKENS = ("cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "clip_cov", "kl_cov")
"""Kinds of the policy loss whose advantages may be of tokens; see `losses.policy_loss`."""


@dataclass
class PPOConfig(PolicyConfig, CorrectionConfig):
    """Reinforcement learning from a reward with a value function; rows have a `prompt`."""

    objective: str = key(
        "clip",
        f"clip (PPO), penalty (PPO with an adaptive KL to the last policy), trpo, {', '.join(_OF_TOKENS)}",
        group="Loss",
    )
    penalty_coef: float = key(1.0, "Start of the weight of objective=penalty, which adapts", group="Loss")
    penalty_target: float = key(0.01, "KL per token between policies that it adapts to", group="Loss")
    trpo_delta: float = key(0.01, "Bound on the KL per token of an update of objective=trpo", group="Loss")
    trpo_damping: float = key(0.1, "Added to the Fisher matrix's diagonal there", group="Loss")
    trpo_cg_iterations: int = key(10, "Conjugate-gradient iterations there", group="Loss")
    kl_controller: str = key("fixed", "fixed, or adaptive: the weight of the KL follows target", group="Loss")
    init_kl_coef: float | None = key(None, "Start of the adaptive weight; kl_coef by default", group="Loss")
    target: float = key(6.0, "KL per response, in nats, that it holds", group="Loss")
    horizon: float = key(10_000, "Responses over which it does so", group="Loss")
    vf_coef: float = key(0.1, "Weight of the value loss", group="Value function")
    cliprange_value: float | None = key(
        0.2, "How far a value may go from the old one before it is cut; null for any", group="Value function"
    )
    value_model: str = key(
        "separate",
        "Backbone of the values: separate (a copy of the policy's), shared (the policy's own) or a folder",
        group="Value function",
    )
    gamma: float = key(1.0, "Discount", group="Value function")
    lam: float = key(0.95, "Lambda of GAE", group="Value function")
    whiten_rewards: bool = key(False, "Scale token rewards to unit variance, mean kept", group="Value function")
    whiten_advantages: bool = key(True, "Scale advantages to mean 0 and variance 1", group="Value function")

    def __post_init__(self) -> None:
        self.objective = KIND_ALIASES.get(self.objective, self.objective)
        check_choice("objective", self.objective, ("clip", "penalty", "trpo", *_OF_TOKENS))
        check_choice("kl_controller", self.kl_controller, ("fixed", "adaptive"))
        for name in ("penalty_coef", "penalty_target", "trpo_delta", "trpo_cg_iterations", "target", "horizon"):
            check_positive(name, getattr(self, name))
        for name in ("gamma", "lam"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("vf_coef", "trpo_damping", "init_kl_coef", "cliprange_value"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0)
        if self.kl_controller == "adaptive" and not (self.init_kl_coef or self.kl_coef):
            raise ValueError("kl_controller=adaptive needs a kl_coef (or init_kl_coef) above 0; got 0")
        if self.objective in ("penalty", "trpo") and self.kl_in == "loss":
            raise ValueError(f"kl_in must be reward with objective={self.objective}; got loss")
        if self.objective == "trpo" and self.value_model == "shared":
            raise ValueError("value_model must not be shared with objective=trpo: its fit would move the policy")
        if self.objective == "trpo" and (self.ptx_dataset or self.lora_rank):
            raise ValueError("objective=trpo goes with neither ptx_dataset nor lora_rank")
        if self.objective == "trpo":
            for name in ("off_policy_mask_threshold", "top_entropy_quantile", "use_adaptive_entropy"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} must be left out with objective=trpo; got {getattr(self, name)}")
        super().__post_init__()
        self.check_corrections(self)

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.kl_controller == "adaptive"


class PPOTrainer(PolicyTrainer):
    """PPO with generalised advantage estimation.

    Logs, in nats and per response: `objective/kl` (to the reference), `objective/entropy`, `objective/scores`,
    `objective/non_score_reward`, `objective/rlhf_reward`, `objective/kl_coef`; means over tokens of all updates:
    `policy/approxkl_avg`, `policy/clipfrac_avg`, `policy/entropy_avg`, `loss/policy_avg`, `loss/value_avg`,
    `val/ratio`, `val/clipfrac_avg`; `val/explained_variance` of the values at sampling, `length`, `eos_rate`,
    `grad_norm`, `lr`, `episode`, `num_tokens`, and `eps`, responses per second.
    """

    args: PPOConfig

    def build(self, policy: Any) -> ActorCritic:
        return with_values(policy, self.args.value_model, getattr(torch, self.args.dtype))

    def kl_controller(self) -> rl.FixedKL:
        args = self.args
        if args.kl_controller == "adaptive":
            return rl.AdaptiveKL(args.init_kl_coef or args.kl_coef, target=args.target, horizon=args.horizon)
        return rl.FixedKL(args.kl_coef)

    @property
    def penalty(self) -> rl.SchulmanKL:
        """The weight of the KL to the last policy, for objective=penalty."""
        if not hasattr(self, "_penalty"):
            self._penalty = rl.SchulmanKL(self.args.penalty_coef, target=self.args.penalty_target)
        return self._penalty

    def controllers(self) -> dict[str, rl.FixedKL | rl.AdaptiveEntropy]:
        more = {"penalty_coef": self.penalty} if self.args.objective == "penalty" else {}
        return {**super().controllers(), **more}

    def loss(self) -> PPOLoss:
        args = self.args
        penalty, in_loss = args.objective == "penalty", args.kl_in == "loss" and args.kl_coef > 0
        return PPOLoss(
            kind=args.objective,
            cliprange=args.cliprange,
            cliprange_high=args.cliprange_high,
            dual_clip=args.dual_clip,
            kl_coef=self.penalty.value if penalty else self.kl.value if in_loss else 0.0,
            kl_estimator="k3" if penalty else args.kl_estimator if in_loss else "k1",
            entropy_coef=args.entropy_coef if self.entropy is None else self.entropy.value,
            report_entropy=True,
            temperature=args.temperature,
            **options_among(args.objective, args),
        )

    def value_options(self) -> ValueOptions:
        return ValueOptions(self.args.vf_coef, self.args.cliprange_value)

    def advantages(self, episodes: Sequence[Episode], shaped: rl.ShapedRewards) -> dict[str, float]:
        args, mask, rewards = self.args, response_mask(episodes), shaped.rewards
        real = mask & applicable(episodes)[:, None]  # nothing is learnt of a response that the reward does not apply to
        if args.whiten_rewards:
            rewards = rl.masked_whiten(rewards, real, shift_mean=False)
        values = stacked(episodes, "values")
        # Where the model runs: a backend that was asked for by name serves that device alone.
        there = (x.to(self.accelerator.device) for x in (rewards, values, mask))
        advantages, returns = (x.cpu() for x in rl.gae(*there, gamma=args.gamma, lam=args.lam))
        advantages, returns = torch.where(real, advantages, 0), torch.where(real, returns, values)
        spread, unexplained = (masked_mean(centred(x, real)[0].square(), real) for x in (returns, returns - values))
        unstack(returns, episodes, "returns")
        unstack(rl.masked_whiten(advantages, real) if args.whiten_advantages else advantages, episodes, "advantages")
        explained = 1 - float(unexplained / spread) if spread > 0 else 0.0
        return {"val/explained_variance": explained, "val/value_avg": float(masked_mean(values, mask))}

    def update(self, episodes: Sequence[Episode]) -> dict[str, float]:
        if self.args.objective == "trpo":
            return trust_region_updates(self, episodes)
        metrics = super().update(episodes)
        if self.args.objective == "penalty":
            self.penalty.update(metrics["policy/kl_avg"])
        return metrics


def main(argv: list[str]) -> int:
    """The `fastalign ppo` command."""
    return run_policy("ppo", PPOConfig, PPOTrainer, argv)
