"""What the commands that learn from their own samples (`ppo`, `grpo`) can be told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...losses.base import check_range
from ...losses.kl import KL_ALIASES, KL_ESTIMATORS
from ...utils.checks import check_choice, check_positive
from ..common.arguments import Keys, key
from ..common.config import CommonConfig, share_prompts_key
from .kinds import KindConfig

_POSITIVE = (
    "max_prompt_length",
    "response_length",
    "temperature",
    "num_generations",
    "rollout_batch_size",
    "num_ppo_epochs",
    "num_mini_batches",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
)
_NOT_NEGATIVE = ("top_k", "warmup_steps", "weight_decay", "max_grad_norm", "kl_coef", "entropy_coef")
_EVERY = ("total_episodes", "eval_steps", "save_steps", "save_total_limit", "ptx_batch_size")
_RANGES: dict[str, tuple[float, bool]] = {
    "cliprange": (0, False),
    "dual_clip": (1, True),
    "missing_eos_penalty": (0, False),
    "ptx_coef": (0, False),
}
"""Lower bounds, and whether they are out of range themselves, of what the losses would refuse after a whole rollout."""


@dataclass
class EpisodeConfig(Keys):
    """What is sampled, how it is rewarded, and what the loss makes of it."""

    reward_model: str | None = key(
        None, "Folder of a sequence-classification model with one output: the reward", group="Reward"
    )
    reward_fn: str | list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None,
        "Python function as the reward, module:function or file.py:function; it takes the lists prompts (as the rows "
        "have them, text or messages) and completions, and columns of the dataset by their names, and returns a number "
        "for each. Several, with commas between: their sum",
        group="Reward",
    )
    reward_weights: list[float] | None = key(  # noqa: RUF009
        None, "What the numbers of several functions are multiplied with; 1 each by default", group="Reward"
    )
    missing_eos_penalty: float | None = key(
        None, "Subtracted from the score of a response that did not end by itself", group="Reward"
    )
    response_length: int = key(64, "Tokens sampled per response, at most", group="Sampling")
    temperature: float = key(1.0, "Temperature of sampling, and of every log-probability", group="Sampling")
    top_k: int = key(
        0,
        "Sample from the k likeliest tokens only; 0 for all. The policy stays that of all: see rollout_is",
        group="Sampling",
    )
    top_p: float = key(
        1.0, "Sample from the likeliest tokens of this total probability only; as top_k", group="Sampling"
    )
    num_generations: int = key(1, "Responses sampled per prompt", group="Sampling")
    rollout_batch_size: int = key(64, "Responses sampled and scored at once, per process", group="Sampling")
    kl_coef: float = key(0.05, "Weight of the KL to the reference", group="Loss")
    kl_in: str = key("reward", "Where that KL counts: in the reward or in the loss", group="Loss")
    kl_estimator: str = key(
        "k1",
        "Estimator of that KL: k1, k2, k3, k3+ (k3 with k2's gradient), k3_clamped, abs or exact (whole vocabulary)",
        group="Loss",
    )
    cliprange: float = key(0.2, "How far the policy's ratio may go from 1 before it is cut", group="Loss")
    cliprange_high: float | None = key(None, "The same upwards, where it differs", group="Loss")
    dual_clip: float | None = key(None, "Bound of the loss where the advantage is negative, usually 3", group="Loss")
    entropy_coef: float = key(0.0, "Weight of the entropy bonus", group="Loss")
    ref_model: str | None = key(
        None, "Folder of the reference model, if not the model as it was at the start", group="Reference"
    )
    total_episodes: int | None = key(None, "Responses to sample in all; num_train_epochs by default")


@dataclass
class PolicyConfig(CommonConfig, EpisodeConfig, KindConfig):
    """Keys shared by the commands that sample from the policy that they train."""

    truncation_modes: ClassVar[tuple[str, ...]] = ("left", "drop", "raise")

    model: str | None = key(None, "Folder (or hub name) of the language model to train", group="Model and data")
    dataset: str | list[str] | None = key(  # noqa: RUF009
        None, "Rows with a prompt: .jsonl, .json, .csv, .parquet, a folder, a pattern of files, or several of them",
        group="Model and data",
    )  # fmt: skip
    eval_dataset: str | list[str] | dict[str, str] | None = key(  # noqa: RUF009
        None, "Prompts to evaluate on, of the same form; or several sets, by name", group="Model and data"
    )
    max_prompt_length: int = key(512, "Tokens of the prompt; longer: see truncation_mode", group="Model and data")
    truncation_mode: str = key(
        "left",
        "For prompts beyond max_prompt_length: left cuts their beginning, for policy and reward alike; drop; raise",
        group="Model and data",
    )
    lora_dropout: float = field(default=0.0, init=False)  # not a key: here nothing may be dropped
    num_train_epochs: float = key(1.0, "Passes over the prompts", group="Training loop")
    num_ppo_epochs: int = key(4, "Passes over each batch of responses", group="Training loop")
    num_mini_batches: int = key(1, "Updates in such a pass", group="Training loop")
    per_device_train_batch_size: int = key(
        8, "Responses in a forward and backward pass, per process", group="Training loop"
    )
    gradient_accumulation_steps: int = key(1, "Such passes per update", group="Training loop")
    learning_rate: float = key(1e-6, "Peak learning rate", group="Training loop")
    lr_scheduler_type: str = key("linear", "Schedule of the learning rate, as in transformers", group="Training loop")
    warmup_steps: float = key(0, "Updates of warm-up; below 1, their share of all updates", group="Training loop")
    weight_decay: float = key(0.0, "Weight decay of the matrices", group="Training loop")
    adam_beta1: float = key(0.9, "AdamW's beta1", group="Training loop")
    adam_beta2: float = key(0.999, "AdamW's beta2", group="Training loop")
    adam_epsilon: float = key(1e-8, "AdamW's epsilon", group="Training loop")
    max_grad_norm: float = key(1.0, "Gradients are cut to this norm; 0 for never", group="Training loop")
    bf16: bool = key(False, "Compute in bfloat16, keep the weights as they are", group="Training loop")
    share_prompts: bool | None = share_prompts_key()
    gradient_checkpointing: bool = key(False, "Recompute activations: less memory, more time", group="Training loop")
    ptx_dataset: str | None = key(
        None, "Rows of prompt and completion whose likelihood is mixed into every update (PPO-ptx)", group="PPO-ptx"
    )
    ptx_coef: float = key(1.0, "Weight of their mean log-likelihood per token", group="PPO-ptx")
    ptx_batch_size: int | None = key(
        None, "Such rows per update, over all processes; as many as responses by default", group="PPO-ptx"
    )
    seed: int = key(0, "Seed of everything; samples depend on it and on nothing else")
    use_cpu: bool = key(False, "Stay on the CPU")
    logging_steps: int = key(1, "Log every so many steps (a step: one batch of responses and its updates)")
    eval_steps: int | None = key(None, "Evaluate every so many steps; at the end alone by default")
    save_steps: int | None = key(
        500, "Write a checkpoint every so many steps; null for none but of a run that fails, which always leaves one"
    )
    save_total_limit: int | None = key(None, "Checkpoints to keep; all by default")
    load_best_model_at_end: bool = key(False, "Save the weights with the best eval score, not the last")
    report_to: list[str] = key("none", "Also log to: tensorboard, wandb, ... (accelerate's trackers)")  # noqa: RUF009
    run_name: str = key("fastalign", "Name of the run for them")
    disable_tqdm: bool = key(False, "No progress bar")

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        if not self.output_dir:
            raise ValueError("output_dir must be a folder; got none")
        self.report_to = [] if self.report_to in ("none", ["none"], None) else as_list(self.report_to)
        for name in _POSITIVE:
            check_positive(name, getattr(self, name))
        for name in _EVERY:
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        for name, (low, open_low) in _RANGES.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, open_low=open_low)
        if self.cliprange_high is not None:  # CISPO's weight may stay below 1
            cispo = "cispo" in (getattr(self, "loss_type", None), getattr(self, "objective", None))
            below = 1.0 if self.cliprange is None else self.cliprange
            check_range("cliprange_high", self.cliprange_high, -below if cispo else 0)
        check_choice("kl_in", self.kl_in, ("reward", "loss"))
        self.kl_estimator = KL_ALIASES.get(self.kl_estimator, self.kl_estimator)
        check_choice("kl_estimator", self.kl_estimator, (*KL_ESTIMATORS, "exact"))
        self.check_kind_options()
        if self.reward_weights is not None:
            self.reward_weights = numbers("reward_weights", self.reward_weights)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.kl_coef:
            raise ValueError(
                "kl_estimator must be other than k1 with kl_in=loss: as a loss, k1 has no gradient on average"
            )
        if self.load_best_model_at_end and self.eval_steps is None:
            raise ValueError("load_best_model_at_end needs eval_steps; got none")
        if self.local_batch_size % self.num_generations:
            raise ValueError(
                "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches must be a multiple of "
                f"num_generations; got {self.local_batch_size} and {self.num_generations}"
            )

    @property
    def local_batch_size(self) -> int:
        """Responses of a step in one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    def steps(self, prompts: int, processes: int) -> int:
        """Steps of the whole run over that many prompts."""
        episodes = self.total_episodes or math.ceil(self.num_train_epochs * prompts * self.num_generations)
        return math.ceil(episodes / (self.local_batch_size * processes))

    @property
    def needs_reference(self) -> bool:
        """Whether anything holds the policy to a reference; with kl_coef 0 none is loaded and no KL is reported."""
        return self.kl_coef > 0


def numbers(name: str, values: Iterable[Any]) -> list[float]:
    """Them as finite numbers; ValueError naming the key."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be finite numbers; got {values!r}")
    return found


def as_list(names: str | Iterable[str]) -> list:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)
