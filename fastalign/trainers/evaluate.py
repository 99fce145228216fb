"""Models against held-out prompts: reward with its interval, win rate, length, how often texts end, perplexity.

    fastalign eval --models runs/sft,runs/dpo --dataset held_out.jsonl --reward runs/reward

or from Python: `evaluate(EvalConfig(models=["runs/sft", "runs/dpo"], dataset="held_out.jsonl", reward="gold"))`.

Every model draws its continuations of the same prompts with the same seed. Intervals are 95 %, over prompts: samples of
one prompt are averaged first. A win is a higher reward than the first model's on the same prompt, sample against
sample; a tie is half of one. Perplexity is that of the rows' own completions (`completion`, or `chosen`), per token.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from . import arguments
from .arguments import key
from .checkpoints import write_json
from .config import check_choice, check_positive
from .data.collate import IGNORE, SFTCollator
from .data.encode import Encoder
from .data.files import read_rows
from .data.tokenize import tokenize_sft
from .eval.estimates import distinct, estimate
from .eval.sampling import Sampling, sample
from .eval.scorers import Judge, load_judge
from .model_logits import logits_of
from .run import pad_id
from .sample import load, read_prompts

_COMPLETIONS = ("completion", "chosen")


@dataclass
class EvalConfig:
    """Compares language models on held-out prompts."""

    models: list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, "Folders of the models, separated by commas; the first is what the others are compared with",
        group="Model and data",
    )  # fmt: skip
    dataset: str | None = key(None, "Rows with a column prompt; completion or chosen too", group="Model and data")
    limit: int = key(0, "Use the first so many rows; 0: all", group="Model and data")
    reward: str | None = key(
        None, "What judges: a reward model's folder, gold (movie reviews), or module:function", group="Model and data"
    )
    dtype: str = key("float32", "Dtype of the weights: float32, bfloat16 or float16", group="Model and data")
    output: str | None = key(None, "A .json file for the figures")
    samples_per_prompt: int = key(4, "Continuations of each prompt")
    max_new_tokens: int = key(64, "Tokens of a continuation, at most")
    max_length: int = key(1024, "Tokens of prompt and completion where perplexity is taken; the rest is cut")
    temperature: float = key(1.0, "Divides the logits; 0 takes the likeliest token each time")
    batch_size: int = key(64, "Texts that are drawn or scored at once")
    seed: int = key(0, "Seed of the draws")

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_positive("samples_per_prompt", self.samples_per_prompt)
        if self.limit < 0:
            raise ValueError(f"limit must be at least 0; got {self.limit}")
        Sampling(self.max_new_tokens, self.batch_size, self.temperature)


def evaluate(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Figures of each model, by its folder: see the table at `figures`."""
    if not config.models or not config.dataset:
        raise ValueError("eval needs models and a dataset")
    prompts = read_prompts(config.dataset, config.limit)
    judge = load_judge(config.reward, batch_size=config.batch_size) if config.reward else None
    result: dict[str, dict[str, Any]] = {}
    first: np.ndarray | None = None
    for path in config.models:
        model, tokenizer = load(path, None, config.dtype)
        result[path], rewards = figures(model, tokenizer, prompts, judge, first, config)
        first = rewards if first is None else first
        result[path]["perplexity"] = perplexity(model, tokenizer, config)
    return result


def figures(
    model: Any, tokenizer: Any, prompts: Sequence[Any], judge: Judge | None, first: Any, config: EvalConfig
) -> tuple[dict[str, Any], np.ndarray | None]:
    """({figure: value}, rewards [prompts, samples]).

    `reward` and `win_rate` (against `first`, the first model's rewards) and `tokens` are estimates with intervals;
    `ended` is the share of texts that ended by themselves, `distinct_2` that of different word pairs.
    """
    set_seed(config.seed)
    how = Sampling(config.max_new_tokens, config.batch_size, config.temperature)
    drawn = sample(model, tokenizer, prompts, per_prompt=config.samples_per_prompt, how=how)
    texts = [[s.text for s in each] for each in drawn]
    out: dict[str, Any] = {
        "tokens": estimate(np.array([[len(s.ids) for s in each] for each in drawn]))._asdict(),
        "ended": float(np.mean([s.finished for each in drawn for s in each])),
        "distinct_2": distinct([t for each in texts for t in each], 2),
        "prompts": len(prompts),
    }
    if judge is None:
        return out, None
    flat = [t for each in texts for t in each]
    rewards = judge([p for p, each in zip(prompts, texts, strict=True) for _ in each], flat).reshape(len(prompts), -1)
    out["reward"] = estimate(rewards)._asdict()
    if first is not None:
        out["win_rate"] = estimate((rewards > first) + 0.5 * (rewards == first))._asdict()
    return out, rewards


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, config: EvalConfig) -> float | None:
    """exp of the mean negative log-likelihood per token of the rows' own completions; None if they have none."""
    rows = read_rows(str(config.dataset))
    column = next((name for name in _COMPLETIONS if name in rows.column_names), None)
    if column is None:
        return None
    rows = rows.select(range(min(config.limit or len(rows), len(rows))))
    rows = rows.select_columns(["prompt", column]).rename_columns({column: "completion"} if column == "chosen" else {})
    tokenised = tokenize_sft(rows, Encoder(tokenizer, config.max_length))
    collate, total, count = SFTCollator(pad_id(tokenizer)), 0.0, 0
    order = sorted(range(len(tokenised)), key=lambda i: tokenised[i]["length"])
    for start in range(0, len(order), config.batch_size):
        batch = collate([tokenised[i] for i in order[start : start + config.batch_size]])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        total -= float(logits_of(model, batch).stats(batch["labels"]).logps.sum())
        count += int((batch["labels"] != IGNORE).sum())
    return math.exp(total / count)


# -------------------------------------------------------------------------------------------------------------- table
def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> int:
    """The `fastalign eval` command."""
    try:
        config = arguments.parse(EvalConfig, argv, command="eval", needs=("models", "dataset"))
    except arguments.Helped as text:
        print(text)
        return 0
    result = evaluate(config)
    columns = ("reward", "win_rate", "perplexity", "tokens", "ended", "distinct_2")
    names = [n for n in columns if any(figure.get(n) is not None for figure in result.values())]
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("model", *names)
    for model, figure in result.items():
        table.add_row(model, *(_cell(figure.get(n)) for n in names))
    console.print(table)
    if config.output is not None:
        path = Path(os.path.expanduser(config.output))
        write_json(path, json.loads(json.dumps(result)))
        print(f"figures in {path}")
    return 0
