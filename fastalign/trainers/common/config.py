"""What every training command can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ...models.adapters import MODES as ADAPTER_MODES
from ...utils.checks import check_choice, check_positive
from ..data import cut
from ..data.cut import mode_of
from ..data.problems import Reading, columns_of
from ..data.template import OPTIONS_HELP, PATH_HELP
from .arguments import Keys, key

COMMON = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
    "seed",
)
"""Keys of transformers.TrainingArguments that the help of a command explains in full."""

DTYPES = ("float32", "bfloat16", "float16")
"""Of weights."""

STRATEGIES = ("group_by_length", "random", "sequential", "batch_rebalance")
"""Orders of the rows: ours and transformers'."""

_REPLACED = {
    "label_smoothing_factor": (0.0, "label_smoothing"),
    "use_liger_kernel": (False, "nothing: fastalign's own kernels always serve the loss"),
}


@dataclass
class CommonConfig(Keys):
    """Keys of every command that trains: the model, its head and adapters, the data, and where it goes."""

    truncation_modes: ClassVar[tuple[str, ...]] = cut.MODES
    """What the command's truncation_mode may be."""

    model: str | None = key(None, "Folder (or hub name) of the causal language model to train", group="Model and data")
    tokenizer: str | None = key(None, "Folder of the tokenizer, if not the model's own", group="Model and data")
    dtype: str = key("float32", "Dtype of the weights: float32, bfloat16 or float16", group="Model and data")
    attn_implementation: str | None = key(
        None, "Attention of the model, as in transformers (eager, sdpa, ...)", group="Model and data"
    )
    dataset: str | list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, "Training data: .jsonl, .json, .csv, .parquet, a folder, a pattern of files, or several of them",
        group="Model and data",
    )  # fmt: skip
    eval_dataset: str | list[str] | dict[str, str] | None = key(  # noqa: RUF009
        None, "Evaluation data of the same form; or several sets, by name", group="Model and data"
    )
    columns: dict[str, str] | str = key(  # noqa: RUF009
        "", "Names of columns in the data and here: question=prompt,answer=completion", group="Model and data"
    )
    skip_bad_rows: bool = key(
        False, "Leave faulty rows out, and say how many and which; false: refuse the data", group="Model and data"
    )
    truncation_mode: str = key(
        "left",
        "For rows beyond max_length: left cuts prompts (to a quarter of it at least), then replies; right cuts replies "
        "alone; drop; raise",
        group="Model and data",
    )
    chat_template_path: str | None = key(None, PATH_HELP, group="Model and data")
    chat_template_kwargs: dict[str, Any] | None = key(  # noqa: RUF009
        None, OPTIONS_HELP, group="Model and data"
    )
    fused_head: bool = key(
        True,
        "Losses from hidden states, logits never held whole; false, or a head of unknown form: whole logits",
        group="Loss",
    )
    chunk_bytes: int | None = key(
        None,
        "Memory for logits in bytes; beyond it they are computed twice. By default an eighth of the machine's",
        group="Loss",
    )
    lora_rank: int = key(0, "Rank of LoRA adapters; 0 trains all weights", group="LoRA")
    lora_alpha: int = key(16, "Scale of the adapters: they are multiplied by lora_alpha / lora_rank", group="LoRA")
    lora_dropout: float = key(0.0, "Dropout in front of the adapters", group="LoRA")
    lora_target_modules: list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, "Names of the layers that get adapters; all linear ones by default", group="LoRA"
    )
    adapters: str = key(
        "merge",
        "Where model is a folder of adapters: merge them into the weights, continue to train them, or stack new ones "
        "(lora_rank) on them, with which they are saved as one",
        group="LoRA",
    )
    lora_merge: bool = key(
        True, "Save a plain model with the adapters merged in at the end; false: the adapters alone", group="LoRA"
    )
    output_dir: str | None = key(None, "Folder for checkpoints, logs and the trained model")
    overwrite_output_dir: bool = key(
        False, "Train from the start, even over the checkpoints or the model in output_dir"
    )
    resume_from_checkpoint: str | None = key(
        None, "Continue: 'auto' for the newest whole checkpoint, or its folder", bare=True
    )

    def __post_init__(self) -> None:
        self.dtype = str(self.dtype).removeprefix("torch.")
        check_choice("dtype", self.dtype, DTYPES)
        self.columns = columns_of(self.columns)
        self.truncation_mode = mode_of(self.truncation_mode, self.truncation_modes)
        if self.chunk_bytes is not None:
            check_positive("chunk_bytes", self.chunk_bytes)
        check_positive("lora_alpha", self.lora_alpha)
        check_choice("adapters", self.adapters, ADAPTER_MODES)
        if self.adapters == "continue" and self.lora_rank:
            raise ValueError(f"lora_rank must be 0 with adapters=continue, which adds none; got {self.lora_rank}")
        if self.adapters == "stack" and not self.lora_rank:
            raise ValueError("lora_rank must be above 0 with adapters=stack: the rank of the new ones; got 0")
        if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_rank must be at least 0 and lora_dropout in [0, 1); got {self.lora_rank} and {self.lora_dropout}"
            )
        self.output_dir = self.output_dir and os.path.expanduser(self.output_dir)

    @property
    def reading(self) -> Reading:
        """How the data is read."""
        return Reading(columns_of(self.columns), self.skip_bad_rows)


