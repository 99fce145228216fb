"""Online DPO (Guo et al. 2024): preference pairs of the policy's own samples, told apart by a reward or a judge.

    fastalign online-dpo --model runs/sft --dataset prompts.jsonl --reward_model runs/reward --output_dir runs/online

or from Python, with any function as the reward, or any judge of pairs:

    trainer = OnlineDPOTrainer(model, OnlineDPOConfig(output_dir="runs/online"), "prompts.jsonl", judge=my_judge)
    trainer.train()
    trainer.save_model()

Rows have a `prompt`. A step samples `num_generations` responses to each of a batch of prompts and scores them; the best
and the worst of a prompt make a pair, and the pairs a DPO update against the reference. Prompts whose best and worst
score alike make none: `objective/ties` counts them. Log-probabilities are those at the sampling temperature, of policy
and reference alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import rl
from ..losses.pair_weights import shared_length_weights
from ..losses.preference import DPOLoss
from ..utils.batch import IGNORE
from .common.arguments import key
from .common.pair_keys import PAIR_METRICS, PairLossKeys
from .data.files import Rows
from .policy.config import PolicyConfig
from .policy.judge import Judge, JudgeReward
from .policy.reward_functions import load_function
from .policy.rollout import Episode, applicable, collate, spread
from .policy.run import run_policy
from .policy.trainer import PolicyTrainer
from .policy.update import Updater


@dataclass
class OnlineDPOConfig(PolicyConfig, PairLossKeys):
    """DPO on the policy's own samples, told apart by a reward or a judge; rows have a `prompt`."""

    judge: str | None = key(
        None,
        "Python function that compares instead of a reward, module:function or file.py:function: of the lists prompts, "
        "first and second it says of each pair 1 where the first is better, 0 where the second is, 0.5 for neither",
        group="Reward",
    )
    reference_free: bool = key(False, "Take the reference as uniform: no reference model at all", group="Reference")
    num_generations: int = key(2, "Responses sampled per prompt; the best and the worst make a pair", group="Sampling")
    num_ppo_epochs: int = key(1, "Passes over each batch of pairs", group="Training loop")
    kl_coef: float = key(0.0, "Weight of the KL to the reference in the reward that tells them apart", group="Reward")
    learning_rate: float = key(5e-7, "Peak learning rate", group="Training loop")
    # Of the losses of single responses, and no keys here.
    kl_in: str = field(default="reward", init=False)
    cliprange: float = field(default=0.2, init=False)
    cliprange_high: float | None = field(default=None, init=False)
    dual_clip: float | None = field(default=None, init=False)
    entropy_coef: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.loss()
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, to make a pair; got {self.num_generations}")
        super().__post_init__()

    @property
    def uses_reference(self) -> bool:
        """False for the losses without a reference, and for any other with `reference_free`."""
        return not self.reference_free and self.loss().options.uses_reference

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.uses_reference


class Pair(NamedTuple):
    """The best and the worst response to a prompt."""

    chosen: Episode
    rejected: Episode


