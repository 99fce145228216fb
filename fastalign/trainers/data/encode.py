"""Prompts and completions to token ids, with a boundary that no token crosses.

At generation the prompt is tokenised alone and the model continues after its last token. Training must see the same
split: `ids(prompt) + ids(completion)`, where no token mixes the end of the prompt with the start of the completion,
although tokenising the joined text may well merge across that boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .chat import Messages, Span, render, reply_span, spans
from .cut import Cuts, Room, mode_of
from .rowwise import Dropped


@dataclass(frozen=True)
class Encoder:
    """Tokenises pairs of prompt and completions, and cuts them to length.

    Attributes:
        tokenizer: the model's tokenizer.
        max_length: tokens of prompt and completion together. A completion that is cut has no end-of-sequence token.
        max_prompt_length: tokens of the prompt; None leaves it to max_length.
        append_eos: end completions with the end-of-sequence token, unless they have it already. The last reply of a
            conversation gets one only where the chat template does not mark its end.
        truncation_mode: what is done with rows that are longer: left, right, drop or raise, see `cut.Room`.
        skip_bad_rows: whether those who read rows leave faulty ones out.
        cuts: is told what each row lost.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int | None = None
    append_eos: bool = True
    truncation_mode: str = "left"
    skip_bad_rows: bool = False
    cuts: Cuts = field(default_factory=Cuts, compare=False)

    def __post_init__(self) -> None:
        mode_of(self.truncation_mode)
        if self.append_eos and self.tokenizer.eos_token_id is None:
            raise ValueError("append_eos needs a tokenizer with an end-of-sequence token; this one has none")
        if self.max_length < 3:
            raise ValueError(f"max_length must be at least 3 (context, a token, its end); got {self.max_length}")

    def __call__(
        self, prompt: str | Messages, completions: Sequence[str | Messages]
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of each completion. All completions share one prompt, cut alike.

        A prompt of messages goes through the chat template; its completions are the assistant's replies, as text or
        as the messages that follow.
        """
        before, replies = self._texts(prompt, completions)
        prompt_ids = self._ids(before)
        tails = [self._reply(before, prompt_ids, reply) for reply in replies]
        return self._fit(prompt_ids, tails)

    def seen_prompt(self, prompt: str | Messages) -> tuple[list[int], str]:
        """(token ids, text) of a prompt as a model that goes on from it sees it: what was cut is in neither."""
        text, _ = self._texts(prompt, [])
        whole, head = self._ids(text), self._bos()
        if not isinstance(prompt, str) and whole[: len(head)] != head:
            head = []  # a chat template says itself what prompts begin with
        self.cuts.prompt = False
        ids, _ = self._fit(whole, [], head)
        return ids, self._decode(ids[len(head) :]) if self.cuts.prompt else text

    def conversation(self, messages: Messages) -> tuple[list[int], list[int], list[bool]]:
        """(prompt, rest, which tokens of the rest are the assistant's own).

        The prompt is what stands before the first reply; the rest goes on to the end of the last one. White space that
        a template puts behind the end-of-sequence token of a reply is context of the next turn, not part of it.
        """
        prompt_ids: list[int] = []
        ids: list[int] = []
        own: list[bool] = []
        text = ""
        for i, span in enumerate(pieces := spans(self.tokenizer, messages)):
            known = prompt_ids + ids
            if span.is_reply:
                is_last = i == len(pieces) - 1
                full = self._continuation(text, known, span.text)
                reply = self._ended(full, span, append=is_last)
                new = reply if is_last else full
                own += [j < len(reply) for j in range(len(new))]
                ids += new
            elif i == 0:
                prompt_ids = self._ids(span.text)
            else:
                between = self._continuation(text, known, span.text)
                ids += between
                own += [False] * len(between)
            text += span.text
        prompt_ids, (ids,) = self._fit(prompt_ids, [ids])
        if not any(own[: len(ids)]):
            raise Dropped(f"no reply of the conversation fits max_length {self.max_length}")
        return prompt_ids, ids, own[: len(ids)]

    def _texts(self, prompt: str | Messages, completions: Sequence[str | Messages]) -> tuple[str, list[Span]]:
        if isinstance(prompt, str):
            if not all(isinstance(c, str) for c in completions):
                raise ValueError("a completion of messages needs a prompt of messages; this prompt is text")
            return prompt, [Span(str(c), True, False) for c in completions]
        before = render(self.tokenizer, prompt, reply_follows=True)
        replies = []
        for c in completions:
            turns = [{"role": "assistant", "content": c}] if isinstance(c, str) else list(c)
            replies.append(reply_span(self.tokenizer, before, [*prompt, *turns]))
        return before, replies

    def _reply(self, before: str, prompt_ids: list[int], reply: Span) -> list[int]:
        return self._ended(self._continuation(before, prompt_ids, reply.text), reply, append=True)

    def _ended(self, ids: list[int], reply: Span, *, append: bool) -> list[int]:
        """The reply's ids up to its end: without white space after the end-of-sequence token, which is added if due."""
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if end == len(ids) or (reply.is_closed and not self._decode(ids[end:]).strip()):
                return ids[:end]
        due = append and self.append_eos and not reply.is_closed
        return [*ids, eos] if due and eos is not None else ids

    def _fit(
        self, ids: list[int], tails: list[list[int]], head: list[int] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """The prompt's ids, with the beginning-of-sequence token, and the completions', cut to their room."""
        head = self._bos() if head is None else head
        body = ids[len(head) :] if ids[: len(head)] == head else ids  # a chat template writes it out
        room = Room(self.max_length, self.max_prompt_length, mode_of(self.truncation_mode))
        return room.fit(head, body, tails, self.cuts)

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
