"""Conversations to text, by the tokenizer's own chat template, cut where the assistant's turns begin and end.

Two texts are compared: what the template writes before a reply, with the opening of the assistant's turn, which is what
generation sees; and what it writes once the reply is there. Where the second goes on from the first, the rest is the
reply. Some templates open the turn in one way for generation (say with `<think>`) and in another for a reply that is
there already: then the reply begins where the two part. Some write earlier turns anew once later ones follow (without
their reasoning, or with another end): then each reply is trained on in a sequence of its own, with the context that
generation has there.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...models.loading import load
from ...utils.text import first_line
from .chat import Messages, content_of, is_trained, plain, reasoning_of, weight_of

_MARK = "Qx7Wordx7Q"
"""A word that no conversation has, to see where a template writes something, and whether it does."""


class Span(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    is_reply: bool
    """Written by the assistant, so trained on."""
    weight: float = 1.0
    """What each of its tokens counts for."""
    closing: str = ""
    """What the template puts behind a reply: where it is blank, an end-of-sequence token is missing."""

    @property
    def is_closed(self) -> bool:
        """Whether the template marks the end of a reply."""
        return bool(self.closing.strip())


def use_template(tokenizer: Any, path: str | None) -> None:
    """Gives the tokenizer the chat template of a .jinja file, or of the tokenizer in a folder (or hub's name).

    Raises:
        ValueError: nothing there, or a tokenizer without a chat template.
    """
    if path is None:
        return
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
        return
    if path.endswith(".jinja"):
        raise ValueError(f"chat_template_path must be an existing file; there is no {path!r}")
    found = load("chat_template_path", AutoTokenizer, path).chat_template
    if found is None:
        raise ValueError(f"chat_template_path must have a chat template; the tokenizer in {path!r} has none")
    tokenizer.chat_template = found


PATH_HELP = "Chat template in the place of the tokenizer's: a .jinja file, or a folder (or hub name) of a tokenizer"
OPTIONS_HELP = "What the chat template is told beside messages, as a mapping: '{\"enable_thinking\": false}'"
"""Help of the keys chat_template_path and chat_template_kwargs."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with the options of one row.

    Attributes:
        tokenizer: whose template it is.
        options: what the template is told beside the messages: `tools`, and further names that it reads.

    Raises:
        ValueError: no chat template, or an option that it does not read.
    """

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any] = field(default_factory=dict)
    _around: dict[str, tuple[str, str, str]] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Conversation → what `_turn` found: of several completions all have the same."""

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError("conversational rows need a tokenizer with a chat template; this one has none")
        source = template if isinstance(template, str) else "\n".join(template.values())
        for name in self.options:
            if name != "tools" and not re.search(rf"\b{re.escape(name)}\b", source):
                raise ValueError(f"chat_template_kwargs must hold what the chat template reads; it reads no {name!r}")

    # ------------------------------------------------------------------------------------------------------ whole text
    def render(self, messages: Messages, *, reply_follows: bool) -> str:
        """The conversation as the template writes it; with the opening of the assistant's turn if its reply follows.

        Raises:
            ValueError: the template raises, or leaves out what a message says.
        """
        raised = left_out = ""
        for shape in _shapes(plain(messages)):
            try:
                text = self._write(shape, reply_follows)
                lost = self._lost(shape, text, reply_follows)
            except Exception as error:  # a template is a program of its own and may raise anything
                raised = raised or f"the chat template refuses the conversation: {first_line(error)}"
                continue
            if lost is None:
                return text
            left_out = left_out or f"the chat template leaves out what the {lost} says"
        raise ValueError(left_out or raised)

    def _write(self, messages: Any, reply_follows: bool) -> str:
        write: Any = self.tokenizer.apply_chat_template
        return str(write(messages, tokenize=False, add_generation_prompt=reply_follows, **self.options))

    def _lost(self, messages: list[dict[str, Any]], text: str, reply_follows: bool) -> str | None:
        """The role of a message whose content is not in the text, nor would be any other in its place."""
        squeezed = _squeezed(text)
        missing = [i for i, m in enumerate(messages) if not _is_in(m, squeezed, is_last=m is messages[-1])]
        if not missing:
            return None
        marked = list(messages)
        for i in missing:
            word = f"{_MARK}{i}."
            content = [{"type": "text", "text": word}] if isinstance(marked[i]["content"], list) else word
            marked[i] = {**marked[i], "content": content}
        written = self._write(marked, reply_follows)
        return next((str(messages[i]["role"]) for i in missing if f"{_MARK}{i}." not in written), None)

    # -------------------------------------------------------------------------------------------------------- replies
    def reply(self, messages: Messages, *, checked: bool = True) -> tuple[str, Span]:
        """(context, the reply to it): the conversation to the end of `messages`, an assistant's turn, in two parts.

        Args:
            messages: what was said, and the reply.
            checked: whether all of the reply must come out; a sampled one need not.

        Raises:
            ValueError: as `render`; what the reply holds is not in the text; or the template writes the earlier turns
                otherwise once a reply is there: what the model is trained on would then not be what it sees when it
                is asked.
        """
        *earlier, last = messages
        whole = self.render(messages, reply_follows=False)
        before, head, closing = self._turn(earlier)
        context = before
        if not earlier or not whole.startswith(before):
            context = self._parting(before, whole, head) if earlier else _common(whole, head)
            fixed = self._fixed(earlier)
            if before[len(fixed) :].strip() and context.rstrip() == fixed:
                raise ValueError(
                    f"the chat template writes a reply without what generation is given before it, "
                    f"{before[len(fixed) :]!r}: give another by chat_template_path"
                )
            if not context.startswith(fixed):
                raise ValueError(
                    "the chat template must write a prompt the same way with and without the reply after it; this one "
                    f"turns {before[-80:]!r} into {whole[max(0, len(before) - 80) : len(before)]!r}"
                )
        text = whole[len(context) :]
        opener = before[len(_common(before, head)) :].strip()
        if opener and not _holds(text, content_of(last)):
            # The template drops what stands before the answer (reasoning) when it writes a reply, and opens it when it
            # asks for one: the reply is what goes on from there.
            said = content_of(last).strip()
            context, text = before, said.removeprefix(opener).lstrip("\n") + closing
        if checked:
            self._check_reply(earlier, last, text)
        return context, Span(text.rstrip() if closing.strip() else text, True, weight_of(last), closing)

    def sequences(self, messages: Messages, start: int = 0) -> list[list[Span]]:
        """The conversation in pieces up to its last reply: context, reply, context, reply, ...

        One list of pieces, or several where the template writes earlier turns anew: each begins with all of its
        context, and every reply is in one of them.

        Args:
            messages: the conversation.
            start: the first message that may be trained on.

        Raises:
            ValueError: as `reply`; there is no reply to train on; or the template does not write the tools.
        """
        self.check_tools(messages)
        out: list[list[Span]] = []
        text = ""
        for i, message in enumerate(messages):
            if i < start or not is_trained(message):
                continue
            context, reply = self.reply(messages[: i + 1])
            if out:
                text = self._reopened(out[-1], text, context)
            if out and context.startswith(text):
                out[-1] += [Span(context[len(text) :], False), reply]
            else:
                out.append([Span(context, False), reply])
            text = context + reply.text
        if not out:
            raise ValueError("messages must hold at least one turn of the assistant, with a weight that is not 0")
        return out

    def trajectory(self, prompt: Messages, turns: Messages) -> tuple[str, list[Span]]:
        """(what is common to all that follows the prompt, the pieces from there): reply, context, reply, ...

        Raises:
            ValueError: as `sequences`; turns that do not begin and end with a reply that is trained on; or a template
                that writes earlier replies anew once later ones follow.
        """
        if not (is_trained(turns[0]) and is_trained(turns[-1])):
            raise ValueError("a completion of several messages must begin and end with a reply of the assistant")
        found = self.sequences([*prompt, *turns], len(prompt))
        if len(found) > 1:
            raise ValueError(
                "the chat template writes earlier replies anew once later ones follow, so that a completion of several "
                "is no one sequence: give a row for each reply, or another template by chat_template_path"
            )
        ((context, *rest),) = found
        return context.text, rest

    def _reopened(self, spans: list[Span], text: str, context: str) -> str:
        """The text of the sequence so far; if only so the context goes on from it, without the end of the whole
        conversation that some templates put behind the end of the turn."""
        eos, reply = str(self.tokenizer.eos_token or ""), spans[-1]
        ended_twice = eos and reply.text.endswith(eos) and reply.closing.strip().removesuffix(eos).strip()
        if context.startswith(text) or not ended_twice:
            return text
        before, shorter = text[: len(text) - len(reply.text)], reply.text.removesuffix(eos).rstrip()
        if not context.startswith(before + shorter):
            return text
        spans[-1] = reply._replace(text=shorter)
        return before + shorter

    def _turn(self, earlier: Messages) -> tuple[str, str, str]:
        """(what generation goes on from, what stands before a reply that is there, what stands behind it)."""
        known = repr(earlier)
        if known not in self._around:
            before = self.render(earlier, reply_follows=True) if earlier else ""
            reply = {"role": "assistant", "content": _MARK}
            head, mark, closing = self._write_plain([*earlier, reply]).rpartition(_MARK)
            if not mark:
                raise ValueError("the chat template leaves out what the assistant says")
            self._around[known] = before, head, closing
        return self._around[known]

    def _write_plain(self, messages: Messages) -> str:
        """The conversation with a word in place of the reply, in the first form that shows it."""
        for shape in _shapes(plain(messages)):
            try:
                text = self._write(shape, False)
            except Exception:  # as in `render`, which has said already what is wrong
                continue
            if _MARK in text:
                return text
        return ""

    def _parting(self, before: str, whole: str, head: str) -> str:
        """What the three have in common, no token of the template's torn."""
        common = _common(_common(before, whole), head)
        for token in self.tokenizer.get_added_vocab():
            at = before.rfind(token, 0, len(common) + len(token) - 1)
            if 0 <= at < len(common) < at + len(token):
                return before[:at]
        return common

    def _fixed(self, earlier: Messages) -> str:
        """The text of the earlier turns, but for the end of a conversation that may be written behind them."""
        if not earlier:
            return ""
        text = self.render(earlier, reply_follows=False).rstrip()
        return text.removesuffix(str(self.tokenizer.eos_token or "")).rstrip()

    # --------------------------------------------------------------------------------------------------------- checks
    def _check_reply(self, earlier: Messages, last: Mapping[str, Any], text: str) -> None:
        """ValueError unless all that the reply holds is in its text."""
        if not _holds(text, content_of(last)):
            raise ValueError(
                "the chat template leaves out a part of what the assistant says: give another by chat_template_path"
            )
        if _squeezed(reasoning_of(last)) not in _squeezed(text):
            raise ValueError(
                "the chat template leaves out the assistant's reasoning: write it into the content, or give another "
                "template by chat_template_path"
            )
        self.check_calls([*earlier, last])

    def check_calls(self, messages: Messages) -> None:
        """ValueError unless the template writes the names and the arguments of all calls of tools."""
        calls = 0
        marked = []
        for message in plain(messages):
            if message.get("tool_calls"):
                named = [{"name": f"{_MARK}{calls + k}", "arguments": {f"{_MARK}k{calls + k}": f"{_MARK}v{calls + k}"}}
                         for k in range(len(message["tool_calls"]))]  # fmt: skip
                calls += len(named)
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], **other}} if "function" in call else {**call, **other}
                    for call, other in zip(message["tool_calls"], named, strict=True)
                ]
            marked.append(message)
        if not calls:
            return
        text = self.render(marked, reply_follows=False)
        if any(f"{_MARK}{kind}{k}" not in text for k in range(calls) for kind in ("", "k", "v")):
            raise ValueError(
                "the chat template leaves out the assistant's tool_calls, or their arguments: give another by "
                "chat_template_path"
            )

    def check_tools(self, messages: Messages) -> None:
        """ValueError unless the template writes the tools that the row brings."""
        if not self.options.get("tools"):
            return
        without = ChatTemplate(self.tokenizer, {k: v for k, v in self.options.items() if k != "tools"})
        if self.render(messages, reply_follows=False) == without.render(messages, reply_follows=False):
            raise ValueError("the chat template leaves out the tools: give another by chat_template_path")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    reply_follows: bool,
    options: Mapping[str, Any] | None = None,
) -> str:
    """`ChatTemplate.render`, with tools checked."""
    template = ChatTemplate(tokenizer, options or {})
    template.check_tools(messages)
    return template.render(messages, reply_follows=reply_follows)


