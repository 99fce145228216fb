"""The doctor's checks of models: what sampling draws from, what memory a step takes, what a reward depends on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..evaluation.sampling import prompt_ids
from ..evaluation.scorers import score_texts
from ..head.products import advice
from ..models.loading import pad_id
from ..models.logits import logits_of
from ..models.sampling import end_ids
from ..trainers.common.base import learned_positions
from ..trainers.data.chat import is_chat
from ..trainers.data.collate import pad
from ..trainers.data.tokenize import LIST_FORMS, PAIR_FORMS
from .data import Finding, Patient

_DRAWN, _NEW_TOKENS = 8, 16
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats a token; 16-bit weights: see below
_COARSE = 0.1
_ADAM_STATES = 2


def _prompts(p: Patient) -> list[Any]:
    """Some prompts, of different lengths where there are such: padding is what the checks are about."""
    found = []
    for _, prompt, _ in p.completions():
        if (isinstance(prompt, str) and prompt) or is_chat(prompt):
            found.append(prompt)
    return sorted(found, key=lambda prompt: len(str(prompt)))[:: max(1, len(found) // _DRAWN)][:_DRAWN]


def _on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def sampler(p: Patient) -> list[Finding]:
    """Log-probabilities of tokens as they were drawn, by plain `generate`, against those of training on them."""
    prompts = _prompts(p)
    if not prompts or _broken(p.model):
        return []
    room = min(p.config.max_length, learned_positions(p.model) or p.config.max_length) - _NEW_TOKENS
    rows = [ids[-max(room, 1) :] for ids in prompt_ids(p.tokenizer, prompts)]
    batch = _on(p.model.device, pad([(ids, []) for ids in rows], pad_id(p.tokenizer), "left"))
    own = p.model.generation_config.to_diff_dict()
    # Left unset, generate keeps the 50 likeliest tokens: its own habit, not this model's setting.
    habits = {} if "top_k" in own else {"top_k": 0}
    drawn = p.model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=_NEW_TOKENS,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=pad_id(p.tokenizer),
        eos_token_id=end_ids(p.model, p.tokenizer) or None,
        **habits,
    )
    tails = drawn.sequences[:, batch["input_ids"].shape[1] :]
    sampled = torch.stack(drawn.scores, 1).float().log_softmax(-1).gather(-1, tails.unsqueeze(-1)).squeeze(-1)
    ends = set(end_ids(p.model, p.tokenizer))
    lengths = [next((t + 1 for t, i in enumerate(tail) if i in ends), len(tail)) for tail in tails.tolist()]
    pairs = [(ids, tail[:n]) for ids, tail, n in zip(rows, tails.tolist(), lengths, strict=True)]
    trained = _on(p.model.device, pad(pairs, pad_id(p.tokenizer)))
    logps = logits_of(p.model, trained).stats(trained["labels"]).logps
    worst = max(
        float((logps[i, len(ids) - 1 : len(ids) - 1 + len(tail)] - sampled[i, : len(tail)]).abs().max())
        for i, (ids, tail) in enumerate(pairs)
    )
    if worst <= _TOLERANCE.get(p.model.dtype, _COARSE):
        return []
    set_options = {
        name: getattr(p.model.generation_config, name, None)
        for name in ("temperature", "top_k", "top_p", "repetition_penalty", "min_p", "typical_p")
    }
    shown = ", ".join(f"{name}={value}" for name, value in set_options.items() if value not in (None, 1.0, 0))
    why = f" Its generation config sets {shown}: sampling then draws from another distribution" if shown else ""
    return [
        Finding(
            "error",
            f"tokens drawn by the model's own generate have other log-probabilities in training, by up to {worst:.3g} "
            f"nats.{why}. On-policy methods would be off by that ratio",
        )
    ]


def memory(p: Patient) -> list[Finding]:
    """An estimate of a training step's memory against what is there.

    Weights, gradients and AdamW's two moments; the logits and their gradient; 34 bytes an activation of each layer
    (Korthikanti et al. 2022, without the attention matrices, which fused attention does not keep) for 16-bit
    weights, twice that for 32-bit ones, or one activation a layer with gradient checkpointing.
    """
    config, model = p.config, p.model
    size = torch.finfo(model.dtype).bits // 8
    inner = model.config.get_text_config()
    weights = sum(w.numel() for w in model.parameters()) * size
    sequences = config.per_device_train_batch_size * _sequences(p)
    tokens = sequences * _longest(p)
    logits = 2 * tokens * inner.vocab_size * size
    per_layer = size if config.gradient_checkpointing else 17 * size
    activations = tokens * inner.hidden_size * inner.num_hidden_layers * per_layer
    held = weights * (2 + _ADAM_STATES + bool(config.reference_model))
    if p.teacher is not None:  # whose logits are a tile
        held += sum(w.numel() for w in p.teacher.parameters()) * size
    need, there = held + logits + activations, available_memory()
    text = (
        f"a step needs about {_gb(need)} (weights, gradients, optimiser {_gb(held)}; logits {_gb(logits)}; activations "
        f"{_gb(activations)}, for {sequences} sequences of {_longest(p)} tokens) and {_gb(there)} are free"
    )
    if need > there:
        return [
            Finding(
                "error",
                f"{text}: lower per_device_train_batch_size (raise gradient_accumulation_steps instead, the loss stays "
                "the same), set gradient_checkpointing, or use lora_rank",
            )
        ]
    return [Finding("ok", text)]


def _sequences(p: Patient) -> int:
    """Sequences that one row becomes."""
    if p.form in PAIR_FORMS:
        return 2
    return max(len(ends) for _, _, ends in p.completions()) if p.form in LIST_FORMS else 1


def _longest(p: Patient) -> int:
    """Tokens of the longest row, as far as max_length lets it be."""
    longest = 1
    for row in p.rows:
        text = max((str(row[name]) for name in p.form if name not in ("prompt", "completions")), key=len, default="")
        ends = row["completions"] if "completions" in p.form else [text]
        text = str(row.get("prompt") or "") + max(map(str, ends), key=len, default="")
        longest = max(longest, len(p.tokenizer(text, verbose=False)["input_ids"]) + 1)
    return min(longest, p.config.max_length)


def available_memory() -> int:
    """Bytes that are free where the model would train: on the accelerator, else in the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**63 - 1  # this system does not say


