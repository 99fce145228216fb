"""Continuations of prompts, as rows that can be ranked and trained on.

    fastalign sample --model runs/sft --prompt "the movie" --samples_per_prompt 4
    fastalign sample --model runs/sft --dataset prompts.jsonl --output samples.jsonl

Rows are `prompt`, `completions` and `finished` (whether each came to its own end); `fastalign pro` and `fastalign
reward` take them once `rewards` or `ranks` stand beside. From Python: `fastalign.trainers.eval.sampling.sample`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from ..models import loading
from ..models.sampling import Sampling
from ..trainers.common import arguments
from ..trainers.common.arguments import Keys, key
from ..trainers.common.config import DTYPES
from ..trainers.data.chat import check_messages, is_chat, template_options
from ..trainers.data.files import Rows, read_rows
from ..trainers.data.problems import Reading, columns_of
from ..trainers.data.targets import as_prompts
from ..trainers.data.template import OPTIONS_HELP, PATH_HELP, use_template
from ..trainers.data.tokenize import TEMPLATE_COLUMNS
from ..utils.checks import check_choice, check_positive
from .sampling import Sample, sample


@dataclass
class DrawConfig(Keys):
    """Keys of the commands that draw continuations of prompts."""

    dataset: str | None = key(None, "Rows with a column prompt", group="Model and data")
    columns: dict[str, str] | str = key(  # noqa: RUF009 (it makes a dataclasses.field)
        "", "Names of columns in the data and here: question=prompt,answer=completion", group="Model and data"
    )
    limit: int = key(0, "Use the first so many rows; 0: all", group="Model and data")
    dtype: str = key("float32", "Dtype of the weights: float32, bfloat16 or float16", group="Model and data")
    output: str | None = key(None, "A file to write")
    samples_per_prompt: int = key(1, "Continuations of each prompt")
    max_new_tokens: int = key(64, "Tokens of a continuation, at most")
    temperature: float = key(1.0, "Divides the logits; 0 takes the likeliest token each time")
    batch_size: int = key(64, "Continuations drawn at once")
    seed: int = key(0, "Seed of the draws")
    chat_template_path: str | None = key(None, PATH_HELP, group="Model and data")
    chat_template_kwargs: dict[str, Any] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, OPTIONS_HELP, group="Model and data"
    )

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_positive("samples_per_prompt", self.samples_per_prompt)
        if self.limit < 0:
            raise ValueError(f"limit must be at least 0; got {self.limit}")
        self.columns = columns_of(self.columns)
        self.how()

    def how(self) -> Sampling:
        """The draws that these keys describe."""
        return Sampling(self.max_new_tokens, self.batch_size, self.temperature)


@dataclass
class SampleConfig(DrawConfig):
    """Draws continuations of prompts from a language model."""

    model: str | None = key(None, "Folder (or hub name) of the causal language model", group="Model and data")
    tokenizer: str | None = key(None, "Folder of the tokenizer, if not the model's own", group="Model and data")
    prompt: str | None = key(None, "A prompt", group="Model and data")
    dataset: str | None = key(None, "Rows with a column prompt (text or messages), instead", group="Model and data")
    output: str | None = key(None, "A .jsonl file to write; the screen by default")
    top_k: int = key(0, "Draw among the k likeliest tokens; 0: all")
    top_p: float = key(1.0, "Draw among the likeliest tokens of this joint probability; 1: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.dataset is None):
            raise ValueError("give either --prompt or --dataset")

    def how(self) -> Sampling:
        return replace(super().how(), top_k=self.top_k, top_p=self.top_p)


def load(
    path: str, tokenizer: str | None, dtype: str, key: str = "model", chat_template_path: str | None = None
) -> tuple[Any, Any]:
    """(model on the accelerator if there is one, tokenizer), for inference; `key` is the one that gave the path."""
    model: Any = loading.load(key, AutoModelForCausalLM, path, dtype=getattr(torch, dtype)).eval()
    found = loading.load_tokenizer(tokenizer, path, key)
    use_template(found, chat_template_path)
    return loading.placed(model), found


def read_prompts(source: Rows, limit: int, columns: dict[str, str] | str = "") -> list[Any]:
    """The column `prompt` of a dataset: texts or messages. ValueError naming the row that is neither."""
    rows = as_prompts(read_rows(source, Reading(columns_of(columns))))
    if "prompt" not in rows.column_names:
        raise ValueError(f"dataset needs the column prompt; {source!r} has {', '.join(rows.column_names)}")
    prompts = list(rows["prompt"])[: limit or None]
    for i, prompt in enumerate(prompts):
        if is_chat(prompt):
            check_messages(prompt, f"column 'prompt', row {i} (from 0),")
        elif not isinstance(prompt, str):
            raise ValueError(f"column 'prompt' must hold text or messages; row {i} (from 0) has {prompt!r}")
    return prompts


def read_options(
    source: Rows, limit: int, given: Mapping[str, Any] | None, columns: dict[str, str] | str = ""
) -> list[dict[str, Any]]:
    """What the chat template is told of each row's prompt: the row's `tools` and `chat_template_kwargs` over `given`.

    Raises:
        ValueError: naming the row whose column is not of that form.
    """
    rows = read_rows(source, Reading(columns_of(columns)))
    names = [name for name in TEMPLATE_COLUMNS if name in rows.column_names]
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    out = []
    for i in range(len(rows)):
        try:
            out.append({**(given or {}), **template_options({name: rows[i][name] for name in names})})
        except ValueError as error:
            raise ValueError(f"row {i} (from 0): {error}") from None
    return out


def output_path(given: str | None) -> Path | None:
    """Where to write, its folder made before anything slow begins. ValueError if there is no such place."""
    if given is None:
        return None
    path = Path(os.path.expanduser(given))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output must be a file in a folder that can be made; got {given!r}: {error}") from error
    if path.is_dir():
        raise ValueError(f"output must be a file; {given!r} is a folder")
    return path


def main(argv: list[str]) -> int:
    """The `fastalign sample` command."""
    config = arguments.parse(SampleConfig, argv, command="sample", needs=("model",))
    path = output_path(config.output)
    prompts: list[Any] = [config.prompt]
    options: list[dict[str, Any]] = [{}]
    if config.dataset is not None:
        prompts = read_prompts(config.dataset, config.limit, config.columns)
        options = read_options(config.dataset, config.limit, config.chat_template_kwargs, config.columns)
    model, tokenizer = load(
        str(config.model), config.tokenizer, config.dtype, chat_template_path=config.chat_template_path
    )
    set_seed(config.seed)
    many = config.samples_per_prompt
    drawn = sample(model, tokenizer, prompts, per_prompt=many, how=config.how(), options=options)
    lines = [json.dumps(_line(*each), ensure_ascii=False) for each in zip(prompts, options, drawn, strict=True)]
    if path is None:
        print("\n".join(lines))
        return 0
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} rows in {path}")
    return 0


def _line(prompt: Any, options: Mapping[str, Any], drawn: Sequence[Sample]) -> dict[str, Any]:
    """A row to write: the prompt, with its tools, and what was drawn."""
    tools = {"tools": options["tools"]} if "tools" in options else {}
    texts, finished = [s.text for s in drawn], [s.finished for s in drawn]
    return {"prompt": prompt, **tools, "completions": texts, "finished": finished}
