"""Rows for the trainers from scored continuations: ranked lists, and pairs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .scorers import Prompt, whole_text

if TYPE_CHECKING:
    from .sampling import Sample


def ranked_samples(
    prompts: Sequence[Prompt], drawn: Sequence[Sequence[Sample]], score: Callable[[Sequence[str]], np.ndarray]
) -> list[dict[str, Any]]:
    """A row of `prompt`, `completions` and `rewards` for each prompt with two different, finished continuations.

    Continuations that did not end are left out: trained on with an end put to them, they would teach to stop in the
    middle of a sentence.

    Args:
        score: whole texts (prompt and continuation) to scores.
    """
    rows = []
    for prompt, samples in zip(prompts, drawn, strict=True):
        texts = list(dict.fromkeys(s.text for s in samples if s.finished and s.text.strip()))
        if len(texts) > 1:
            rewards = np.asarray(score([whole_text(prompt, text) for text in texts])).tolist()
            rows.append({"prompt": prompt, "completions": texts, "rewards": rewards})
    return rows


def best_against_worst(rows: Sequence[dict[str, Any]], min_gap: float) -> list[dict[str, str]]:
    """Best against worst and second best against second worst of each list, where they are `min_gap` apart at least."""
    pairs = []
    for row in rows:
        texts, scores = row["completions"], np.array(row["rewards"])
        order = np.argsort(-scores, kind="stable")
        for best, worst in zip(order[: min(2, len(texts) // 2)], order[::-1], strict=False):
            if scores[best] - scores[worst] >= min_gap:
                pairs.append({"prompt": row["prompt"], "chosen": texts[best], "rejected": texts[worst]})
    return pairs
