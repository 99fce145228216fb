"""Token ids to padded batches whose labels are already aligned: `labels[b, t]` is the target of `logits[b, t]`.

The mask comes from lengths, never from the padding token's id, so a tokenizer whose padding and end-of-sequence
tokens are one and the same still teaches the model to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils.batch import IGNORE, Batch

_BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels", "weights")


def pad(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_token_id: int,
    padding_side: str = "right",
    own: Sequence[Sequence[bool] | None] | None = None,
) -> Batch:
    """Pads (prompt ids, completion ids) to one length T.

    `own` says of each completion which of its tokens are trained on; None: all of them.

    Returns:
        input_ids: [B, T], int64.
        attention_mask: [B, T], int64; 1 on real tokens.
        position_ids: [B, T], int64; 0, 1, 2, ... over the real tokens, wherever the padding is.
        labels: [B, T], int64; the next token where that belongs to the completion (and is trained on), else -100.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in sequences)
    shape = (len(sequences), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask, position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (prompt, completion) in enumerate(sequences):
        ids = torch.tensor([*prompt, *completion], dtype=torch.int64)
        start = 0 if padding_side == "right" else length - len(ids)
        span = slice(start, start + len(ids))
        input_ids[row, span] = ids
        attention_mask[row, span] = 1
        position_ids[row, span] = torch.arange(len(ids))
        first = max(len(prompt), 1)  # without a prompt nothing predicts the first token
        targets = ids[first:]
        mask = None if own is None else own[row]
        if mask is not None:
            targets = targets.where(torch.tensor(mask[first - len(prompt) :]), IGNORE)
        labels[row, start + first - 1 : start + len(ids) - 1] = targets
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}


def padding_last(batch: Batch) -> Batch:
    """The padded batch with every row's real tokens moved to its beginning, wherever they were.

    Attention kernels (PyTorch's blocked one on CPUs, for one) add up keys in blocks counted from the row's beginning:
    the same tokens elsewhere in the row give other last bits.
    """
    mask = batch["attention_mask"]
    first = mask.argmax(-1, keepdim=True)
    places = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
    return {name: x.gather(1, places) if name in _BY_TOKEN else x for name, x in batch.items()}


