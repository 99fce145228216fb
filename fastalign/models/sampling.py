"""Drawing tokens: transformers' generate, each token by inverting the distribution at a given uniform number.

So a response depends on its own numbers and not on what else is in its batch, and on a CPU drawing costs a quarter of
what `torch.multinomial` takes, which makes a random number for every token of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..utils.checks import check_positive
from .loading import pad_id
from .lora import is_adapted


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn; by default from the model's own distribution.

    Attributes:
        max_new_tokens: longest continuation.
        batch_size: continuations drawn at once.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability; 1: all.
    """

    max_new_tokens: int
    batch_size: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            check_positive(name, getattr(self, name))
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature and top_k must be at least 0 and top_p in (0, 1]; "
                f"got {self.temperature}, {self.top_k} and {self.top_p}"
            )


class Draw(LogitsProcessor):
    """Leaves one token possible: the one at which the cumulative probability passes the row's uniform number.

    Args:
        uniforms: [B, steps] float64 in [0, 1): one for each token to come.
        prompt_length: tokens before the first of them.

    Attributes:
        logps: [B] float32 for each token drawn so far: its log-probability among what could be drawn.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int) -> None:
        self.uniforms, self.prompt_length = uniforms, prompt_length
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # In float64: with float32 sums, a vocabulary's rare tokens would drown in rounding.
        probabilities = scores.double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        total = cumulative[:, -1:]
        at = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * total
        below = torch.nextafter(total, torch.zeros_like(total))
        token = torch.searchsorted(cumulative, torch.minimum(at, below), right=True)
        self.logps.append(probabilities.gather(1, token).log().float().squeeze(1))
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


@contextlib.contextmanager
def _within_tables(model: Any) -> Iterator[None]:
    """IndexError for a position that has no row in its table; a GPU's own check would end all use of the GPU."""
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    hooks = [table.register_forward_pre_hook(_check_row) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_row(table: Any, args: tuple[Any, ...]) -> None:
    if args and int(args[0].max()) >= table.num_embeddings:
        raise IndexError(f"there is no row {int(args[0].max())} in a table of {table.num_embeddings}")


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's, and those of the model's generation config (ends of turns)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    return sorted({int(i) for i in found if i is not None})


class Tail(NamedTuple):
    """What follows a prompt: its tokens, the one that ended it among them, and whether there was such a one."""

    ids: list[int]
    finished: bool


class Drawn(NamedTuple):
    """A tail, and what was known of it where it was drawn."""

    ids: list[int]
    finished: bool
    logps: Tensor | None = None
    """[tokens] float32 on the CPU: the log-probability of each, of the distribution that it was drawn from, at the
    temperature and among what top_k and top_p leave. None at temperature 0."""


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> Tail:
    """The tokens up to and with the first that ends a text; what follows is padding."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return Tail(list(ids), False) if end is None else Tail(list(ids[: end + 1]), True)


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: dict[str, Tensor],
    uniforms: Tensor,
    how: Sampling,
) -> list[Drawn]:
    """What follows each prompt, to the first of `end_ids`. No other option of generation applies.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's.
        batch: `input_ids` and `attention_mask`, [B, T], padded on the left.
        uniforms: [B, how.max_new_tokens] float64 in [0, 1), a number for each token; not used at temperature 0.
        how: the draws; its batch size is the caller's affair.

    Raises ValueError where a model with learned positions has too few of them.
    """
    width, ends = batch["input_ids"].shape[1], end_ids(model, tokenizer)
    processors: list[Any] = []
    draw = Draw(uniforms.to(model.device), width) if how.temperature else None
    if draw is not None:
        processors += [TemperatureLogitsWarper(float(how.temperature))] if how.temperature != 1 else []
        processors += [TopKLogitsWarper(how.top_k)] if how.top_k else []
        processors += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
        processors.append(draw)
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=ends or None,
    )
    positions = getattr(model.config, "max_position_embeddings", None)
    short = positions is not None and width + how.max_new_tokens > positions
    try:
        with _plain_generation(model), _within_tables(model) if short else contextlib.nullcontext():
            out = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
            )
    except IndexError as error:  # learned positions have run out; rotary ones go on, so this is not asked beforehand
        if not short:
            raise
        raise ValueError(
            f"prompt and continuation must fit in the model's {positions} positions; got a prompt of {width} tokens "
            f"and up to {how.max_new_tokens} new ones"
        ) from error
    tails = [up_to_end(ids, ends) for ids in out[:, width:].tolist()]
    if draw is None or not draw.logps:
        return [Drawn(*tail) for tail in tails]
    logps = torch.stack(draw.logps, 1).cpu()
    return [Drawn(*tail, row[: len(tail.ids)].clone()) for tail, row in zip(tails, logps, strict=True)]
