"""The methods on the frontier: what each is called, what its coefficient means, and how it is trained.

Every one starts from the same fine-tuned model and is watched while it trains. Those that learn from pairs or lists
see the same samples of that model, labelled by the gold reward; those that sample for themselves see the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.gold import Scorer
from ..trainers.dpo import DPOConfig, DPOTrainer
from ..trainers.grpo import GRPOConfig, GRPOTrainer
from ..trainers.ppo import PPOConfig, PPOTrainer
from ..trainers.pro import PROConfig, PROTrainer
from .callbacks import Tracker, TrackerCallback, marks
from .setup import Setup


@dataclass
class Job:
    """One run: a method at one value of its coefficient."""

    setup: Setup
    coefficient: float
    folder: Path
    """For what the trainer writes; it is removed afterwards."""
    tracker: Tracker


class Method(NamedTuple):
    """A method of the study."""

    label: str
    coefficient: str
    """What is swept."""
    train: Callable[[Job], None]
    quick: tuple[float, ...]
    full: tuple[float, ...]


# ------------------------------------------------------------------------------------------------- pairs and lists
def _preference_arguments(job: Job) -> dict[str, Any]:
    config = job.setup.config
    return {
        "output_dir": str(job.folder),
        "max_steps": config.preference_updates,
        "per_device_train_batch_size": config.preference_batch_size,
        "learning_rate": config.preference_learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.1,
        "max_length": 160,
        "logging_steps": config.preference_updates,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": job.setup.seed,
    }


def _fit(job: Job, trainer: Any) -> None:
    config = job.setup.config
    trainer.add_callback(TrackerCallback(job.tracker, marks(config.preference_updates, config.evaluations)))
    trainer.train()


def train_pairs(job: Job, rows: Any = None, **options: Any) -> None:
    """DPO and its relatives, on the setup's pairs or on other rows; options are those of the loss and of training."""
    model, tokenizer = job.setup.demo.load("sft")
    args = DPOConfig(**{**_preference_arguments(job), **options})
    rows = str(job.setup.file("pairs")) if rows is None else rows
    _fit(job, DPOTrainer(model, args, rows, None, tokenizer))


def _dpo(job: Job) -> None:
    train_pairs(job, beta=job.coefficient)


def _dpo_r(job: Job) -> None:
    train_pairs(job, beta=job.coefficient, length_alpha=job.setup.config.length_alpha)


def _ipo(job: Job) -> None:
    train_pairs(job, beta=job.coefficient, loss_type="ipo")


def _pro(job: Job) -> None:
    model, tokenizer = job.setup.demo.load("sft")
    args = PROConfig(**_preference_arguments(job), sft_weight=job.coefficient, sft_average=True)
    _fit(job, PROTrainer(model, args, str(job.setup.file("lists")), None, tokenizer))


# ------------------------------------------------------------------------------------------- sampling while training
def _policy_arguments(job: Job, generations: int = 1) -> dict[str, Any]:
    config = job.setup.config
    half = max(generations, config.policy_batch_size // 2 // generations * generations)
    return {
        "output_dir": str(job.folder),
        "total_episodes": config.policy_steps * 2 * half,
        "per_device_train_batch_size": half,
        "num_mini_batches": 2,
        "rollout_batch_size": 2 * half,
        "num_generations": generations,
        "response_length": config.max_new_tokens,
        "learning_rate": config.policy_learning_rate,
        "lr_scheduler_type": "constant",
        "missing_eos_penalty": config.missing_eos_penalty or None,
        "disable_tqdm": True,
        "seed": job.setup.seed,
    }


def _explore(job: Job, trainer: Any) -> None:
    steps = marks(trainer.total_steps, job.setup.config.evaluations)
    for step in range(1, trainer.total_steps + 1):
        trainer.step()
        if step in steps:
            job.tracker.look(step, trainer.inner.policy, end=step == steps[-1])


def reward_of(scorer: Scorer) -> Callable[[list[str], list[str]], list[float]]:
    """A scorer of whole texts as the policy trainers call a reward."""
    return lambda prompts, completions: scorer([f"{p}{c}" for p, c in zip(prompts, completions, strict=True)]).tolist()


def _ppo(job: Job, reward: str) -> None:
    """PPO with Ziegler's controller: the coefficient is the KL per response that it holds.

    The weight starts where a reward of the samples' spread, were it Gaussian, would have its optimum at the target: of
    such a reward the optimal policy for a weight b is spread^2 / (2 b^2) away. It then changes by a twentieth a step at
    most. A quick controller that starts low would take the weight to nothing while the KL still rises from 0, and
    overshoot.
    """
    setup = job.setup
    model, tokenizer = setup.demo.load("sft")
    scorer, arguments = setup.scorers[reward], _policy_arguments(job)
    args = PPOConfig(
        **arguments,
        num_ppo_epochs=setup.config.policy_epochs,
        kl_controller="adaptive",
        init_kl_coef=setup.spread(scorer) / math.sqrt(2 * job.coefficient),
        target=job.coefficient,
        horizon=4 * arguments["rollout_batch_size"],
    )
    _explore(job, PPOTrainer(model, args, str(setup.file("prompts")), None, tokenizer, reward=reward_of(scorer)))


def _ppo_gold(job: Job) -> None:
    _ppo(job, "gold")


def _ppo_learned(job: Job) -> None:
    _ppo(job, "proxy")


def _grpo(job: Job) -> None:
    setup = job.setup
    model, tokenizer = setup.demo.load("sft")
    args = GRPOConfig(**_policy_arguments(job, generations=4), kl_coef=job.coefficient)
    rows = str(setup.file("prompts"))
    _explore(job, GRPOTrainer(model, args, rows, None, tokenizer, reward=reward_of(setup.demo.gold)))


_BETAS, _PAPER_BETAS = (0.05, 0.5), (0.05, 0.1, 1.0, 5.0)  # Rafailov et al. 2023, sec. 6.1
_TARGETS, _PAPER_TARGETS = (3.0, 10.0), (3.0, 6.0, 9.0, 12.0)  # the same

METHODS: dict[str, Method] = {
    "dpo": Method("DPO", "beta", _dpo, _BETAS, _PAPER_BETAS),
    "dpo-r": Method("DPO-R", "beta", _dpo_r, _BETAS, _PAPER_BETAS),
    "ipo": Method("IPO", "beta", _ipo, _BETAS, _PAPER_BETAS),
    "pro": Method("PRO", "SFT weight", _pro, (0.02, 0.2), (0.01, 0.05, 0.2, 1.0)),
    "ppo-gold": Method("PPO, gold reward", "target KL", _ppo_gold, _TARGETS, _PAPER_TARGETS),
    "ppo-learned": Method("PPO, learned reward", "target KL", _ppo_learned, _TARGETS, _PAPER_TARGETS),
    "grpo": Method("GRPO, gold reward", "KL weight", _grpo, (0.02, 0.2), (0.01, 0.04, 0.2, 1.0)),
}
