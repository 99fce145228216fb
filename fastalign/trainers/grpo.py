"""Group-relative policy optimisation (Shao et al. 2024) and relatives: several responses a prompt, no value function.

    fastalign grpo --model runs/sft --dataset prompts.jsonl --reward_fn rewards.py:score --output_dir runs/grpo

or from Python:

    GRPOTrainer(model, GRPOConfig(output_dir="runs/grpo"), "prompts.jsonl", reward=lambda completions: ...).train()

Rows have a `prompt`. The advantage of a response is its reward against those of the same prompt's other responses.
`loss_type` chooses among the field's variants. What it leaves out: DAPO's dynamic sampling (groups whose rewards are
all equal stay in the batch, with advantage 0) and its shaping of overlong responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import rl
from ..losses.policy import PPOLoss
from ..rl.gae import group_deviation
from ..utils.checks import check_choice
from .common.arguments import key
from .policy.config import PolicyConfig
from .policy.rollout import Episode, applicable
from .policy.run import run_policy
from .policy.trainer import PolicyTrainer


class Variant(NamedTuple):
    """What a loss_type stands for; keys that the user sets win."""

    kind: str
    advantages: str
    normalization: str
    cliprange: float = 0.2
    cliprange_high: float | None = None


VARIANTS = {
    "grpo": Variant("clip", "scaled", "grpo"),  # Shao et al. 2024, eq. 3
    "bnpo": Variant("clip", "scaled", "token"),  # the same, a mean over tokens
    "dr_grpo": Variant("clip", "centred", "dr_grpo"),  # Liu et al. 2025
    "dapo": Variant("clip", "scaled", "dapo", cliprange_high=0.28),  # Yu et al. 2025, eq. 8
    "gspo": Variant("gspo", "scaled", "grpo", 3e-4, 4e-4),  # Zheng et al. 2025
    "cispo": Variant("cispo", "scaled", "dapo", 1.0, 2.0),  # MiniMax 2025, eq. 4: no lower bound
    "rloo": Variant("clip", "leave_one_out", "sum"),  # Ahmadian et al. 2024; on-policy the clip is REINFORCE
}
_ADVANTAGES = {
    "scaled": lambda rewards: rl.grpo_advantages(rewards),
    "centred": lambda rewards: rl.grpo_advantages(rewards, scale=False),
    "leave_one_out": rl.rloo_advantages,
}


@dataclass
class GRPOConfig(PolicyConfig):
    """Reinforcement learning from a reward with groups of responses for a baseline; rows have a `prompt`."""

    loss_type: str = key("grpo", f"Variant: {', '.join(VARIANTS)}", group="Loss")
    scale_rewards: bool | None = key(
        None, "Divide a group's advantages by their standard deviation; by default as the variant does", group="Loss"
    )
    num_generations: int = key(8, "Responses sampled per prompt: the group", group="Sampling")
    num_ppo_epochs: int = key(1, "Passes over each batch of responses", group="Training loop")
    cliprange: float | None = key(  # type: ignore[assignment]
        None, "How far the ratio may go from 1 before it is cut; by default as the variant does", group="Loss"
    )
    kl_coef: float = key(0.04, "Weight of the KL to the reference; 0 needs no reference", group="Loss")
    kl_in: str = key("loss", "Where that KL counts: in the reward or in the loss", group="Loss")
    kl_estimator: str = key("k3", "Estimator of that KL: k1, k2, k3 or exact (whole vocabulary)", group="Loss")

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, tuple(VARIANTS))
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, to make a group; got {self.num_generations}")
        super().__post_init__()

    @property
    def variant(self) -> Variant:
        """The loss_type's choices under the user's own."""
        variant = VARIANTS[self.loss_type]
        if self.cliprange is not None:
            variant = variant._replace(cliprange=self.cliprange, cliprange_high=None)
        if self.cliprange_high is not None:
            variant = variant._replace(cliprange_high=self.cliprange_high)
        if self.scale_rewards is not None and variant.advantages != "leave_one_out":
            variant = variant._replace(advantages="scaled" if self.scale_rewards else "centred")
        return variant


class GRPOTrainer(PolicyTrainer):
    """GRPO and its relatives. Logs what `PPOTrainer` does, but for the value function, and `objective/group_std`."""

    args: GRPOConfig

    def loss(self) -> PPOLoss:
        args, variant = self.args, self.args.variant
        in_loss = args.kl_in == "loss" and args.kl_coef > 0
        summed = variant.normalization == "sum"
        return PPOLoss(
            kind=variant.kind,
            cliprange=variant.cliprange,
            cliprange_high=variant.cliprange_high,
            dual_clip=args.dual_clip,
            kl_coef=self.kl.value if in_loss else 0.0,
            kl_estimator=args.kl_estimator if in_loss else "k1",
            entropy_coef=args.entropy_coef,
            # A sum over the tokens of each response is dr_grpo's constant divisor at 1.
            normalization="dr_grpo" if summed else variant.normalization,
            max_length=1 if summed else args.response_length,
            report_entropy=True,
            temperature=args.temperature,
        )

    def advantages(self, episodes: Sequence[Episode], shaped: rl.ShapedRewards) -> dict[str, float]:
        size, advantages_of = self.args.num_generations, _ADVANTAGES[self.args.variant.advantages]
        rewards, applies = shaped.scores + shaped.non_score_rewards, applicable(episodes)
        advantages = torch.zeros_like(rewards)
        deviations = []
        for group in torch.arange(len(rewards)).view(-1, size):
            real = group[applies[group]]  # of a response that the reward does not apply to nothing is learnt
            if len(real) > 1:
                advantages[real] = advantages_of(rewards[real])
                deviations.append(float(group_deviation(rewards[real])))
        for episode, advantage in zip(episodes, advantages, strict=True):
            episode.advantages = torch.full((len(episode.ids),), float(advantage))
        return {"objective/group_std": sum(deviations) / max(len(deviations), 1)}


def main(argv: list[str]) -> int:
    """The `fastalign grpo` command."""
    return run_policy("grpo", GRPOConfig, GRPOTrainer, argv)
