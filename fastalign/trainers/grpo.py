"""Group-relative policy optimisation (Shao et al. 2024) and relatives: several responses a prompt, no value function.

    fastalign grpo --model runs/sft --dataset prompts.jsonl --reward_fn rewards.py:score --output_dir runs/grpo

or from Python:

    GRPOTrainer(model, GRPOConfig(output_dir="runs/grpo"), "prompts.jsonl", reward=lambda completions: ...).train()

Rows have a `prompt`. The advantage of a response is its reward against those of the same prompt's other responses.
`loss_type` chooses among the field's variants, `adv_estimator` among baselines. Groups whose rewards are all equal stay
in the batch with advantage 0, count for nothing with `mask_flat_groups`, or are replaced with `dynamic_sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import rl
from ..losses.base import check_range
from ..losses.policy import PPOLoss
from ..losses.policy_options import options_among
from ..rl.baselines import spread_factor
from ..rl.gae import group_deviation
from ..rl.rewards import last_real
from ..utils.checks import check_choice
from .common.arguments import key
from .policy.config import PolicyConfig
from .policy.correction import CorrectionConfig
from .policy.rollout import Episode, applicable, response_mask, unstack
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
    "sapo": Variant("sapo", "scaled", "grpo"),  # Gao et al. 2025
    "luspo": Variant("gspo", "scaled", "sum", 2e-3, 2.5e-3),  # arXiv:2602.05261: GSPO times length; its KL too, as TRL
    "vespo": Variant("vespo", "scaled", "dapo"),  # Shen et al. 2026
    "gmpo": Variant("gmpo", "scaled", "grpo", 0.4),  # Zhao et al. 2025: the cut is of log-ratios
    "dppo_tv": Variant("dppo_tv", "centred", "dr_grpo", 0.15),  # Qi et al. 2026, as verl's example has it
    "dppo_kl": Variant("dppo_kl", "centred", "dr_grpo", 0.05),
    "dro": Variant("dro", "scaled", "token"),  # Richemond et al. 2024
    "gpg": Variant("gpg", "gpg", "token"),  # Chu et al. 2025
    "clip_cov": Variant("clip_cov", "scaled", "token"),  # Cui et al. 2025
    "kl_cov": Variant("kl_cov", "scaled", "token"),
}
LOSS_ALIASES = {"vanilla": "grpo", "geo_mean": "gmpo"}
"""verl's spelling → ours, where the two differ."""
_OF_GROUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda rewards, lengths: rl.grpo_advantages(rewards),
    "centred": lambda rewards, lengths: rl.grpo_advantages(rewards, scale=False),
    "leave_one_out": lambda rewards, lengths: rl.rloo_advantages(rewards),
    "opo": rl.opo_advantages,
    "pass_at_k": lambda rewards, lengths: rl.passk_advantages(rewards),
    "gpg": lambda rewards, lengths: rl.grpo_advantages(rewards, scale=False),
    "reinforce_pp_baseline": lambda rewards, lengths: rl.grpo_advantages(rewards, scale=False),
}
"""Advantages → those of one group, from its rewards and lengths; what is done to the batch comes after."""
ADVANTAGE_ESTIMATORS = {
    "grpo": "scaled",
    "dr_grpo": "centred",
    "rloo": "leave_one_out",
    "opo": "opo",
    "grpo_passk": "pass_at_k",
    "gpg": "gpg",
    "gdpo": "gdpo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
}
"""verl's name → advantages."""