def _gb(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def vocabulary(p: Patient) -> list[Finding]:
    """Whether the model has an embedding for every token of the tokenizer."""
    rows = p.model.get_input_embeddings().weight.shape[0]
    if len(p.tokenizer) > rows:
        return [
            Finding("error", f"the tokenizer knows {len(p.tokenizer)} tokens and the model embeds {rows} of them only")
        ]
    return []


def _broken(model: Any) -> list[str]:
    """Names of the weights that are not all finite."""
    return [name for name, w in model.named_parameters() if not torch.isfinite(w).all()]


def weights(p: Patient) -> list[Finding]:
    """Weights that are NaN or infinite."""
    bad = _broken(p.model)
    if not bad:
        return []
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return [Finding("error", f"the model holds weights that are NaN or infinite: {', '.join(bad[:5])}{more}")]


def precision(p: Patient) -> list[Finding]:
    """Weights in 16 bits on a processor that has no units for them."""
    said = advice(p.model.dtype)
    return [] if said is None else [Finding("warning", said)]


def positions(p: Patient) -> list[Finding]:
    """Rows that are longer than the model has learned positions for."""
    count = learned_positions(p.model)
    if count is None or p.walk.longest <= count:
        return []
    text = f"a row has {p.walk.longest} tokens and the model has learned {count} positions: lower max_length to that"
    return [Finding("error", text)]


# --------------------------------------------------------------------------------------------------------- reward model
def reward_invariance(p: Patient) -> list[Finding]:
    """Scores of texts alone and in a padded batch, and where the score is read."""
    model, tokenizer = p.reward_model, p.reward_tokenizer
    if model.config.num_labels != 1:
        return [Finding("error", f"a reward model has one label; this one has {model.config.num_labels}")]
    texts = [(prompt, end) for _, prompt, ends in p.completions() for end in ends if isinstance(end, str)][:200]
    texts = sorted(texts, key=lambda t: len(t[0]) + len(t[1]))[:: max(1, len(texts) // _DRAWN)]
    if not texts:
        return []
    prompts, ends = (list(column) for column in zip(*texts, strict=True))
    out = []
    alone = score_texts(model, tokenizer, prompts, ends, 1)
    try:
        together = score_texts(model, tokenizer, prompts, ends, len(texts))
    except ValueError as error:
        return [Finding("error", f"the reward model cannot score a batch: {error}")]
    worst, scale = float(np.abs(alone - together).max()), max(float(alone.std()), 1e-3)
    if worst > 0.01 * scale:
        out.append(
            Finding(
                "error",
                f"a text's score depends on the batch it is in, by up to {worst:.3g} (scores spread by {scale:.3g}): "
                f"the model's config pads with {model.config.pad_token_id}, "
                f"the tokenizer with {tokenizer.pad_token_id}",
            )
        )
    if model.config.pad_token_id is not None and model.config.pad_token_id == tokenizer.eos_token_id:
        out.append(
            Finding(
                "warning",
                "the reward model pads with its end-of-sequence token: transformers then reads the score one token "
                "before the end, and ended and cut-off texts at different places",
            )
        )
    return out


MODEL_CHECKS: dict[str, Callable[[Patient], list[Finding]]] = {
    "weights": weights,
    "vocabulary": vocabulary,
    "positions": positions,
    "precision": precision,
    "sampling against training": sampler,
    "memory": memory,
}
REWARD_CHECKS: dict[str, Callable[[Patient], list[Finding]]] = {"reward model in batches": reward_invariance}


def teacher(p: Patient) -> list[Finding]:
    """Whether the teacher's distributions are over the student's tokens."""
    ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (p.model, p.teacher))
    if ours != theirs:
        return [
            Finding(
                "error",
                f"the teacher has a vocabulary of {theirs} tokens and the student one of {ours}: their distributions "
                "cannot be compared. Take a teacher of the student's family",
            )
        ]
    own, other = p.tokenizer.get_vocab(), p.teacher_tokenizer.get_vocab()
    differ = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if not differ:
        return []
    shown = ", ".join(map(repr, differ[:3]))
    return [
        Finding(
            "error" if len(differ) > len(own) // 100 else "warning",
            f"{len(differ)} tokens have other ids for the teacher than for the student ({shown}, ...): what the "
            "student is to learn of them is another token's",
        )
    ]


TEACHER_CHECKS: dict[str, Callable[[Patient], list[Finding]]] = {"teacher": teacher}
