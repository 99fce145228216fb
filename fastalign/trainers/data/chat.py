"""Conversations to text, by the tokenizer's own chat template, cut where the assistant's turns begin and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: mappings with `role` and `content`, oldest first."""


class Span(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    is_reply: bool
    """Written by the assistant, so trained on."""
    is_closed: bool
    """The template marks its end, so that no end-of-sequence token is missing."""


def is_chat(value: Any) -> TypeGuard[Messages]:
    """Whether a cell holds messages rather than text."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) for m in value)


def check_messages(messages: Messages, where: str) -> None:
    """ValueError naming the place unless every message has a role and a text, and replies are not empty."""
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{where} must hold messages with a role and a content, both text; one has {message!r}")
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where} must not hold an empty reply of the assistant")


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, reply_follows: bool) -> str:
    """The conversation as the template writes it; with the opening of the assistant's turn if its reply follows."""
    if tokenizer.chat_template is None:
        raise ValueError("conversational rows need a tokenizer with a chat template; this one has none")
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=reply_follows))


def reply_span(tokenizer: PreTrainedTokenizerBase, before: str, messages: Messages) -> Span:
    """What the template adds to `before` when the conversation goes on to the end of `messages`, an assistant's turn.

    Raises ValueError where the template writes the earlier turns otherwise once a reply is there: what the model is
    trained on would then not be what it sees when it is asked.
    """
    whole = render(tokenizer, messages, reply_follows=False)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template must write a prompt the same way with and without the reply after it; this one turns "
            f"{before[-80:]!r} into {whole[max(0, len(before) - 80) : len(before)]!r}"
        )
    text = whole[len(before) :]
    return Span(text, True, not text.rstrip().endswith(messages[-1]["content"].rstrip()))


def spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[Span]:
    """The conversation in pieces, up to its last reply: context, reply, context, reply, ...

    Raises ValueError if there is no reply, or the template rewrites earlier turns.
    """
    out: list[Span] = []
    text = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], reply_follows=True) if i else ""
        if not before.startswith(text):
            raise ValueError(
                "the chat template must not rewrite earlier turns: give these rows as prompt and completion"
            )
        reply = reply_span(tokenizer, before, messages[: i + 1])
        out += [Span(before[len(text) :], False, True), reply]
        text = before + reply.text
    if not out:
        raise ValueError("messages must hold at least one turn of the assistant")
    return out
