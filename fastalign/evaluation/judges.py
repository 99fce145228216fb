"""Judges of pairs: which of two answers to a prompt is the better one.

A judge is anything that scores (reward model, gold reward, Python function), a chat model behind an HTTP endpoint, or
people, whose labels are read from a file. `load_pair_judge` makes one from a text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..trainers.data.chat import without_none
from .scorers import Judge, Prompt, load_judge


class PairJudge(Protocol):
    """Judges pairs of answers."""

    positional: bool
    """Whether the order in which the two are shown may matter, so that both orders must be asked for."""

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """[N]: 1 where `first` is better, 0 where `second` is, 0.5 for a tie (or the mean over several people)."""


class ScoreJudge:
    """The answer with the higher score wins.

    Args:
        score: (prompts, answers) to one score each.
        tie_margin: scores no further apart than this are a tie.
    """

    positional = False

    def __init__(self, score: Judge, tie_margin: float = 0.0) -> None:
        if not tie_margin >= 0:
            raise ValueError(f"tie_margin must be at least 0; got {tie_margin}")
        self.score, self.tie_margin = score, tie_margin

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        return compare_scores(self.score(prompts, first), self.score(prompts, second), self.tie_margin)


def compare_scores(first: np.ndarray, second: np.ndarray, tie_margin: float = 0.0) -> np.ndarray:
    """Elementwise: 1 where the first score is higher, 0 where the second is, 0.5 within the margin."""
    gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return np.where(np.abs(gap) <= tie_margin, 0.5, (gap > 0).astype(np.float64))


_VERDICTS = {"first": 1.0, "second": 0.0, "tie": 0.5}


class HumanLabels:
    """What people said, read from a .jsonl file: rows of `prompt`, `first`, `second` and `preference`.

    `preference` is first, second or tie. Several rows of one pair (several people; either order) are averaged.

    Raises:
        ValueError: no such file; a row that is not of that form, named by its number; or, when asked, a pair that
            nobody labelled.
    """

    positional = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._labels: dict[tuple[str, str, str], list[float]] = {}
        file = Path(os.path.expanduser(path))
        if not file.is_file():
            raise ValueError(f"judge must be an existing file of labels; there is no {path!r}")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            if line.strip():
                prompt, first, second, value = _label(line, path, number)
                self._labels.setdefault((prompt, first, second), []).append(value)
                self._labels.setdefault((prompt, second, first), []).append(1 - value)

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        out = []
        for pair in zip(map(_text, prompts), first, second, strict=True):
            if pair not in self._labels:
                raise ValueError(f"{self.path} has no label of the pair {pair[1]!r} and {pair[2]!r} to {pair[0]!r}")
            out.append(float(np.mean(self._labels[pair])))
        return np.array(out)


def _text(prompt: Any) -> str:
    """Messages compare by what they hold."""
    return prompt if isinstance(prompt, str) else json.dumps(without_none(prompt), sort_keys=True, ensure_ascii=False)


def _label(line: str, path: str, number: int) -> tuple[str, str, str, float]:
    try:
        row = json.loads(line)
        prompt, first, second, preference = (row[name] for name in ("prompt", "first", "second", "preference"))
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(
            f"{path}: row {number} (from 0) must be a JSON object with prompt, first, second and preference"
        ) from None
    if preference not in _VERDICTS:
        raise ValueError(
            f"{path}: preference in row {number} (from 0) must be one of {', '.join(_VERDICTS)}; got {preference!r}"
        )
    return _text(prompt), first, second, _VERDICTS[preference]


def load_pair_judge(spec: str, *, tie_margin: float = 0.0, batch_size: int = 64, model: str = "") -> PairJudge:
    """The judge that a text names.

    Args:
        spec: the address of an OpenAI-style API (http://host:port/v1), a .jsonl file of human labels, or what
            `scorers.load_judge` takes: a reward model's folder, gold, or module:function.
        tie_margin: scores no further apart than this are a tie.
        batch_size: texts that a reward model scores at once.
        model: name of the chat model behind the address.

    Raises:
        ValueError: none of these.
    """
    if spec.startswith(("http://", "https://")):
        from .chat_judge import ChatJudge

        return ChatJudge(spec, model)
    if spec.endswith(".jsonl"):
        return HumanLabels(spec)
    return ScoreJudge(load_judge(spec, batch_size=batch_size, key="judge"), tie_margin)
