"""Drawing tokens: transformers' generate, each token by inverting the distribution at a given uniform number.

So a response depends on its own numbers and not on what else is in its batch, and on a CPU drawing costs a quarter of
what `torch.multinomial` takes, which makes a random number for every token of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .lora import is_adapted


class Draw(LogitsProcessor):
    """Leaves one token possible: the one at which the cumulative probability passes the row's uniform number.

    Args:
        uniforms: [B, steps] float64 in [0, 1): one for each token to come.
        prompt_length: tokens before the first of them.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int) -> None:
        self.uniforms, self.prompt_length = uniforms, prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # In float64: with float32 sums, a vocabulary's rare tokens would drown in rounding.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        at = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * total
        below = torch.nextafter(total, torch.zeros_like(total))
        token = torch.searchsorted(cumulative, torch.minimum(at, below), right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@contextlib.contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Sets the model's own generation settings aside: transformers fills gaps in the given ones from them."""
    inner = model.get_base_model() if is_adapted(model) else model
    before = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = before


@torch.no_grad()
def continuations(
    model: Any,
    batch: dict[str, Tensor],
    uniforms: Tensor | None,
    *,
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """The tokens that follow each prompt, with padding behind their end. No other option of generation applies.

    Args:
        model: a causal language model of transformers.
        batch: `input_ids` and `attention_mask`, [B, T], padded on the left.
        uniforms: [B, max_new_tokens] float64 in [0, 1), a number for each token; None takes the likeliest token.
        temperature: divides the logits, above 0.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability; 1: all.
    """
    width = batch["input_ids"].shape[1]
    processors: list[Any] = []
    if uniforms is not None:
        processors += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        processors += [TopKLogitsWarper(top_k)] if top_k else []
        processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        processors.append(Draw(uniforms.to(model.device), width))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    with _plain_generation(model):
        out = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    return out[:, width:].tolist()
