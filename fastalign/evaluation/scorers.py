"""What judges texts in `fastalign eval`: a reward model, the gold reward of the movie reviews, or any function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..models.loading import load, load_tokenizer, pad_id, placed
from ..models.logits import model_logits
from ..trainers.data.chat import Messages, transcript
from ..trainers.data.collate import pad
from ..trainers.data.encode import Encoder
from ..trainers.data.reviews import load_reviews, split_reviews
from ..trainers.policy.reward_functions import NamedReward, RewardError, load_function
from .gold import fit_gold

Prompt: TypeAlias = str | Messages
Judge: TypeAlias = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]
"""(prompts, completions) → one score each; higher is better."""


def prompt_text(prompt: Prompt) -> str:
    """A prompt for a judge to read: a text, or a line for each message."""
    return prompt if isinstance(prompt, str) else transcript(prompt)


def whole_text(prompt: Prompt, completion: str) -> str:
    """Prompt and completion in one text."""
    return f"{prompt}{completion}" if isinstance(prompt, str) else f"{transcript(prompt)}\nassistant: {completion}"


def load_judge(spec: str, *, batch_size: int = 64, key: str = "reward") -> Judge:
    """The judge that a text names.

    Args:
        spec: `gold`; the folder of a sequence-classification model with one label; or `module:function` or
            `file.py:function`, a reward function as `grpo` takes it (see `reward_functions`): of prompts, completions
            and columns, by their names.
        batch_size: texts that a reward model scores at once.
        key: what gave the text.

    Raises:
        ValueError: none of these; naming the key.
    """
    if spec == "gold":
        return _gold()
    if os.path.isdir(os.path.expanduser(spec)):
        return reward_model(os.path.expanduser(spec), batch_size, key)
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise ValueError(f"{key} must be gold, the folder of a reward model, or module:function; got {spec!r}")
    return FunctionJudge(NamedReward(load_function(spec, key), key))


class FunctionJudge:
    """A reward function as `grpo` and `ppo` take it, as a judge.

    The columns that it names come from the rows of the prompts, which `bind` gives it.
    """

    def __init__(self, function: NamedReward) -> None:
        self.function = function
        self._rows: dict[str, dict[str, Any]] = {}

    def bind(self, prompts: Sequence[Prompt], rows: Any) -> None:
        """Takes note of the rows that the prompts are of: a datasets.Dataset of as many, or more.

        Raises ValueError for a column that the function needs and the rows lack, and for two rows of one prompt that
        differ in such a column: a judge is shown the prompt alone.
        """
        function, there = self.function, [name for name in rows.column_names if name != "prompt"]
        if missing := [name for name in function.needed if name not in there]:
            raise ValueError(f"{function.key} needs the columns {', '.join(missing)}; dataset has {', '.join(there)}")
        wanted = there if function.takes_all else [n for n in there if n in (*function.needed, *function.optional)]
        for i, prompt in enumerate(prompts if wanted else ()):
            columns = {name: rows[i][name] for name in wanted}
            if self._rows.setdefault(_name(prompt), columns) != columns:
                raise ValueError(
                    f"{function.key} needs prompts that differ where its columns do; row {i} (from 0) has the prompt "
                    "of an earlier one, and other columns"
                )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """[N]. RewardError if the function fails, or says of a completion that it does not apply."""
        rows = [self._rows.get(_name(prompt), {}) for prompt in prompts]
        names = set.intersection(*(set(row) for row in rows)) if rows else set()
        if missing := [name for name in self.function.needed if name not in names]:
            raise ValueError(f"{self.function.key} needs the columns {', '.join(missing)} of the prompts' rows")
        known: dict[str, Sequence[Any]] = {name: [row[name] for row in rows] for name in sorted(names)}
        known |= {"prompts": prompts, "completions": completions}
        scores = np.array(self.function(known, len(completions)), dtype=np.float64)
        if np.isnan(scores).any():
            at = int(np.isnan(scores).argmax())
            raise RewardError(
                f"{self.function.key} must return a number for every completion that is compared; number {at} (from 0) "
                f"of {len(scores)} is None"
            )
        return scores


def _name(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _gold() -> Judge:
    """The demo's gold reward: what people's ratings of movie reviews teach, fitted on the demo's training part."""
    score = fit_gold(split_reviews(load_reviews(), 1600, 0)[0])

    def judge(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        if not all(isinstance(p, str) for p in prompts):
            raise ValueError("reward gold judges prompts of text; got messages")
        return score([f"{p}{c}" for p, c in zip(prompts, completions, strict=True)])

    return judge


def reward_model(path: str, batch_size: int, key: str = "reward") -> Judge:
    """A saved reward model, asked as plain transformers asks it."""
    model = placed(load(key, AutoModelForSequenceClassification, path).eval())
    if model.config.num_labels != 1:
        raise ValueError(f"{key} must be a model with one label; {path!r} has {model.config.num_labels}")
    tokenizer = load_tokenizer(None, path, key)
    return lambda prompts, completions: score_texts(model, tokenizer, prompts, completions, batch_size)


@torch.no_grad()
def score_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """The model's score of each completion, tokenised as its training tokenised them."""
    encode = Encoder(tokenizer, getattr(model.config, "max_position_embeddings", None) or 2**30)
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids, (tail,) = encode(prompt, [completion or " "], ended=True)
        rows.append((ids, tail))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    scores = np.zeros(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in pad([rows[i] for i in chosen], pad_id(tokenizer)).items()}
        scores[chosen] = model_logits(model, batch)[:, 0].float().cpu().numpy()
    return scores
