"""Models against held-out prompts: reward, win rate, KL, length, endings, perplexity, variety, with intervals.

    fastalign eval --models runs/sft,runs/dpo --dataset held_out.jsonl --reward runs/reward --reference runs/sft
    fastalign eval --models runs/sft,runs/dpo --dataset held_out.jsonl --judge http://localhost:8000/v1 --judge_model M

or from Python: `evaluate(EvalConfig(models=["runs/sft", "runs/dpo"], dataset="held_out.jsonl", reward="gold"))`.

Every model draws its continuations of the same prompts with the same seed. Intervals are 95 %, over prompts: samples of
one prompt are averaged first. The win rate is against the first model, or with `--against completion` the rows' own
completions, sample against sample; a tie is half of a win; its interval is a bootstrap. Who wins is up to `judge` (see
`eval.judges`), or else to the reward. Perplexity is that of the rows' own completions (`completion`, or `chosen`), per
token. `kl` is the exact KL to the reference, summed over a continuation; `kl_k1` and `kl_k3` estimate it by sampling.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from transformers import set_seed

from ..models.loading import pad_id
from ..trainers.common import arguments
from ..trainers.common.arguments import key
from ..trainers.common.checkpoints import write_json
from ..trainers.data.chat import check_messages, content_of, is_chat
from ..trainers.data.files import Rows, read_rows
from ..trainers.data.problems import Reading, columns_of
from ..trainers.data.tokenize import TEMPLATE_COLUMNS
from ..utils.checks import check_choice
from .diversity import self_bleu
from .estimates import distinct, estimate
from .judges import PairJudge, ScoreJudge, load_pair_judge
from .perplexity import likelihood
from .sample import DrawConfig, load, output_path, read_options, read_prompts
from .sampling import Sample, compare_policies, sample
from .scorers import FunctionJudge, Judge, load_judge
from .winrate import win_rate

_COMPLETIONS = ("completion", "chosen")
_COLUMNS = (
    *("reward", "win_rate", "ties", "consistency", "kl", "kl_k1", "kl_k3"),
    *("perplexity", "tokens", "ended", "distinct_2", "self_bleu"),
)


@dataclass
class EvalConfig(DrawConfig):
    """Compares language models on held-out prompts."""

    models: list[str] | None = key(  # noqa: RUF009 (it makes a dataclasses.field)
        None, "Folders of the models, separated by commas; the first is what the others are compared with",
        group="Model and data",
    )  # fmt: skip
    dataset: str | None = key(None, "Rows with a column prompt; completion or chosen too", group="Model and data")
    reward: str | None = key(
        None,
        "What judges: a reward model's folder, gold (movie reviews), or module:function or file.py:function as in grpo",
        group="Model and data",
    )
    judge: str | None = key(
        None, "What judges pairs: http(s)://host/v1 (OpenAI form), labels.jsonl, or as reward; the reward by default",
        group="Model and data",
    )  # fmt: skip
    judge_model: str = key("", "Name of the chat model behind the judge's address", group="Model and data")
    against: str = key("first", "What a win is over: the first model, or the rows' own completion")
    tie_margin: float = key(0.0, "Rewards no further apart than this are a tie")
    reference: str | None = key(None, "Folder of the model that the KL is taken to", group="Model and data")
    output: str | None = key(None, "A .json file for the figures")
    samples_per_prompt: int = key(4, "Continuations of each prompt")
    max_length: int = key(1024, "Tokens of prompt and completion where perplexity is taken; the rest is cut")
    batch_size: int = key(64, "Texts that are drawn or scored at once")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("against", self.against, ("first", "completion"))
        if (self.judge or "").startswith(("http://", "https://")) and not self.judge_model:
            raise ValueError(f"judge_model must be the chat model's name behind {self.judge}; got none")
        if self.reference is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0 where a KL is taken; got {self.temperature}")
        if not self.tie_margin >= 0:
            raise ValueError(f"tie_margin must be at least 0; got {self.tie_margin}")


def evaluate(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Figures of each model, by its folder: see `figures`, `versus` and `perplexity`."""
    if not config.models or not config.dataset:
        raise ValueError("eval needs models and a dataset")
    prompts = read_prompts(config.dataset, config.limit, config.columns)
    rows = own_completions(config.dataset, config.limit, config.columns)
    if config.against == "completion" and rows is None:
        raise ValueError("against=completion needs the column completion or chosen in dataset")
    score = load_judge(config.reward, batch_size=config.batch_size) if config.reward else None
    judge = _pair_judge(config, score)
    for each in {id(f): f for f in (score, getattr(judge, "score", None)) if isinstance(f, FunctionJudge)}.values():
        each.bind(prompts, read_rows(config.dataset))
    reference = load(config.reference, None, config.dtype, "reference")[0] if config.reference else None
    result: dict[str, dict[str, Any]] = {}
    base = None if config.against == "first" or rows is None else completion_texts(rows)
    options = read_options(config.dataset, config.limit, config.chat_template_kwargs, config.columns)
    many, how = config.samples_per_prompt, config.how()
    for path in config.models:
        model, tokenizer = load(path, None, config.dtype, "models", config.chat_template_path)
        set_seed(config.seed)
        drawn = sample(model, tokenizer, prompts, per_prompt=many, how=how, options=options)
        texts = [[s.text for s in each] for each in drawn]
        found = figures(drawn)
        if score is not None:
            found["reward"] = estimate(_scored(score, prompts, texts))._asdict()
        if judge is not None and base is not None:
            found |= versus(judge, prompts, texts, base)
        base = texts if base is None else base
        if reference is not None:
            found |= distance(model, reference, tokenizer, drawn, config)
        if rows is not None:
            found["perplexity"] = likelihood(
                model,
                tokenizer,
                rows,
                max_length=config.max_length,
                batch_size=config.batch_size,
                template_options=config.chat_template_kwargs,
            ).perplexity
        result[path] = found
    return result