@dataclass
class GRPOConfig(PolicyConfig, CorrectionConfig):
    """Reinforcement learning from a reward with groups of responses for a baseline; rows have a `prompt`."""

    loss_type: str = key("grpo", f"Variant: {', '.join(VARIANTS)}", group="Loss")
    adv_estimator: str | None = key(
        None,
        f"Advantages: {', '.join(ADVANTAGE_ESTIMATORS)}; by default as the variant does",
        group="Loss",
    )
    mask_flat_groups: bool = key(
        False, "Groups whose rewards are all equal count neither in the loss's mean nor in its KL", group="Loss"
    )
    dynamic_sampling: int = key(
        0,
        "Batches more that may be sampled in a step, to put groups with spread in the place of those without (DAPO)",
        group="Sampling",
    )
    overlong_buffer: int | None = key(
        None,
        "A response's last tokens up to response_length over which a penalty grows from 0 to overlong_penalty",
        group="Reward",
    )
    overlong_penalty: float = key(1.0, "Taken from the reward of a response of response_length", group="Reward")
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
    kl_estimator: str = key(
        "k3",
        "Estimator of that KL: k1, k2, k3, k3+ (k3 with k2's gradient), k3_clamped, abs or exact (whole vocabulary)",
        group="Loss",
    )

    def __post_init__(self) -> None:
        self.loss_type = LOSS_ALIASES.get(self.loss_type, self.loss_type)
        check_choice("loss_type", self.loss_type, tuple(VARIANTS))
        if self.adv_estimator is not None:
            check_choice("adv_estimator", self.adv_estimator, tuple(ADVANTAGE_ESTIMATORS))
            if self.scale_rewards is not None:
                raise ValueError("scale_rewards must be left out where adv_estimator says it; got both")
            if self.adv_estimator == "gdpo":
                self._rewards_alone()
        if self.overlong_buffer is not None:
            check_range("overlong_buffer", self.overlong_buffer, 1, self.response_length)
        check_range("overlong_penalty", self.overlong_penalty, 0)
        check_range("dynamic_sampling", self.dynamic_sampling, 0)
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, to make a group; got {self.num_generations}")
        super().__post_init__()
        self.check_corrections(self)

    def _rewards_alone(self) -> None:
        """ValueError for what would be added to a sum of rewards, where each of them is standardised by itself."""
        in_reward = self.kl_in == "reward" and self.kl_coef > 0
        added = {"kl_in": in_reward, "missing_eos_penalty": self.missing_eos_penalty is not None}
        added["overlong_buffer"] = self.overlong_buffer is not None
        for name, there in added.items():
            if there:
                value = getattr(self, name)
                raise ValueError(f"{name} changes a sum of rewards, and adv_estimator=gdpo takes none; got {value!r}")
        if self.reward_model is not None:
            raise ValueError("adv_estimator=gdpo standardises several functions (reward_fn); got a reward_model")

    @property
    def variant(self) -> Variant:
        """The loss_type's choices under the user's own."""
        variant = VARIANTS[self.loss_type]
        if self.cliprange is not None:
            variant = variant._replace(cliprange=self.cliprange, cliprange_high=None)
        if self.cliprange_high is not None:
            variant = variant._replace(cliprange_high=self.cliprange_high)
        if self.scale_rewards is not None and variant.advantages in ("scaled", "centred"):
            variant = variant._replace(advantages="scaled" if self.scale_rewards else "centred")
        if self.adv_estimator is not None:
            variant = variant._replace(advantages=ADVANTAGE_ESTIMATORS[self.adv_estimator])
        return variant


