"""Conversations: what their messages may hold, checked and brought to the one form that chat templates are given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A conversation: mappings with `role`, `content` (a text, or a list of text parts) and what else the template reads:
`tool_calls`, `reasoning_content`, `name`, ... ; oldest first. An assistant's `weight` of 0 leaves it untrained; others
are of supervised fine-tuning alone."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names that a message's reasoning goes by."""

_FRAME = ("system", "developer")
"""Roles whose messages are no turns."""

_OTHER_WEIGHTS = ("train", "trainable", "training", "loss_weight")
"""What other programs call a message's weight: refused, since nothing would come of it."""


def is_chat(value: Any) -> TypeGuard[Messages]:
    """Whether a cell holds messages rather than text."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) for m in value)


def check_messages(messages: Messages, where: str) -> None:
    """Whether these are messages that can be trained on.

    Raises:
        ValueError: naming the place, a message without role or content, a part that is no text, a reply of the
            assistant that says and does nothing, a weight that is no finite number of at least 0.
    """
    for message in messages:
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if not isinstance(role, str) or not (_is_content(content, where) or (content is None and calls)):
            raise ValueError(f"{where} must hold messages with a role and a content, both text; one has {message!r}")
        if message.get("function_call"):
            raise ValueError(f"{where} must give calls as tool_calls; one message has a function_call")
        if calls and not all(isinstance(c, Mapping) for c in calls):
            raise ValueError(f"{where} must hold tool_calls as a list of mappings; one has {calls!r}")
        if role == "assistant" and not (content_of(message).strip() or calls or reasoning_of(message).strip()):
            raise ValueError(f"{where} must not hold an empty reply of the assistant")
        weight = message.get("weight")
        if weight is not None and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(f"{where} must hold weights of 0 or more; one message has {weight!r}")
        for name in _OTHER_WEIGHTS:
            if message.get(name) is not None:
                raise ValueError(f"{where} must call a message's weight weight; one has {name!r}")


def _is_content(content: Any, where: str) -> bool:
    if not isinstance(content, (list, tuple)):
        return isinstance(content, str)
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where} must hold content of text; one message has a part of type {kind!r}")
    return True


def content_of(message: Mapping[str, Any]) -> str:
    """What a message says: its text, or its parts' texts one after the other; nothing where it only calls tools."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a message brings beside its content."""
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), "")


def transcript(messages: Messages) -> str:
    """A conversation for people and judges to read: `role: content` of each message, then its calls of tools."""
    lines = []
    for message in messages:
        calls = without_none(message.get("tool_calls") or [])
        said = [content_of(message), *(json.dumps(call, ensure_ascii=False) for call in calls)]
        lines.append(f"{message['role']}: " + "\n".join(part for part in said if part))
    return "\n".join(lines)


def shortened(messages: Messages, fits: Callable[[Messages], bool]) -> Messages:
    """The conversation without its oldest turns, so that it fits; what is left begins with a user's, and what stands
    before all turns (system, developer) stays. Of the last such rest, the longest message loses its beginning.

    Raises:
        ValueError: it does not fit even so.
    """
    if fits(messages):
        return messages
    frame = [m for m in messages if m["role"] in _FRAME]
    turns = [m for m in messages if m["role"] not in _FRAME]
    if not turns:
        raise ValueError("the system message is too long")
    starts = [i for i, m in enumerate(turns) if m["role"] == "user"] or [0]
    for start in starts:
        if start and fits(rest := [*frame, *turns[start:]]):
            return rest
    rest = [*frame, *turns[starts[-1] :]]
    at = max(range(len(frame), len(rest)), key=lambda i: len(content_of(rest[i])))
    content, room, too_many = content_of(rest[at]), 0, len(content_of(rest[at]))
    cut = list(rest)
    while too_many - room > 1:
        middle = (room + too_many) // 2
        cut[at] = {**rest[at], "content": content[len(content) - middle :]}
        room, too_many = (middle, too_many) if fits(cut) else (room, middle)
    if not room:
        raise ValueError("what the chat template writes beside the last message's text (system, tools) is too long")
    cut[at] = {**rest[at], "content": content[len(content) - room :]}
    return cut


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether the message is a reply that training counts."""
    return message["role"] == "assistant" and message.get("weight") != 0


def weight_of(message: Mapping[str, Any]) -> float:
    """What each token of a reply counts for in supervised fine-tuning."""
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


def check_counted(messages: Messages) -> None:
    """ValueError for a reply that counts for more or less than others where replies count alike or not at all."""
    other = [m["weight"] for m in messages if m["role"] == "assistant" and weight_of(m) not in (0.0, 1.0)]
    if other:
        raise ValueError(f"replies that are compared must have weights of 0 or 1; one has {other[0]!r}")


def plain(messages: Messages) -> list[dict[str, Any]]:
    """The messages as templates expect them: contents of one text each, arguments of tool calls as mappings, their type
    (there is but one) beside them.

    What is None is left out, at every depth: tables of rows fill in the keys that only other rows have.
    """
    out = []
    for message in messages:
        given = without_none(message)
        given.pop("weight", None)
        if "content" in given:
            given["content"] = content_of(given)
        if given.get("tool_calls"):
            given["tool_calls"] = [_call(call) for call in given["tool_calls"]]
        out.append(given)
    return out


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments, often a text of JSON, are what that text says."""
    inner = call.get("function", call)
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = None
        if isinstance(arguments, dict):
            inner = {**inner, "arguments": arguments}
    return {"type": "function", **call, "function": inner} if "function" in call else inner


def without_none(value: Any) -> Any:
    """A copy in which no mapping has a value of None."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the row's columns `tools` and `chat_template_kwargs` tell the chat template; either may be a text of JSON.

    Raises:
        ValueError: tools that are no list of mappings, or chat_template_kwargs that are no mapping.
    """
    tools, options = (_parsed(row.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if isinstance(tools, list):
        tools = [_parsed(tool, "tools") for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise ValueError(f"column 'tools' must hold a list of tools, each a mapping (JSON schema); got {tools!r}")
    if options and not isinstance(options, Mapping):
        raise ValueError(f"column 'chat_template_kwargs' must hold a mapping; got {options!r}")
    return {**without_none(options or {}), **({"tools": without_none(tools)} if tools else {})}


def _parsed(value: Any, column: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"column {column!r} must hold JSON where it holds text: {error}") from None
