"""Sampling continuations in large batches, and comparing two policies on them token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ... import ops
from ..base import model_logits
from ..data.collate import pad
from ..data.encode import Encoder
from ..run import pad_id


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


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    per_prompt: int,
    max_new_tokens: int,
    batch_size: int,
    desc: str = "sampling",
) -> list[list[Sample]]:
    """Continuations of each prompt, drawn from the model's own distribution: temperature 1, no top-k, no top-p.

    Uses torch's global random generator: seed it for the same samples again. `batch_size` counts continuations.
    """
    encode = Encoder(tokenizer, max_length=2**30, append_eos=False)
    rows = [encode(prompt, [" "])[0] for prompt in prompts]
    fill, eos = pad_id(tokenizer), tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    out: list[list[Sample]] = []
    step = max(1, batch_size // per_prompt)
    for start in tqdm(range(0, len(rows), step), desc=desc):
        batch = pad([(ids, []) for ids in rows[start : start + step]], fill, "left")
        drawn = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            num_return_sequences=per_prompt,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            pad_token_id=fill,
            eos_token_id=eos,
        )
        tails = drawn[:, batch["input_ids"].shape[1] :].tolist()
        for i, ids in enumerate(rows[start : start + step]):
            mine = tails[i * per_prompt : (i + 1) * per_prompt]
            out.append([_cut(ids, tail, eos, tokenizer) for tail in mine])
    model.train(was_training)
    return out


def _cut(prompt_ids: list[int], tail: list[int], eos: int | None, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The continuation up to and with its end; what follows is padding."""
    finished = eos is not None and eos in tail
    ids = tail[: tail.index(eos) + 1] if eos is not None and finished else tail
    text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return Sample(prompt_ids, ids, text, finished)


@torch.no_grad()
def compare_policies(
    policy: Any, reference: Any, samples: Sequence[Sample], fill: int, *, batch_size: int = 64
) -> PolicyComparison:
    """Policy against reference on what the policy sampled, on the very token ids that it sampled."""
    parts = []
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_ids) + len(samples[i].ids))
    for start in tqdm(range(0, len(order), batch_size), desc="comparing policies"):
        chosen = [samples[i] for i in order[start : start + batch_size]]
        batch = pad([(s.prompt_ids, s.ids) for s in chosen], fill)
        batch = {name: value.to(policy.device) for name, value in batch.items()}
        logits, ref_logits = model_logits(policy, batch), model_logits(reference, batch)
        stats = ops.token_stats(logits, batch["labels"], ref_logits=ref_logits, kl=True, entropy=True)
        ref_logps = ops.token_logps(ref_logits, batch["labels"])
        if stats.kl is None or stats.entropy is None:
            raise RuntimeError("token_stats did not return the entropy and the KL that it was asked for")
        parts.append(torch.stack([(stats.logps - ref_logps).sum(-1), stats.kl.sum(-1), stats.entropy.sum(-1)]))
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return PolicyComparison(*torch.cat(parts, 1).cpu()[:, back])
