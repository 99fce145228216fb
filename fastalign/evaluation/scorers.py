"""What judges texts in `fastalign eval`: a reward model, the gold reward of the movie reviews, or any function."""

from __future__ import annotations

import importlib
import importlib.util
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
        spec: `gold`; the folder of a sequence-classification model with one label; or `module:function`, a function of
            (prompts, completions) that returns a number for each pair.
        batch_size: texts that a reward model scores at once.
        key: what gave the text.

    Raises:
        ValueError: none of these; naming the key.
    """
    if spec == "gold":
        return _gold()
    if os.path.isdir(os.path.expanduser(spec)):
        return reward_model(os.path.expanduser(spec), batch_size, key)
    module, colon, name = spec.partition(":")
    if colon and module and importlib.util.find_spec(module.partition(".")[0]):
        function = getattr(importlib.import_module(module), name, None)
        if callable(function):
            called = f"{key} {spec!r}"
            return lambda prompts, completions: _checked(function(prompts, completions), len(completions), called)
    raise ValueError(f"{key} must be gold, the folder of a reward model, or module:function; got {spec!r}")


def _checked(scores: Any, count: int, called: str) -> np.ndarray:
    out = np.asarray(scores, dtype=np.float64)
    if out.shape != (count,) or not np.isfinite(out).all():
        raise ValueError(f"{called} must return {count} finite numbers; got shape {out.shape}")
    return out


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
