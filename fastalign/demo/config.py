"""What `fastalign demo` can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..trainers.common.arguments import Keys, key
from ..utils.checks import check_positive


@dataclass
class DemoConfig(Keys):
    """Aligns a small language model on human-rated movie reviews, and measures what that changed.

    Keys whose default is 0 are set by the kind of model: short runs for real models, which are slow here.
    """

    output_dir: str = key("runs/demo", "Folder for the model, the table, the curves and every stage's result")
    overwrite: bool = key(False, "Start anew even if output_dir holds a demo made with other settings")
    seed: int = key(0, "Seed of everything; two runs with one seed give the same numbers")
    model: str = key("scratch", "scratch, smollm2, or the folder of a causal language model", group="Model and data")
    vocab_size: int = key(8000, "Tokens of the tokenizer that scratch trains", group="Model and data")
    hidden_size: int = key(192, "Width of the scratch model", group="Model and data")
    layers: int = key(2, "Layers of the scratch model", group="Model and data")
    held_out: int = key(1600, "Reviews kept away from every fit, for prompts and figures", group="Model and data")
    opening_words: int = key(4, "Words of a review that make a prompt", group="Model and data")
    max_new_tokens: int = key(40, "Tokens sampled per continuation, at most", group="Model and data")
    samples_per_prompt: int = key(6, "Continuations sampled per training prompt", group="Model and data")
    min_gap: float = key(0.5, "Least difference in gold reward for a pair", group="Model and data")
    sft_rows: int = key(0, "Reviews to fine-tune on", group="Training loop")
    sft_epochs: float = key(0, "Passes over them", group="Training loop")
    sft_learning_rate: float = key(0, "Peak learning rate of fine-tuning", group="Training loop")
    sft_batch_size: int = key(0, "Reviews in an update of fine-tuning", group="Training loop")
    prompts: int = key(0, "Training prompts to sample continuations of", group="Training loop")
    dpo_epochs: float = key(1.0, "Passes over the pairs", group="Training loop")
    dpo_learning_rate: float = key(0, "Peak learning rate of DPO", group="Training loop")
    dpo_batch_size: int = key(0, "Pairs in an update of DPO", group="Training loop")
    beta: float = key(0.1, "Strength of DPO's pull towards the reference", group="Training loop")
    nll_weight: float = key(
        0.2, "Weight of the chosen texts' NLL beside DPO's loss: it keeps texts ending", group="Training loop"
    )
    length_alpha: float = key(0.0, "DPO's penalty for length, in nats a token", group="Training loop")
    eval_prompts: int = key(0, "Held-out prompts that figures are taken on", group="Training loop")
    eval_samples: int = key(4, "Continuations sampled per held-out prompt", group="Training loop")

    def __post_init__(self) -> None:
        defaults = _SCRATCH if self.model == "scratch" else _PRETRAINED
        for name, value in defaults.items():
            if getattr(self, name) == 0:
                setattr(self, name, value)
        for f in dataclasses.fields(self):
            if isinstance(getattr(self, f.name), (int, float)) and f.name not in _ANY:
                check_positive(f.name, getattr(self, f.name))
        if self.samples_per_prompt < 2:
            raise ValueError(f"samples_per_prompt must be at least 2, to make pairs; got {self.samples_per_prompt}")


_ANY = ("seed", "overwrite", "min_gap", "length_alpha", "nll_weight")
_SCRATCH: dict[str, Any] = {
    "sft_rows": 9003,
    "sft_epochs": 2.0,
    "sft_learning_rate": 2e-3,
    "sft_batch_size": 32,
    "prompts": 1000,
    "dpo_learning_rate": 4e-4,
    "dpo_batch_size": 32,
    "eval_prompts": 250,
}
_PRETRAINED: dict[str, Any] = {
    "sft_rows": 160,
    "sft_epochs": 1.0,
    "sft_learning_rate": 1e-4,
    "sft_batch_size": 8,
    "prompts": 48,
    "dpo_learning_rate": 5e-5,
    "dpo_batch_size": 8,
    "eval_prompts": 24,
}
