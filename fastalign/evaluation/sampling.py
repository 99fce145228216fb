"""Sampling continuations in large batches, and comparing two policies on them token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..losses import kl_estimate
from ..models.loading import pad_id
from ..models.logits import logits_of
from ..models.sampling import Drawn, Sampling, continuations
from ..trainers.data.chat import Messages
from ..trainers.data.collate import pad
from ..trainers.data.encode import Encoder
from ..utils.batch import IGNORE
from ..utils.checks import check_positive
from ..utils.modes import evaluating


class Sample(NamedTuple):
    """One continuation: the prompt's token ids, its own (with the end-of-sequence token, if it got there), its text."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool


class PolicyComparison(NamedTuple):
    """Sums over the tokens of each sampled continuation, [N] each."""

    logp_ratio: Tensor
    """log pi(y) - log pi_ref(y): its mean over y ~ pi is an unbiased, noisy estimate of the KL (k1)."""
    kl: Tensor
    """Sum over t of the exact KL(pi(.|y_<t) || pi_ref(.|y_<t)): the same mean (chain rule) with less noise."""
    entropy: Tensor
    """Sum over t of the policy's entropy."""
    k3: Tensor
    """Sum over t of exp(-d) - 1 + d with d = log pi - log pi_ref: never negative, and the same mean once more."""
    tokens: Tensor
    """Number of tokens, the end among them."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    options: Sequence[Mapping[str, Any]] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, texts or messages, as training sees them.

    options: what the chat template is told of each, beside its messages.

    Raises:
        ValueError: what the chat template has against a prompt, which is named.
    """
    encode = Encoder(tokenizer, max_length=2**30, append_eos=False)
    out = []
    for i, (prompt, each) in enumerate(zip(prompts, options or [{}] * len(prompts), strict=True)):
        try:
            out.append(encode.prompt(prompt, each))
        except ValueError as error:
            raise ValueError(f"row {i} (from 0): {error}") from None
    return out


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    *,
    per_prompt: int,
    how: Sampling,
    desc: str = "sampling",
    options: Sequence[Mapping[str, Any]] | None = None,
) -> list[list[Sample]]:
    """`per_prompt` continuations of each prompt. Uses torch's global generator: seed it for the same samples again.

    options: what the chat template is told of each prompt, beside its messages: `tools` and other names that it reads.
    """
    rows = prompt_ids(tokenizer, prompts, options)
    fill = pad_id(tokenizer)
    out: list[list[Sample]] = []
    step = max(1, how.batch_size // per_prompt)
    with evaluating(model):
        for start in tqdm(range(0, len(rows), step), desc=desc):
            batch = pad([(ids, []) for ids in rows[start : start + step]], fill, "left")
            inputs = {name: batch[name].repeat_interleave(per_prompt, 0) for name in ("input_ids", "attention_mask")}
            numbers = torch.rand(len(inputs["input_ids"]), how.max_new_tokens, dtype=torch.float64)
            tails = continuations(model, tokenizer, inputs, numbers, how)
            for i, ids in enumerate(rows[start : start + step]):
                mine = tails[i * per_prompt : (i + 1) * per_prompt]
                out.append([_sample(ids, tail, tokenizer) for tail in mine])
    return out


def _sample(start: list[int], tail: Drawn, tokenizer: PreTrainedTokenizerBase) -> Sample:
    text = str(tokenizer.decode(tail.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Sample(start, tail.ids, text, tail.finished)


@torch.no_grad()
def compare_policies(
    policy: Any,
    reference: Any,
    samples: Sequence[Sample],
    fill: int,
    *,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> PolicyComparison:
    """Policy against reference on what the policy sampled, on the very token ids that it sampled.

    temperature divides both models' logits: that of the draws, so that the KL is that of what was drawn from.
    """
    check_positive("temperature", temperature)
    parts = []
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_ids) + len(samples[i].ids))
    with evaluating(policy, reference):
        for start in tqdm(range(0, len(order), batch_size), desc="comparing policies"):
            chosen = [samples[i] for i in order[start : start + batch_size]]
            batch = pad([(s.prompt_ids, s.ids) for s in chosen], fill)
            batch = {name: value.to(policy.device) for name, value in batch.items()}
            ours, theirs = logits_of(policy, batch), logits_of(reference, batch)
            stats, ref = ours.with_reference(theirs, batch["labels"], temperature=temperature)
            if stats.kl is None or stats.entropy is None:
                raise RuntimeError("token_stats did not return the entropy and the KL that it was asked for")
            k1, k3 = (kl_estimate(stats.logps, ref.logps, kind=kind) for kind in ("k1", "k3"))
            tokens = (batch["labels"] != IGNORE).to(k1.dtype)
            parts.append(torch.stack([x.sum(-1) for x in (k1, stats.kl, stats.entropy, k3, tokens)]))
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return PolicyComparison(*torch.cat(parts, 1).cpu()[:, back])
