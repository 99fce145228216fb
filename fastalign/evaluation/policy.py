"""A policy against its reference on held-out prompts: reward, KL, length, endings, variety, in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, set_seed

from ..models.loading import pad_id
from ..models.sampling import Sampling
from ..trainers.data.chat import Messages
from .estimates import distinct, estimate
from .gold import Scorer
from .sampling import Sample, compare_policies, sample
from .scorers import whole_text


class Measured(NamedTuple):
    """What `measure` found."""

    figures: dict[str, Any]
    """Name → estimate (mean, se, low, high) or number; see `measure`."""
    samples: list[list[Sample]]
    texts: list[str]
    """Prompt and continuation, flat."""
    scores: dict[str, np.ndarray]
    """Scorer's name → [prompts, samples]."""


def measure(
    policy: Any,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    scorers: dict[str, Scorer],
    *,
    per_prompt: int,
    how: Sampling,
    seed: int,
    desc: str = "continuations",
) -> Measured:
    """Samples from the policy, always alike for one seed, and takes its figures with 95 % intervals over prompts.

    Figures, each of a text: one for every scorer; `kl` (sum over tokens of the exact KL to the reference, over the
    whole vocabulary), `kl_k1` and `kl_k3` (the sampling estimates of the same), `words`; and over all texts: `kl_token`
    (exact, a token), `entropy` (a token), `finished` (share that ended by themselves), `distinct_2`.

    Args:
        scorers: name → function of whole texts (prompt and continuation).
        per_prompt: continuations of each prompt.
        how: the draws; temperature above 0, and no truncation, or the KL is not that of what was drawn from.
    """
    if how.top_k or how.top_p < 1:
        raise ValueError(f"top_k must be 0 and top_p 1 where a KL is taken; got {how.top_k} and {how.top_p}")
    set_seed(seed)
    drawn = sample(policy, tokenizer, prompts, per_prompt=per_prompt, how=how, desc=desc)
    flat = [s for samples in drawn for s in samples]
    shape = (len(prompts), per_prompt)
    texts = [whole_text(p, s.text) for p, samples in zip(prompts, drawn, strict=True) for s in samples]
    scores = {name: np.asarray(score(texts)).reshape(shape) for name, score in scorers.items()}
    versus = compare_policies(policy, reference, flat, pad_id(tokenizer), temperature=how.temperature)
    tokens = float(versus.tokens.sum())
    by_text = {
        "kl": versus.kl.numpy(),
        "kl_k1": versus.logp_ratio.numpy(),
        "kl_k3": versus.k3.numpy(),
        "words": np.array([len(s.text.split()) for s in flat]),
    }
    figures: dict[str, Any] = {name: estimate(each)._asdict() for name, each in scores.items()}
    figures |= {name: estimate(each.reshape(shape))._asdict() for name, each in by_text.items()}
    figures |= {
        "kl_token": float(versus.kl.sum()) / tokens,
        "entropy": float(versus.entropy.sum()) / tokens,
        "finished": float(np.mean([s.finished for s in flat])),
        "distinct_2": distinct([s.text for s in flat], 2),
    }
    return Measured(figures, drawn, texts, scores)