class PairUpdater(Updater):
    """Updates on pairs: each mini-batch is the mean over its pairs, of all processes."""

    def run_pairs(self, pairs: Sequence[Pair], loss: DPOLoss, step: int) -> dict[str, float]:
        """All updates of a step, none where there are no pairs. Returns the metrics, means over the pairs."""
        self.model.train()
        norms = []
        for epoch in range(self.args.num_ppo_epochs):
            order = np.random.default_rng((self.args.seed, 3, step, epoch)).permutation(len(pairs))
            for part in np.array_split(order, self.args.num_mini_batches):
                if len(part):
                    norms.append(self._update_by([pairs[i] for i in part], loss))
        metrics = self.means.pop(self._sum) | self.ptx_means.pop(self._sum)
        grad_norm = {"grad_norm": float(np.mean(torch.stack(norms).tolist()))} if norms else {}
        return {**metrics, **grad_norm, "lr": self.scheduler.get_last_lr()[0]}

    def _update_by(self, pairs: Sequence[Pair], loss: DPOLoss) -> Tensor:
        """One optimiser step; returns the gradient's norm."""
        own = sorted(self.mine(pairs), key=lambda p: -max(len(e.prompt.ids) + len(e.ids) for e in p))
        size = max(self.args.per_device_train_batch_size // 2, 1)
        # As many passes in every process, one without pairs left among them: gradients are exchanged in step.
        passes = math.ceil(math.ceil(len(pairs) / self.accelerator.num_processes) / size)
        self._pretraining()
        for number in range(passes):
            part = own[number * size : (number + 1) * size]
            with self._syncs(number == passes - 1):
                self.backward(self.share(part or pairs[:1], loss, len(part), len(pairs)))
        return self.optimizer_step([episode for pair in pairs for episode in pair])

    def share(self, pairs: Sequence[Pair], loss: DPOLoss, count: int, total: int) -> Tensor:
        """The loss of `count` pairs of the mini-batch's `total`; notes its metrics. Of none: zero times that of any."""
        episodes = [p.chosen for p in pairs] + [p.rejected for p in pairs]
        batch, device = collate(episodes, self.fill, grouped=self.grouped), self.accelerator.device
        # On the CPU, where the episodes are: to find the places of a mask is to wait for a GPU.
        references = self._reference(episodes, batch["labels"]) if self.args.uses_reference else (None, None)
        chosen, rejected = (None if x is None else x.to(device) for x in references)
        batch = {name: x.to(device) for name, x in batch.items()}
        labels = batch["labels"]
        out = loss(self.logits(batch), labels, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
        lengths = (labels != IGNORE).sum(-1).float().chunk(2)
        metrics = {name: getattr(out, field).mean() for name, field in PAIR_METRICS.items()}
        metrics |= {"loss/policy_avg": out.loss, "lengths/chosen": lengths[0].mean()}
        metrics["lengths/rejected"] = lengths[1].mean()
        self.means.add(metrics, torch.tensor(float(count)))
        return out.loss * (count / total)

    def _reference(self, episodes: Sequence[Episode], labels: Tensor) -> tuple[Tensor, ...]:
        """[B] each: the reference's sums, as the loss takes the policy's."""
        logps = spread([e.ref_logps for e in episodes if e.ref_logps is not None], labels).double()
        if self.args.ld_alpha is not None:
            logps = logps * shared_length_weights(labels != IGNORE, self.args.ld_alpha)
        return logps.sum(-1).chunk(2)


class OnlineDPOTrainer(PolicyTrainer):
    """DPO on pairs of sampled responses.

    Logs, beside what PPO does of its samples, `objective/pairs` and `objective/ties` (prompts of the step that make a
    pair, and that make none because all their scores are alike), `objective/scores_margin` (best less worst of a pair)
    and, means over the pairs of all updates, `rewards/chosen`, `rewards/rejected`, `rewards/margins`,
    `rewards/accuracies`, `logps/chosen`, `logps/rejected`, `lengths/chosen`, `lengths/rejected` and `loss/policy_avg`.
    """

    args: OnlineDPOConfig
    updater_class = PairUpdater

    def __init__(
        self,
        model: Any,
        args: OnlineDPOConfig,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        processing_class: Any = None,
        *,
        judge: Judge | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PolicyTrainer`; judge: compares in place of a reward (see `policy.judge.Judge`)."""
        self._judge = judge
        self._pairs: list[Pair] = []
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, **kwargs)

    def load_reward(self, given: Any) -> Any:
        args = self.args
        judges = [x for x in (self._judge, args.judge) if x is not None]
        if not judges:
            return super().load_reward(given)
        others = {"reward": given, "reward_fn": args.reward_fn, "reward_model": args.reward_model}
        for name in [name for name, x in others.items() if x is not None] + ["judge"] * (len(judges) - 1):
            raise ValueError(f"a judge takes the place of a reward, and there is one of them; got {name} beside it")
        if args.reward_weights is not None:
            raise ValueError("reward_weights are of functions (reward_fn): a judge gives one verdict")
        if args.missing_eos_penalty is not None:
            raise ValueError("missing_eos_penalty is subtracted from a score; a judge says alone which is better")
        judge = load_function(judges[0], "judge") if isinstance(judges[0], str) else judges[0]
        return JudgeReward(judge, args.num_generations)

    def advantages(self, episodes: Sequence[Episode], shaped: rl.ShapedRewards) -> dict[str, float]:
        """Chooses the pairs of this step."""
        rewards, applies = shaped.scores + shaped.non_score_rewards, applicable(episodes)
        self._pairs, margins, ties = [], [], 0
        for group in torch.arange(len(episodes)).view(-1, self.args.num_generations):
            real = group[applies[group]]
            if len(real) < 2:
                continue
            best, worst = (int(real[pick(rewards[real])]) for pick in (torch.argmax, torch.argmin))
            if rewards[best] == rewards[worst]:
                ties += 1
                continue
            self._pairs.append(Pair(episodes[best], episodes[worst]))
            margins.append(float(rewards[best] - rewards[worst]))
        found = {"objective/pairs": float(len(self._pairs)), "objective/ties": float(ties)}
        return found | ({"objective/scores_margin": float(np.mean(margins))} if margins else {})

    def loss(self) -> DPOLoss:
        return self.args.loss(self.args.temperature)

    def update(self, episodes: Sequence[Episode]) -> dict[str, float]:
        updater: Any = self._ready()
        return updater.run_pairs(self._pairs, self.loss(), self.state.global_step)


def main(argv: list[str]) -> int:
    """The `fastalign online-dpo` command."""
    return run_policy("online-dpo", OnlineDPOConfig, OnlineDPOTrainer, argv)
