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

IGNORE = -100
Batch = dict[str, Tensor]


def pad(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int, padding_side: str = "right"
) -> Batch:
    """Pads (prompt ids, completion ids) to one length T.

    Returns:
        input_ids: [B, T], int64.
        attention_mask: [B, T], int64; 1 on real tokens.
        position_ids: [B, T], int64; 0, 1, 2, ... over the real tokens, wherever the padding is.
        labels: [B, T], int64; the next token where that belongs to the completion, else -100.
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
        labels[row, start + first - 1 : start + len(ids) - 1] = ids[first:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}


@dataclass(frozen=True)
class SFTCollator:
    """Rows with `prompt_ids` and `completion_ids` to one padded batch of B sequences."""

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return pad([(r["prompt_ids"], r["completion_ids"]) for r in rows], self.pad_token_id, self.padding_side)


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of B pairs to one padded batch of 2B sequences: the chosen ones, then the rejected ones in the same order.

    Reference log-probabilities, where the rows carry them, become `ref_chosen_logps` and `ref_rejected_logps`, [B].
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        both = [(r["prompt_ids"], r[name]) for name in ("chosen_ids", "rejected_ids") for r in rows]
        batch = pad(both, self.pad_token_id, self.padding_side)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([r[name] for r in rows], dtype=torch.float32)
        return batch