@dataclass
class TrainingConfig(CommonConfig, TrainingArguments):
    """Keys shared by the training commands; every key of transformers.TrainingArguments is accepted beside them."""

    max_length: int = key(
        1024, "Tokens of prompt and completion together; what is longer: see truncation_mode", group="Model and data"
    )
    max_prompt_length: int | None = key(
        None,
        "Tokens of the prompt; what is longer loses its beginning (or see truncation_mode)",
        group="Model and data",
    )
    append_eos: bool = key(True, "End every completion with the end-of-sequence token", group="Model and data")
    padding_side: str = key(
        "right", "Side of a batch's padding: right or left, with one result", group="Model and data"
    )
    train_sampling_strategy: str = key(
        "group_by_length",
        "Order of the rows: group_by_length (random updates, sorted by length among their micro-batches), random or "
        "sequential",
        group="Training loop",
    )
    logging_steps: float = key(10, "Log every so many updates", group="Training loop")

    def __post_init__(self) -> None:
        for name, (default, instead) in _REPLACED.items():
            if getattr(self, name) != default:
                raise ValueError(f"--{name} is not used here; use {instead}")
        CommonConfig.__post_init__(self)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_positive(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if self.max_steps != -1:  # which transformers takes for "as many as num_train_epochs makes"
            check_positive("max_steps", self.max_steps)
        for name in ("num_train_epochs", "logging_steps", "save_steps"):
            check_positive(name, getattr(self, name))
        check_choice("train_sampling_strategy", self.train_sampling_strategy, STRATEGIES)
        check_choice("padding_side", self.padding_side, ("right", "left"))
        check_positive("max_length", self.max_length)
        if self.max_prompt_length is not None:
            check_positive("max_prompt_length", self.max_prompt_length)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        # The columns that our collators read are not arguments of the model's forward, so none may be dropped.
        self.remove_unused_columns = False
        # Transformers' filter shows the mean of earlier losses in place of NaN; our runs stop at one (see `finite`).
        self.logging_nan_inf_filter = False
        TrainingArguments.__post_init__(self)


def share_prompts_key() -> Any:
    """The key of the commands that have several completions of one prompt."""
    return key(
        None,
        "Run a prompt once for all of its completions, if the model can. By default on a CPU; it attends through a "
        "mask, which some of a GPU's attention kernels do not take",
        group="Training loop",
    )


@dataclass
class GroupsConfig(TrainingConfig):
    """Keys of the commands whose rows hold several completions of one prompt."""

    share_prompts: bool | None = share_prompts_key()
