"""Prompts and completions to token ids, with a boundary that no token crosses.

At generation the prompt is tokenised alone and the model continues after its last token. Training must see the same
split: `ids(prompt) + ids(completion)`, where no token mixes the end of the prompt with the start of the completion,
although tokenising the joined text may well merge across that boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .chat import Messages, check_counted, shortened
from .cut import Cuts, Room, mode_of
from .rowwise import Dropped
from .template import ChatTemplate, Span, render


class Conversation(NamedTuple):
    """Token ids of what stands before the first reply, of the rest, which of the rest are the assistant's own, and what
    each of these counts for."""

    prompt_ids: list[int]
    ids: list[int]
    own: list[bool]
    weights: list[float]


@dataclass(frozen=True)
class Encoder:
    """Tokenises pairs of prompt and completions, and cuts them to length.

    Attributes:
        tokenizer: the model's tokenizer.
        max_length: tokens of prompt and completion together. A completion that is cut has no end-of-sequence token.
        max_prompt_length: tokens of the prompt; None leaves it to max_length.
        append_eos: end completions with the end-of-sequence token, unless they have it already. The last reply of a
            conversation gets one only where the chat template does not mark its end.
        template_options: what the chat template is told beside messages and tools, such as `enable_thinking`.
        truncation_mode: what is done with rows that are longer: left, right, drop or raise, see `cut.Room`.
        skip_bad_rows: whether those who read rows leave faulty ones out.
        cuts: is told what each row lost.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int | None = None
    append_eos: bool = True
    template_options: Mapping[str, Any] = field(default_factory=dict)
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
        self,
        prompt: str | Messages,
        completions: Sequence[str | Messages],
        options: Mapping[str, Any] | None = None,
        *,
        ended: bool | None = None,
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of each completion. All completions share one prompt, cut alike.

        Args:
            prompt: a text; or messages, which go through the chat template.
            completions: texts; or after a prompt of messages the assistant's replies, as texts or one message each.
            options: of the chat template, for this row: see `chat.template_options`.
            ended: for completions that a model sampled: whether they came to their end. Their parts that the template
                drops are not missed, and those that did not end get none.

        Raises:
            ValueError: completions that do not go with the prompt, or what the chat template has against them.
        """
        if not isinstance(prompt, str):
            completions = [c if isinstance(c, str) else one_reply(c) for c in completions]
        return self._encoded(prompt, completions, options, ended)[:2]

    def trajectories(
        self, prompt: str | Messages, completions: Sequence[str | Messages], options: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[list[int]], list[list[bool]]]:
        """As a call, of completions that may be several messages: replies of the assistant and what stands between them
        (results of tools, turns of the user), which are the tokens that the last value, of each completion, has False.

        Raises:
            ValueError: a completion that does not begin and end with a reply; a chat template that writes earlier
                replies anew once later ones follow, so that there is no one sequence; and as a call.
        """
        return self._encoded(prompt, completions, options, None)

    def _encoded(
        self,
        prompt: str | Messages,
        completions: Sequence[str | Messages],
        options: Mapping[str, Any] | None,
        ended: bool | None,
    ) -> tuple[list[int], list[list[int]], list[list[bool]]]:
        """Token ids of the prompt, of each completion, and which of these are the assistant's own."""
        before, found = self._texts(prompt, completions, options, ended)
        prompt_ids = self._ids(before)
        append = self.append_eos if ended is None else ended
        tails = [self._tail(before, prompt_ids, spans, append=append) for spans in found]
        prompt_ids, kept = self._fit(prompt_ids, [ids for ids, _ in tails])
        return prompt_ids, kept, [_own(weights[: len(ids)]) for ids, (_, weights) in zip(kept, tails, strict=True)]

    def prompt(self, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt that a model is to go on from."""
        return self._fit(self._ids(self.prompt_text(prompt, options)), [])[0]

    def seen_prompt(self, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> tuple[list[int], str]:
        """(token ids, text) of a prompt as a model that goes on from it sees it: what was cut is in neither."""
        text = self.prompt_text(prompt, options)
        whole, head = self._ids(text), self._bos()
        if not isinstance(prompt, str) and whole[: len(head)] != head:
            head = []  # a chat template says itself what prompts begin with
        self.cuts.prompt = False
        ids, _ = self._fit(whole, [], head)
        return ids, self._decode(ids[len(head) :]) if self.cuts.prompt else text

    def prompt_text(self, prompt: str | Messages, options: Mapping[str, Any] | None = None) -> str:
        """A prompt as a model sees it: messages as the chat template writes them, with the opening of the reply.

        Raises:
            ValueError: tools beside a prompt of text, or what the chat template has against the messages.
        """
        if isinstance(prompt, str):
            return _text_alone(prompt, options)
        return render(self.tokenizer, prompt, reply_follows=True, options={**self.template_options, **(options or {})})

    def policy_prompt(
        self, prompt: str | Messages, options: Mapping[str, Any] | None = None
    ) -> tuple[list[int], str, str | Messages]:
        """`seen_prompt` for a policy to answer, and the prompt that is left of it in the form that it came in.

        In mode left a conversation is shortened to max_prompt_length by whole turns (see `chat.shortened`), so that it
        stays one, for any chat template.
        """
        limit, left = self.max_prompt_length, prompt
        if not isinstance(prompt, str) and limit is not None and mode_of(self.truncation_mode) == "left":
            left = shortened(prompt, lambda messages: len(self._ids(self.prompt_text(messages, options))) <= limit)
        ids, text = self.seen_prompt(left, options)
        self.cuts.prompt |= left is not prompt
        return ids, text, left

    def conversation(self, messages: Messages) -> Conversation:
        """The last of `conversations`, which most often is the only one."""
        return self.conversations(messages)[-1]

    def conversations(
        self, messages: Messages, options: Mapping[str, Any] | None = None, start: int = 0
    ) -> list[Conversation]:
        """The conversation up to its last reply: one sequence, or several.

        Several where the chat template writes earlier turns anew when later ones follow: each reply is then in a
        sequence with the context that generation has for it. White space that a template puts behind a reply is context
        of the next turn, not part of the reply.

        Args:
            messages: the conversation.
            options: as in a call.
            start: the first message that may be trained on.

        Raises:
            Dropped: no reply fits max_length.
        """
        found = [self._sequence(pieces) for pieces in self._template(options).sequences(messages, start)]
        kept = [sequence for sequence in found if any(sequence.own)]
        if not kept:
            raise Dropped(f"no reply of the conversation fits max_length {self.max_length}")
        return kept

    def unmet_opening(self, messages: Messages, options: Mapping[str, Any] | None = None) -> str:
        """What generation puts before the last reply beyond what the reply follows in training; most often nothing."""
        end = max(i for i, m in enumerate(messages) if m["role"] == "assistant") + 1
        before = self.prompt_text(messages[: end - 1], options) if end > 1 else ""
        return before[len(self._template(options).reply(messages[:end])[0]) :]

    def _template(self, options: Mapping[str, Any] | None) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, {**self.template_options, **(options or {})})

    def _sequence(self, pieces: Sequence[Span]) -> Conversation:
        """Context, reply, context, reply, ... to token ids."""
        context, *rest = pieces
        prompt_ids = self._ids(context.text)
        ids, weights = self._tail(context.text, prompt_ids, rest, append=self.append_eos)
        prompt_ids, (ids,) = self._fit(prompt_ids, [ids])
        return Conversation(prompt_ids, ids, _own(weights[: len(ids)]), weights[: len(ids)])

    def _tail(
        self, before: str, prompt_ids: list[int], spans: Sequence[Span], *, append: bool
    ) -> tuple[list[int], list[float]]:
        """Token ids of what follows the prompt, and what each of them counts for: 0 where it is not the assistant's."""
        text, ids = before, list[int]()
        weights: list[float] = []
        for i, span in enumerate(spans):
            new = self._continuation(text, prompt_ids + ids, span.text)
            if span.is_reply:
                new = self._ended(new, span, append=append and i == len(spans) - 1)
            ids += new
            weights += [span.weight if span.is_reply else 0.0] * len(new)
            text += span.text
        return ids, weights

    def _texts(
        self,
        prompt: str | Messages,
        completions: Sequence[str | Messages],
        options: Mapping[str, Any] | None,
        ended: bool | None,
    ) -> tuple[str, list[list[Span]]]:
        """What all completions follow, and the pieces of each of them: a reply, context, a reply, ..."""
        if isinstance(prompt, str):
            if not all(isinstance(c, str) for c in completions):
                raise ValueError("a completion of messages needs a prompt of messages; this prompt is text")
            return _text_alone(prompt, options), [[Span(str(c), True)] for c in completions]
        template = self._template(options)
        template.check_tools(prompt)
        found = []
        for c in completions:
            turns = [{"role": "assistant", "content": c}] if isinstance(c, str) else c
            check_counted(turns)
            if len(turns) > 1:
                found.append(template.trajectory(prompt, turns))
                continue
            context, reply = template.reply([*prompt, *one_reply(turns)], checked=ended is None)
            if ended is False and reply.is_closed:
                reply = reply._replace(text=reply.text.removesuffix(reply.closing.strip()).rstrip())
            found.append((context, [reply]))
        # Of a template that opens some replies in another way than others the beginning that all have is the prompt.
        before = min((context for context, _ in found), key=len)
        return before, [
            [first._replace(text=context[len(before) :] + first.text), *rest] for context, (first, *rest) in found
        ]

    def _ended(self, ids: list[int], reply: Span, *, append: bool) -> list[int]:
        """The reply's ids up to its end: without white space after the end-of-sequence token, which is added if due."""
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if end == len(ids) or (reply.is_closed and not self._decode(ids[end:]).strip()):
                return ids[:end]
        due = append and not reply.is_closed
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


def _own(weights: list[float]) -> list[bool]:
    return [weight > 0 for weight in weights]


def _text_alone(prompt: str, options: Mapping[str, Any] | None) -> str:
    """The prompt. ValueError if there are tools, which only a chat template could write."""
    if (options or {}).get("tools"):
        raise ValueError("tools need a prompt of messages; this prompt is text")
    return prompt


def one_reply(completion: Messages) -> Messages:
    """The completion, if it is one reply of the assistant. ValueError otherwise."""
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError("a completion of messages must be one reply of the assistant to the same conversation")
    if completion[0].get("weight") == 0:
        raise ValueError("a completion must not be a reply with a weight of 0: nothing of it would be trained on")
    return completion
