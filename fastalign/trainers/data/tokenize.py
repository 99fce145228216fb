"""Prompts and completions to token ids, with a boundary that no token crosses.

At generation the prompt is tokenised alone and the model continues after its last token. Training must see the same
split: `ids(prompt) + ids(completion)`, where no token mixes the end of the prompt with the start of the completion,
although tokenising the joined text may well merge across that boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .files import Rows, load_rows, text_of

SFT_COLUMNS = ("prompt", "completion")
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Encoder:
    """Tokenises pairs of prompt and completions, and cuts them to length.

    Attributes:
        tokenizer: the model's tokenizer.
        max_length: tokens of prompt and completion together. The prompt loses its beginning first (one token of context
            stays: the beginning-of-sequence token where there is one); a completion that is still too long loses its
            end, and then has no end-of-sequence token.
        max_prompt_length: tokens of the prompt; None leaves it to max_length.
        append_eos: end completions with the end-of-sequence token, unless they have it already.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int | None = None
    append_eos: bool = True

    def __post_init__(self) -> None:
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise ValueError("append_eos needs a tokenizer with an end-of-sequence token; this one has none")
        if self.max_length < 3:
            raise ValueError(f"max_length must be at least 3 (context, a token, its end); got {self.max_length}")

    def __call__(self, prompt: str, completions: list[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of each completion. All completions share one prompt, cut alike."""
        head = self._bos()
        prompt_ids = self._ids(prompt)
        tails = [self._continuation(prompt, prompt_ids, text) for text in completions]
        if self.append_eos:
            eos = self.tokenizer.eos_token_id
            tails = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in tails]
        room = self.max_length - max(map(len, tails))
        if self.max_prompt_length is not None:
            room = min(room, self.max_prompt_length)
        keep = max(room - len(head), 1 if not head else 0)
        prompt_ids = head + (prompt_ids[-keep:] if keep else [])
        return prompt_ids, [ids[: self.max_length - len(prompt_ids)] for ids in tails]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _bos(self) -> list[int]:
        """The beginning-of-sequence token, if this tokenizer puts one in front of its texts."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a", verbose=False)["input_ids"][0] == bos else []

    def _continuation(self, prompt: str, prompt_ids: list[int], text: str) -> list[int]:
        """Ids of the completion as they follow the prompt's own ids."""
        joined = self._ids(prompt + text)
        if joined[: len(prompt_ids)] == prompt_ids:
            return joined[len(prompt_ids) :]
        alone = self._ids(text)
        if self._decode(prompt_ids + alone) == self._decode(joined):
            return alone
        # SentencePiece-like tokenizers put a space before every text; after a line break, which merges with nothing,
        # they do not.
        anchor = self._ids("\n")
        anchored = self._ids("\n" + text)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else alone

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def tokenize_sft(source: Rows, encode: Encoder) -> Dataset:
    """Rows of prompt and completion to `prompt_ids`, `completion_ids` and `length`.

    Raises ValueError naming the row if a completion is empty.
    """

    def one(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        prompt = text_of(row, "prompt", index, may_be_empty=True)
        prompt_ids, (ids,) = encode(prompt, [text_of(row, "completion", index, may_be_empty=False)])
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "length": len(prompt_ids) + len(ids)}

    rows = load_rows(source, required=SFT_COLUMNS)
    return rows.map(one, with_indices=True, remove_columns=rows.column_names, desc="tokenising")


def tokenize_preferences(source: Rows, encode: Encoder) -> Dataset:
    """Rows of prompt, chosen and rejected to `prompt_ids`, `chosen_ids`, `rejected_ids` and `length`.

    Precomputed log-probabilities of the reference are kept. Raises ValueError naming the row if a completion is empty.
    """

    def one(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        prompt = text_of(row, "prompt", index, may_be_empty=True)
        completions = [text_of(row, name, index, may_be_empty=False) for name in ("chosen", "rejected")]
        prompt_ids, (chosen, rejected) = encode(prompt, completions)
        length = len(prompt_ids) + max(len(chosen), len(rejected))
        return {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}

    rows = load_rows(source, required=PREFERENCE_COLUMNS, optional=REFERENCE_COLUMNS)
    return rows.map(one, with_indices=True, remove_columns=list(PREFERENCE_COLUMNS), desc="tokenising")
