"""What the studies can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..demo.config import DemoConfig
from ..trainers.common.arguments import Keys, key
from ..utils.checks import check_positive

_ANY = ("seeds", "first_seed", "processes", "max_seconds", "output_dir", "overwrite", "quick", "full", "methods")
"""Keys that say which cells are run and how, not what a cell is: they may change from one call to the next."""


@dataclass
class StudyConfig(Keys):
    """Keys of every study. Keys whose default is 0 are set by --quick (the default) or --full."""

    output_dir: str = key("runs/study", "Folder of the cells and the reports; studies of like settings may share it")
    overwrite: bool = key(False, "Remove what studies left in output_dir, and start anew")
    quick: bool = key(False, "Sizes for minutes on two cores, with a small model from scratch")
    full: bool = key(False, "Sizes for a GPU and hours, with a real 135M-parameter model and the papers' sweeps")
    seeds: int = key(3, "Repetitions, each with its own split, model, samples and draws")
    first_seed: int = key(0, "The first of them; the others follow it")
    processes: int = key(2, "Cells trained side by side")
    max_seconds: float = key(0, "Start no further cell after so many seconds (the same command goes on); 0: never stop")
    model: str = key("", "scratch, smollm2, or the folder of a causal language model", group="Model and data")
    vocab_size: int = key(0, "Tokens of the tokenizer that scratch trains", group="Model and data")
    hidden_size: int = key(0, "Width of the scratch model", group="Model and data")
    layers: int = key(2, "Layers of the scratch model", group="Model and data")
    held_out: int = key(1600, "Reviews kept away from every fit, for prompts and figures", group="Model and data")
    sft_rows: int = key(0, "Reviews to fine-tune on", group="Training loop")
    sft_epochs: float = key(0, "Passes over them", group="Training loop")
    sft_learning_rate: float = key(0, "Peak learning rate of fine-tuning", group="Training loop")
    prompts: int = key(0, "Training prompts", group="Training loop")
    samples_per_prompt: int = key(6, "Continuations sampled of each, for pairs and lists", group="Training loop")
    min_gap: float = key(0.5, "Least difference in gold reward for a pair", group="Training loop")
    max_new_tokens: int = key(0, "Tokens sampled per continuation, at most", group="Model and data")
    eval_prompts: int = key(0, "Held-out prompts that figures are taken on", group="Evaluation")
    eval_samples: int = key(2, "Continuations of each", group="Evaluation")
    evaluations: int = key(0, "Times that a run is evaluated while it trains", group="Evaluation")
    best_of: int = key(0, "Samples of each held-out prompt for best-of-n: the largest n", group="Evaluation")
    preference_updates: int = key(0, "Updates of the methods that learn from pairs and lists", group="Training loop")
    preference_batch_size: int = key(0, "Pairs or lists in such an update", group="Training loop")
    preference_learning_rate: float = key(0, "Peak learning rate there", group="Training loop")
    reward_learning_rate: float = key(0, "Peak learning rate of the learned reward", group="Training loop")
    reward_epochs: float = key(1, "Its passes over reviews and samples", group="Training loop")
    policy_steps: int = key(0, "Steps of the methods that sample while they train", group="Training loop")
    policy_batch_size: int = key(0, "Responses in such a step", group="Training loop")
    policy_epochs: int = key(2, "PPO's passes over them", group="Training loop")
    policy_learning_rate: float = key(0, "Learning rate there", group="Training loop")
    missing_eos_penalty: float = key(0.0, "Subtracted there from the reward of a text without an end", group="Loss")
    length_alpha: float = key(0.01, "DPO-R's penalty, in nats a token", group="Loss")

    def __post_init__(self) -> None:
        if self.quick and self.full:
            raise ValueError("give one of --quick and --full; got both")
        for name, value in (_FULL if self.full else _QUICK).items():
            if not getattr(self, name):
                setattr(self, name, value)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and f.name not in _OPEN:
                check_positive(f.name, value)
        if self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt must be at least 2, to make pairs; got {self.samples_per_prompt}")
        if self.first_seed < 0:
            raise ValueError(f"first_seed must be at least 0; got {self.first_seed}")
        if self.max_seconds < 0:
            raise ValueError(f"max_seconds must be at least 0; got {self.max_seconds}")

    @property
    def all_seeds(self) -> range:
        """The repetitions' seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def settings(self) -> dict[str, Any]:
        """What a cell's result depends on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _ANY}

    def demo(self, seed: int) -> DemoConfig:
        """The demo's configuration for the setup of one seed: corpus, split, base model, fine-tuning."""
        names = (
            *("model", "vocab_size", "hidden_size", "layers", "held_out", "sft_rows", "sft_epochs"),
            *("sft_learning_rate", "prompts", "samples_per_prompt", "min_gap", "max_new_tokens", "eval_prompts"),
        )
        return DemoConfig(seed=seed, eval_samples=self.eval_samples, **{name: getattr(self, name) for name in names})


_OPEN = ("first_seed", "max_seconds", "min_gap", "missing_eos_penalty", "length_alpha")
_QUICK: dict[str, Any] = {
    "model": "scratch",
    "vocab_size": 4000,
    "hidden_size": 128,
    "sft_rows": 9003,
    "sft_epochs": 1.0,
    "sft_learning_rate": 3e-3,
    "prompts": 1000,
    "max_new_tokens": 32,
    "eval_prompts": 150,
    "evaluations": 3,
    "best_of": 16,
    "preference_updates": 48,
    "preference_batch_size": 32,
    "preference_learning_rate": 6e-4,
    "reward_learning_rate": 1e-3,
    "policy_steps": 16,
    "policy_batch_size": 96,
    "policy_learning_rate": 4e-4,
}
_FULL: dict[str, Any] = {
    "model": "smollm2",
    "vocab_size": 8000,
    "hidden_size": 192,
    "sft_rows": 9003,
    "sft_epochs": 1.0,
    "sft_learning_rate": 5e-5,
    "prompts": 4000,
    "max_new_tokens": 48,
    "eval_prompts": 500,
    "evaluations": 10,
    "best_of": 64,
    "preference_updates": 400,
    "preference_batch_size": 64,
    "preference_learning_rate": 2e-5,
    "reward_learning_rate": 5e-5,
    "policy_steps": 200,
    "policy_batch_size": 256,
    "policy_learning_rate": 1e-5,
}