def _pair_judge(config: EvalConfig, score: Judge | None) -> PairJudge | None:
    """What decides wins: the judge that was asked for, else the reward, else nothing."""
    if config.judge is not None:
        size = config.batch_size
        return load_pair_judge(config.judge, tie_margin=config.tie_margin, batch_size=size, model=config.judge_model)
    return None if score is None else ScoreJudge(score, config.tie_margin)


def _scored(score: Judge, prompts: Sequence[Any], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Rewards [prompts, samples]."""
    flat = [p for p, each in zip(prompts, texts, strict=True) for _ in each]
    return score(flat, [t for each in texts for t in each]).reshape(len(prompts), -1)


def figures(drawn: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """`tokens` of a continuation, an estimate; `ended`, the share that ended by themselves; `distinct_2`, that of
    different word pairs; `self_bleu`, where its package is installed and there are two texts; the number of `prompts`.
    """
    texts = [s.text for each in drawn for s in each]
    out: dict[str, Any] = {
        "tokens": estimate(np.array([[len(s.ids) for s in each] for each in drawn]))._asdict(),
        "ended": float(np.mean([s.finished for each in drawn for s in each])),
        "distinct_2": distinct(texts, 2),
        "prompts": len(drawn),
    }
    if len(texts) > 1 and importlib.util.find_spec("sacrebleu"):
        out["self_bleu"] = self_bleu(texts)
    return out


def versus(
    judge: PairJudge, prompts: Sequence[Any], ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """`win_rate` with its interval, the shares of `wins`, `ties` and `losses`; of a judge that sees an order also
    `consistency` (same verdict in both orders) and `first_position` (mean verdict for what was shown first)."""
    found = win_rate(judge, prompts, ours, theirs)
    out = {"win_rate": found.rate._asdict(), "wins": found.wins, "ties": found.ties, "losses": found.losses}
    if judge.positional:
        out |= {"consistency": found.consistency, "first_position": found.first_position}
    return out


def distance(
    model: Any, reference: Any, tokenizer: Any, drawn: Sequence[Sequence[Sample]], config: EvalConfig
) -> dict[str, Any]:
    """The KL to the reference, in nats a continuation: `kl` exact over the vocabulary, `kl_k1`, `kl_k3` by sampling."""
    flat = [s for each in drawn for s in each]
    size, shape = config.batch_size, (len(drawn), -1)
    found = compare_policies(model, reference, flat, pad_id(tokenizer), batch_size=size, temperature=config.temperature)
    by_name = {"kl": found.kl, "kl_k1": found.logp_ratio, "kl_k3": found.k3}
    return {name: estimate(value.reshape(shape).numpy())._asdict() for name, value in by_name.items()}


def own_completions(dataset: Rows, limit: int, columns: dict[str, str] | str = "") -> Any:
    """The rows' `prompt` and `completion` (or `chosen`, under that name), and what their chat template is told; None if
    they have neither."""
    rows = read_rows(dataset, Reading(columns_of(columns)))
    column = next((name for name in _COMPLETIONS if name in rows.column_names), None)
    if column is None:
        return None
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    kept = ["prompt", column, *(name for name in TEMPLATE_COLUMNS if name in rows.column_names)]
    return rows.select_columns(kept).rename_columns({column: "completion"} if column == "chosen" else {})


def completion_texts(rows: Any) -> list[list[str]]:
    """The rows' own completions, one for each prompt, as judges read the models': of messages, what the reply says.

    Raises:
        ValueError: naming the row whose completion is neither text nor one reply that says something.
    """
    out = []
    for i, completion in enumerate(rows["completion"]):
        if is_chat(completion):
            check_messages(completion, f"the completion of row {i} (from 0)")
            if len(completion) != 1 or completion[0]["role"] != "assistant" or completion[0].get("tool_calls"):
                raise ValueError(
                    "against=completion needs completions of text, or of one reply of the assistant without "
                    f"tool_calls; row {i} (from 0) has {len(completion)} messages, the last {dict(completion[-1])!r}"
                )
            completion = content_of(completion[0])
        if not isinstance(completion, str):
            raise ValueError(f"column 'completion' must hold text or messages; row {i} (from 0) has {completion!r}")
        out.append([completion])
    return out


# -------------------------------------------------------------------------------------------------------------- table
def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def told_apart(paths: Sequence[str]) -> list[str]:
    """Short names of folders: the last parts of each, as many as it takes for all to differ."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def main(argv: list[str]) -> int:
    """The `fastalign eval` command."""
    config = arguments.parse(EvalConfig, argv, command="eval", needs=("models", "dataset"))
    path = output_path(config.output)
    result = evaluate(config)
    names = [n for n in _COLUMNS if any(figure.get(n) is not None for figure in result.values())]
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(Column("model", overflow="fold"), *names)
    for model, figure in zip(told_apart(list(result)), result.values(), strict=True):
        table.add_row(model, *(_cell(figure.get(n)) for n in names))
    console.print(table)
    if path is not None:
        write_json(path, json.loads(json.dumps(result)))
        print(f"figures in {path}")
    return 0