def _shapes(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages in the forms that templates differ in: beside calls of tools an empty content or none, arguments of
    calls as text, contents as lists of parts."""
    yield messages
    if any(m.get("tool_calls") for m in messages):
        filled = [{"content": "", **m} for m in messages]
        yield from (filled, [_with_text_arguments(m) for m in messages], [_with_text_arguments(m) for m in filled])
    yield [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    def text(inner: dict[str, Any]) -> dict[str, Any]:
        given = inner.get("arguments")
        return inner if isinstance(given, str) else {**inner, "arguments": json.dumps(given, ensure_ascii=False)}

    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = [{**call, "function": text(call["function"])} if "function" in call else text(call) for call in calls]
    return {**message, "tool_calls": changed}


def _common(one: str, other: str) -> str:
    """What both begin with."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in alike)]


def _is_in(message: Mapping[str, Any], squeezed: str, *, is_last: bool) -> bool:
    """Whether a text has what the message says, but for what templates may drop of earlier turns: reasoning, and what
    was said beside a call of tools."""
    content = content_of(message)
    if message["role"] == "assistant" and not is_last:
        content = "" if message.get("tool_calls") else content.rpartition("</think>")[2]
    return _squeezed(content) in squeezed


def _holds(text: str, content: str) -> bool:
    """Whether what stands between and behind the marks of reasoning in the content is in the text, but for spaces."""
    squeezed = _squeezed(text)
    return all(_squeezed(piece) in squeezed for piece in re.split(r"</?think>", content))


def _squeezed(text: str) -> str:
    return "".join(text.split())