@dataclass(frozen=True)
class SFTCollator:
    """Rows with `prompt_ids`, `completion_ids` and perhaps `own` to one padded batch of B sequences."""

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        sequences = [(r["prompt_ids"], r["completion_ids"]) for r in rows]
        batch = pad(sequences, self.pad_token_id, self.padding_side, [r.get("own") for r in rows])
        if "weights" in rows[0]:
            batch["weights"] = self._weights(batch, rows)
        return batch

    def _weights(self, batch: Batch, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """[B, T], float32: what each label counts for; 0 where there is none."""
        weights = torch.zeros(batch["labels"].shape)
        for row, r in enumerate(rows):
            end = int(batch["attention_mask"][row].nonzero().max())  # of the last token, which predicts nothing
            own = torch.tensor(r["weights"][1 if not r["prompt_ids"] else 0 :])
            weights[row, end - len(own) : end] = own
        return weights.where(batch["labels"] != IGNORE, 0)


@dataclass(frozen=True)
class PackedCollator:
    """Rows that each hold several sequences one after the other (see `pack`) to one batch of B rows.

    There is no attention mask: positions that begin again at 0 are how transformers' models know where a sequence
    ends and the next, which must not see it, begins. `num_tokens`, [B], counts the real tokens.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        length = max(len(r["input_ids"]) for r in rows)
        longest = max(max(r["position_ids"]) for r in rows) + 1
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id, dtype=torch.int64),
            "position_ids": torch.zeros((len(rows), length), dtype=torch.int64),
            "labels": torch.full((len(rows), length), IGNORE, dtype=torch.int64),
        }
        for i, r in enumerate(rows):
            for name, tensor in batch.items():
                tensor[i, : len(r[name])] = torch.tensor(r[name])
            # Padding counts as further sequences, none of them longer than the batch's own: a model may have no more
            # positions than these need.
            filler = length - len(r["input_ids"])
            batch["position_ids"][i, length - filler :] = torch.arange(filler) % longest
        batch["num_tokens"] = torch.tensor([len(r["input_ids"]) for r in rows])
        return batch


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of B pairs to one padded batch of 2B sequences: the chosen ones, then the rejected ones in the same order.

    Reference log-probabilities, where the rows carry them, become `ref_chosen_logps` and `ref_rejected_logps`, [B].
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        both = [(r["prompt_ids"], r[name]) for name in ("chosen_ids", "rejected_ids") for r in rows]
        own = [r.get(name) for name in ("chosen_own", "rejected_own") for r in rows]
        batch = pad(both, self.pad_token_id, self.padding_side, own)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([r[name] for r in rows], dtype=torch.float32)
        return batch


@dataclass(frozen=True)
class TripleCollator:
    """Rows of B triples to one padded batch of 3B sequences: the chosen ones, the rejected ones, then the gold ones."""

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        ends = ("chosen", "rejected", "gold")
        sequences = [(r["prompt_ids"], r[f"{end}_ids"]) for end in ends for r in rows]
        own = [r.get(f"{end}_own") for end in ends for r in rows]
        return pad(sequences, self.pad_token_id, self.padding_side, own)


@dataclass(frozen=True)
class UnpairedCollator:
    """Rows of `prompt_ids`, `completion_ids` and `label` to one padded batch of B sequences, as `SFTCollator`'s.

    `desirable`, [B], boolean, are the labels. Where rows have `kl_ids`, another row's completion, the same prompts with
    these make `kl_input_ids`, `kl_attention_mask`, `kl_position_ids` and `kl_labels`. Sums of the reference, where the
    rows carry them, become `ref_logps` and `ref_kl_logps`, [B].
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = self._padded(rows, "completion_ids", "own")
        batch["desirable"] = torch.tensor([bool(r["label"]) for r in rows])
        if "kl_ids" in rows[0]:
            # On the right: a batch's padding is moved there by columns that it has, and these have other lengths.
            others = UnpairedCollator(self.pad_token_id)._padded(rows, "kl_ids", "kl_own")
            batch.update({f"kl_{name}": value for name, value in others.items()})
        for name in ("ref_logps", "ref_kl_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([r[name] for r in rows], dtype=torch.float32)
        return batch

    def _padded(self, rows: Sequence[Mapping[str, Any]], ids: str, own: str) -> Batch:
        sequences = [(r["prompt_ids"], r[ids]) for r in rows]
        return pad(sequences, self.pad_token_id, self.padding_side, [r.get(own) for r in rows])


@dataclass(frozen=True)
class ListCollator:
    """Ranked lists of any lengths to one padded batch of all their completions, N sequences.

    Beside the inputs of `pad`, for B lists of at most K completions:
        places: [B, K], int64; the sequence that is entry k of list b, -1 where the list has no such entry.
        ranks: [B, K], float32; 0 is best. rewards: [B, K], float32, where all the rows bring them.
        margin: [B], float32, and labeler: [B], int64, likewise.
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        sequences = [(r["prompt_ids"], ids) for r in rows for ids in r["completions_ids"]]
        own = [mask for r in rows for mask in r.get("completions_own") or [None] * len(r["completions_ids"])]
        batch = pad(sequences, self.pad_token_id, self.padding_side, own)
        lengths = [len(r["completions_ids"]) for r in rows]
        places = torch.full((len(rows), max(lengths)), -1)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        places[real] = torch.arange(len(sequences))
        batch["places"] = places
        for name in ("ranks", "rewards"):
            if all(r.get(name) is not None for r in rows):
                batch[name] = torch.zeros(places.shape)
                batch[name][real] = torch.tensor([v for r in rows for v in r[name]], dtype=torch.float32)
        for name, dtype in (("margin", torch.float32), ("labeler", torch.int64)):
            if all(r.get(name) is not None for r in rows):
                batch[name] = torch.tensor([r[name] for r in rows], dtype=dtype)
        return batch


def in_lists(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """([N] values as [B, K] lists, which entries are real): the way back from `ListCollator`'s batch."""
    real = places >= 0
    return values[places.clamp(min=0)], real
