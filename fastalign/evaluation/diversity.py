"""How varied a set of texts is, beside distinct-n (`estimates.distinct`): self-BLEU."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def self_bleu(texts: Sequence[str], *, order: int = 4, limit: int = 100, seed: int = 0) -> float:
    """Mean BLEU of each text against all of the others, from 0 to 1; low is varied (Zhu et al. 2018, Texygen).

    Needs the package sacrebleu (the extra `eval`). Sentence BLEU with effective order, since short texts have no
    longer n-grams at all.

    Args:
        texts: at least two.
        order: longest n-gram.
        limit: at most so many texts, drawn at random: the cost is their number squared.
        seed: of that draw.

    Raises:
        ValueError: fewer than two texts.
        ModuleNotFoundError: sacrebleu is not installed.
    """
    from sacrebleu.metrics import BLEU

    if len(texts) < 2:
        raise ValueError(f"texts must be at least two; got {len(texts)}")
    chosen = list(texts) if len(texts) <= limit else random.Random(seed).sample(list(texts), limit)
    bleu = BLEU(max_ngram_order=order, effective_order=True)
    others = (chosen[:i] + chosen[i + 1 :] for i in range(len(chosen)))
    scores = [bleu.sentence_score(text, rest).score for text, rest in zip(chosen, others, strict=True)]
    return float(np.mean(scores)) / 100