class GRPOTrainer(PolicyTrainer):
    """GRPO and its relatives. Logs what `PPOTrainer` does, but for the value function, and `objective/group_std`."""

    args: GRPOConfig

    def roll_out(self, attempt: int = 0) -> list[Episode]:
        """As `PolicyTrainer.roll_out`; with `dynamic_sampling`, groups of equal scores give way to others (Yu et al.
        2025, sec. 3.2) as long as there are any."""
        groups = self._groups(super().roll_out(attempt))
        self.resampled = 0
        for again in range(1, self.args.dynamic_sampling + 1):
            flat = [i for i, group in enumerate(groups) if not _has_spread(group)]
            if not flat:
                break
            found = [group for group in self._groups(super().roll_out(again)) if _has_spread(group)]
            for i, group in zip(flat, found, strict=False):
                groups[i] = group
            self.resampled += min(len(flat), len(found))
        return [episode for group in groups for episode in group]

    def _groups(self, episodes: Sequence[Episode]) -> list[Sequence[Episode]]:
        size = self.args.num_generations
        return [episodes[i : i + size] for i in range(0, len(episodes), size)]

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
            entropy_coef=args.entropy_coef if self.entropy is None else self.entropy.value,
            # A sum over the tokens of each response is dr_grpo's constant divisor at 1.
            normalization="dr_grpo" if summed else variant.normalization,
            max_length=1 if summed else args.response_length,
            report_entropy=True,
            temperature=args.temperature,
            **options_among(variant.kind, args),
        )

    def advantages(self, episodes: Sequence[Episode], shaped: rl.ShapedRewards) -> dict[str, float]:
        args, name = self.args, self.args.variant.advantages
        mask, applies = response_mask(episodes), applicable(episodes)
        lengths = mask.sum(-1)
        late = torch.zeros(len(episodes))
        if args.overlong_buffer is not None:
            shape = {"max_length": args.response_length, "buffer": args.overlong_buffer}
            late = args.overlong_penalty * rl.overlong_penalty(lengths, **shape)
        rewards = shaped.scores + shaped.non_score_rewards + late
        advantages, has_spread = torch.zeros_like(rewards), torch.zeros(len(rewards), dtype=torch.bool)
        deviations = []
        for group in torch.arange(len(rewards)).view(-1, args.num_generations):
            real = group[applies[group]]  # of a response that the reward does not apply to nothing is learnt
            if len(real) > 1:
                if name in _OF_GROUPS:
                    advantages[real] = _OF_GROUPS[name](rewards[real], lengths[real])
                deviations.append(group_deviation(rewards[real]))
                has_spread[group] = deviations[-1] > 0
        if name == "gpg" and deviations:
            advantages = advantages * spread_factor(torch.cat(deviations) > 0)
        if name == "gdpo":
            advantages, has_spread = self._of_several(episodes, applies)
        unstack(self._of_tokens(name, advantages, shaped, late, mask & applies[:, None]), episodes, "advantages")
        if args.mask_flat_groups:
            for episode, counts in zip(episodes, has_spread.tolist(), strict=True):
                episode.counts = counts
        found = {"objective/group_std": float(torch.stack(deviations).mean()) if deviations else 0.0}
        flat = [float(d) == 0 for d in deviations]
        found["objective/flat_groups"] = sum(flat) / max(len(flat), 1)
        return found | ({"objective/resampled_groups": float(self.resampled)} if args.dynamic_sampling else {})

    def _of_several(self, episodes: Sequence[Episode], applies: Tensor) -> tuple[Tensor, Tensor]:
        """[E] as `rl.gdpo_advantages`, of the groups' responses that each reward function applies to; and [E], True
        where one of the functions tells a group's responses apart."""
        parts = torch.tensor([e.parts for e in episodes], dtype=torch.float64)
        groups = torch.arange(len(episodes)).view(-1, self.args.num_generations)
        total = torch.zeros(len(episodes), dtype=torch.float64)
        for column, weight in zip(parts.t(), self.args.reward_weights or [1.0] * parts.shape[1], strict=True):
            for group in groups:
                real = group[~column[group].isnan()]
                if len(real) > 1:
                    total[real] += weight * rl.grpo_advantages(column[real])
        advantages = torch.zeros_like(total)
        if applies.any():
            advantages[applies] = rl.grpo_advantages(total[applies])
        has_spread = (total.view(groups.shape) != 0).any(-1, keepdim=True).expand(groups.shape).flatten()
        return advantages.float(), has_spread

    @staticmethod
    def _of_tokens(name: str, advantages: Tensor, shaped: rl.ShapedRewards, late: Tensor, real: Tensor) -> Tensor:
        """[E, R]: every token its response's, or what REINFORCE++ makes of the whole batch."""
        wide = torch.where(real, advantages[:, None], 0)
        if name == "reinforce_pp_baseline":
            return rl.masked_whiten(wide, real, unbiased=True)
        if name == "reinforce_pp":
            at_end = torch.where(last_real(real), late[:, None], 0)
            return rl.reinforce_pp_advantages(shaped.rewards + at_end, real)
        return wide


def _has_spread(group: Sequence[Episode]) -> bool:
    """Whether there are two scores that differ."""
    return len({e.score for e in group if not math.isnan(e.score)}) > 1


def main(argv: list[str]) -> int:
    """The `fastalign grpo` command."""
    return run_policy("grpo", GRPOConfig, GRPOTrainer, argv)
