"""What would go wrong in a run, said before it: `fastalign doctor`.

    fastalign doctor --model runs/sft --dataset pairs.jsonl --reward_model runs/reward

Looks at the data as the trainers read it, at the tokenizer, the model and a reward model, and prints one line for each
check: ok, note, warning or error, with what to do. The exit status is 1 if there was an error. From Python:
`examine(DoctorConfig(...))` returns the findings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from ..evaluation.sample import load
from ..models import loading
from ..trainers.common import arguments
from ..trainers.common.arguments import Keys, key
from ..trainers.common.config import DTYPES
from ..trainers.data.cut import mode_of
from ..trainers.data.encode import Encoder
from ..trainers.data.files import check_sources, read_rows
from ..trainers.data.problems import Reading, columns_of, tally
from ..trainers.data.template import OPTIONS_HELP, PATH_HELP
from ..utils.checks import check_choice, check_positive
from .data import DATA_CHECKS, Finding, Patient
from .model import MODEL_CHECKS, REWARD_CHECKS, TEACHER_CHECKS

_COLOURS = {"ok": "green", "note": "blue", "warning": "yellow", "error": "red"}


@dataclass
class DoctorConfig(Keys):
    """Looks at data, tokenizer and models before a run, and says what would go wrong. Without keys: at the
    installation, its backends, numbers and speed, in a report for others to read."""

    model: str | None = key(None, "Folder (or hub name) of the language model to train", group="Model and data")
    tokenizer: str | None = key(None, "Folder of the tokenizer, if not the model's own", group="Model and data")
    dataset: str | list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, "Training data, in any form that the trainers take", group="Model and data"
    )
    columns: dict[str, str] | str = key(  # noqa: RUF009
        "", "As in the run: names of columns in the data and here, question=prompt,answer=completion",
        group="Model and data",
    )  # fmt: skip
    reward_model: str | None = key(None, "Folder of a reward model to look at as well", group="Model and data")
    teacher_model: str | None = key(
        None, "Folder of the teacher of a distillation to look at as well", group="Model and data"
    )
    dtype: str = key("float32", "Dtype of the weights: float32, bfloat16 or float16", group="Model and data")
    max_length: int = key(1024, "As in the run: tokens of prompt and completion", group="Model and data")
    max_prompt_length: int | None = key(None, "As in the run: tokens of the prompt", group="Model and data")
    truncation_mode: str = key("left", "As in the run: left, right, drop or raise", group="Model and data")
    append_eos: bool = key(True, "As in the run: end completions with an end-of-sequence token", group="Model and data")
    per_device_train_batch_size: int = key(8, "As in the run: rows of a micro-batch", group="Training loop")
    gradient_checkpointing: bool = key(False, "As in the run", group="Training loop")
    reference_model: bool = key(False, "The run holds a second model in memory", group="Training loop")
    rows: int = key(1000, "Rows to look at; drawn at random if there are more")
    seed: int = key(0, "Seed of that choice and of the sampled texts")
    chat_template_path: str | None = key(None, PATH_HELP, group="Model and data")
    chat_template_kwargs: dict[str, Any] | None = key(  # noqa: RUF009
        None, OPTIONS_HELP, group="Model and data"
    )

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        self.columns = columns_of(self.columns)
        self.truncation_mode = mode_of(self.truncation_mode)
        check_positive("rows", self.rows)
        check_positive("per_device_train_batch_size", self.per_device_train_batch_size)


def examine(config: DoctorConfig) -> list[Finding]:
    """All findings, in the order of the checks. ValueError if model or dataset are missing or cannot be read."""
    if not config.model or not config.dataset:
        raise ValueError("doctor needs a model and a dataset")
    check_sources(config, ("dataset",))
    model, tokenizer = load(config.model, config.tokenizer, config.dtype, chat_template_path=config.chat_template_path)
    encode = Encoder(
        tokenizer,
        config.max_length,
        config.max_prompt_length,
        config.append_eos and tokenizer.eos_token_id is not None,
        config.chat_template_kwargs or {},
        truncation_mode=config.truncation_mode,
    )
    with tally("dataset", told=False) as counts:
        # What a run refuses is to be found, all of it: the faulty rows are told, the others looked at.
        rows = read_rows(config.dataset, Reading(columns_of(config.columns), skip_bad_rows=True))
    patient = Patient(config, _some(rows, config), encode, model, said=counts.said)
    checks: dict[str, Callable[[Any], list[Finding]]] = {**DATA_CHECKS, **MODEL_CHECKS}
    if config.reward_model:
        patient.reward_tokenizer = loading.load_tokenizer(None, config.reward_model, "reward_model")
        reward_model = loading.load("reward_model", AutoModelForSequenceClassification, config.reward_model)
        patient.reward_model = loading.placed(reward_model.eval())
        checks |= REWARD_CHECKS
    if config.teacher_model:
        dtype = getattr(torch, config.dtype)
        patient.teacher = loading.load("teacher_model", AutoModelForCausalLM, config.teacher_model, dtype=dtype)
        patient.teacher_tokenizer = loading.load_tokenizer(None, config.teacher_model, "teacher_model")
        checks |= TEACHER_CHECKS
    set_seed(config.seed)
    findings: list[Finding] = []
    for name, check in checks.items():
        found = check(patient)
        findings += [f._replace(check=name) for f in found] or [Finding("ok", "", name)]
    return findings


def _some(rows: Dataset, config: DoctorConfig) -> Dataset:
    if len(rows) <= config.rows:
        return rows
    return rows.shuffle(seed=config.seed).select(range(config.rows))


def main(argv: list[str]) -> int:
    """The `fastalign doctor` command: 1 if there was an error, else 0."""
    config = arguments.parse(DoctorConfig, argv, command="doctor", needs=("model", "dataset"))
    findings = examine(config)
    console = Console(width=None if Console().is_terminal else 110)
    for f in findings:
        console.print(f"[{_COLOURS[f.level]}]{f.level:<8}[/] [bold]{f.check}[/] {escape(f.text)}")
    return int(any(f.level == "error" for f in findings))
