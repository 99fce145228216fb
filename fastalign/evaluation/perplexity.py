"""Perplexity on held-out text: what alignment costs the model as a language model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..models.loading import pad_id
from ..models.logits import logits_of
from ..ops.sequences import sum_tokens
from ..trainers.data.collate import SFTCollator
from ..trainers.data.encode import Encoder
from ..trainers.data.files import Rows
from ..trainers.data.tokenize import tokenize_sft
from ..utils.batch import IGNORE
from ..utils.modes import evaluating
from .estimates import Estimate, estimate


class TextLikelihood(NamedTuple):
    """Log-likelihood of texts under a model, [rows] each."""

    nats: np.ndarray
    """Negative log-likelihood of each row's completion, its end included."""
    tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token, over the tokens of all rows; inf where that overflows."""
        mean = self.nats.sum() / self.tokens.sum()
        return math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)


@torch.no_grad()
def likelihood(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int = 1024,
    batch_size: int = 64,
    template_options: Mapping[str, Any] | None = None,
) -> TextLikelihood:
    """Negative log-likelihood of the rows' completions, in the rows' order.

    Args:
        rows: `prompt` and `completion`; whole texts have an empty prompt.
        max_length: tokens of prompt and completion; the rest is cut.
        batch_size: rows in a forward pass.
        template_options: what the chat template is told beside messages.
    """
    tokenised = tokenize_sft(rows, Encoder(tokenizer, max_length, template_options=template_options or {}))
    collate = SFTCollator(pad_id(tokenizer))
    nats, tokens = np.zeros(len(tokenised)), np.zeros(len(tokenised))
    order = sorted(range(len(tokenised)), key=lambda i: tokenised[i]["length"])
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([tokenised[i] for i in chosen])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            nats[chosen] = (
                -sum_tokens(logits_of(model, batch).stats(batch["labels"]).logps, torch.float64).cpu().numpy()
            )
            tokens[chosen] = (batch["labels"] != IGNORE).sum(-1).cpu().numpy()
    return TextLikelihood(nats, tokens)


def alignment_tax(before: TextLikelihood, after: TextLikelihood) -> Estimate:
    """Mean rise of the negative log-likelihood per token from one model to another on the same texts, in nats.

    The "alignment tax" of Askell et al. 2021 and Ouyang et al. 2022 (sec. 4.2), taken as language modelling; paired, so
    that how hard the texts are drops out. Rows are the units: each counts by its mean over tokens.

    Raises:
        ValueError: the two were taken on different texts.
    """
    if len(before.tokens) != len(after.tokens) or (before.tokens != after.tokens).any():
        raise ValueError("before and after must be likelihoods of the same texts; their numbers of tokens differ")
    return estimate((after.nats - before.nats) / before.tokens)


def completions_of(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of `prompt` and `completion` for whole texts: an empty prompt before each."""
    return [{"prompt": "", "completion": text} for text in rows]
