"""The columns of well-known data sets to those of the trainers.

| form | columns | becomes |
| --- | --- | --- |
| ShareGPT | `conversations` of `from` and `value`, perhaps `system`; with `chosen` and `rejected` a pair | `messages` |
| Alpaca | `instruction`, `output`, perhaps `input`, `system` | `prompt`, `completion` |
| HH transcripts | `chosen`, `rejected`: "Human: ... Assistant: ..." that begin alike | `prompt`, `chosen`, `rejected` |
| UltraFeedback (H4), pairs | `prompt`, whole conversations in `chosen`, `rejected` | the same, less what is shared |
| Nectar | `prompt`, `answers` of `answer` and `rank` | `prompt`, `completions`, `ranks` |
| HelpSteer | `prompt`, `response`, `helpfulness` | `prompt`, `completion`; grouped by prompt: lists, pairs |
| HelpSteer 3 | `context`, `response1`, `response2`, `overall_preference` | `prompt`, `completions`, `ranks` |
| KTO | `prompt`, `completion`, `label` | for `sft` the good ones; grouped by prompt: lists, pairs |

Other columns stay as they are. `--columns theirs=ours` names those of any other form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from .cells import cell, checked_text
from .chat import is_chat
from .rowwise import Row, map_rows

TEXTS = (
    *("prompt", "completion", "text", "chosen", "rejected", "instruction", "input", "output", "response", "system"),
    *("response1", "response2", "context"),
)
"""Columns whose cells are texts, whatever they look like."""

_OURS = (*TEXTS, "messages", "completions", "rewards", "ranks", "margin", "labeler", "label", "conversations", "tools")

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""ShareGPT's names of who speaks."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """The rows with the user's names of columns: theirs → ours, or by mistake the other way round.

    Raises:
        ValueError: a column that is not there.
    """
    for theirs, ours in columns.items():
        if theirs in _OURS and ours not in _OURS:
            theirs, ours = ours, theirs
        if theirs not in rows.column_names:
            if ours in rows.column_names:  # of several sources some may have it under our name
                continue
            raise ValueError(f"columns names {theirs!r}, which is not there; there are {', '.join(rows.column_names)}")
        if ours in rows.column_names and ours != theirs:
            rows = rows.remove_columns(ours)
        rows = rows.rename_column(theirs, ours) if ours != theirs else rows
    return rows


def standard(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """The rows in our columns, if they are of a form that is known; else as they are.

    Raises:
        ValueError: rows that cannot be converted, up to ten of them.
    """
    for form in _FORMS:
        gone = form.columns(rows)
        if gone is not None:
            there = [name for name in (*gone, *form.optional) if name in rows.column_names]
            return map_rows(rows, form.convert, there, skip_bad_rows=skip_bad_rows, desc=f"reading {form.name}")
    return rows


class Form(NamedTuple):
    """One known form."""

    name: str
    columns: Callable[[Dataset], Sequence[str] | None]
    """The columns that it is made of, if the rows have it; else None."""
    convert: Callable[[Row, int], dict[str, Any]]
    optional: Sequence[str] = ()
    """Further columns that the conversion uses up where they are there."""


def _has(rows: Dataset, *names: str) -> bool:
    return set(names) <= set(rows.column_names)


def _first(rows: Dataset, column: str) -> Any:
    """The column's first cell that is not None."""
    return next((value for value in itertools.islice(rows[column], 1000) if value is not None), None)


# ----------------------------------------------------------------------------------------------------------- ShareGPT
def _sharegpt(rows: Dataset) -> Sequence[str] | None:
    column = _conversation_column(rows.column_names)
    if column is None:
        return None
    if column == "messages" and not (is_chat(_first(rows, column)) and "from" in _first(rows, column)[0]):
        return None
    return [column, *(("chosen", "rejected") if _has(rows, "chosen", "rejected") else ())]


def _conversation_column(names: Sequence[str]) -> str | None:
    found = [name for name in ("conversations", "conversation", "messages") if name in names]
    return found[0] if found and ("messages" not in found or found == ["messages"]) else None


def _from_sharegpt(row: Row, index: int) -> dict[str, Any]:
    messages = _messages(row[str(_conversation_column(list(row)))], "conversations")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if "chosen" not in row:
        return {"messages": messages}
    ends = {name: _messages(row[name], name) for name in ("chosen", "rejected")}
    return {"prompt": messages, **ends}


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages of `role` and `content`, from some of `from` and `value`; other keys stay."""
    turns = [value] if isinstance(value, Mapping) else value
    if not is_chat(turns):
        raise ValueError(f"column {column!r} must hold a list of messages; got {type(value).__name__}")
    out = []
    for turn in turns:
        if turn.get("from") is None:
            out.append({name: each for name, each in turn.items() if name not in ("from", "value")})
            continue
        role = _ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise ValueError(f"column {column!r} must name as speakers {', '.join(_ROLES)}; got {turn['from']!r}")
        rest = {name: each for name, each in turn.items() if name not in ("from", "value", "role", "content")}
        out.append({"role": role, "content": turn.get("value"), **rest})
    return out


# ------------------------------------------------------------------------------------------------------ Alpaca, ratings
def _alpaca(rows: Dataset) -> Sequence[str] | None:
    known = _has(rows, "instruction", "output") and not _has(rows, "prompt")
    return ("instruction", "output") if known else None


def _from_alpaca(row: Row, index: int) -> dict[str, Any]:
    if any(row.get("history") or []):
        raise ValueError("column 'history' must be empty: give such rows as messages")
    parts = [cell(row, name, index, may_be_empty=True) for name in ("system", "instruction", "input") if name in row]
    prompt = "\n\n".join(part for part in parts if part.strip())
    return {"prompt": f"{prompt}\n" if prompt else "", "completion": cell(row, "output", index, may_be_empty=False)}


def _responses(rows: Dataset) -> Sequence[str] | None:
    return ("response",) if _has(rows, "prompt", "response") and not _has(rows, "completion") else None


def _from_response(row: Row, index: int) -> dict[str, Any]:
    return {"completion": row["response"]}


def _nectar(rows: Dataset) -> Sequence[str] | None:
    return ("answers",) if _has(rows, "prompt", "answers") and is_chat(_first(rows, "answers")) else None


def _from_nectar(row: Row, index: int) -> dict[str, Any]:
    answers = row["answers"]
    if not is_chat(answers) or any("answer" not in a or not isinstance(a.get("rank"), (int, float)) for a in answers):
        raise ValueError("column 'answers' must hold a list of mappings with an answer and its rank, a number")
    return {"completions": [a["answer"] for a in answers], "ranks": [float(a["rank"]) for a in answers]}


def _helpsteer3(rows: Dataset) -> Sequence[str] | None:
    columns = ("context", "response1", "response2", "overall_preference")
    return columns if _has(rows, *columns) else None


def _from_helpsteer3(row: Row, index: int) -> dict[str, Any]:
    prefers_second = number_of(row["overall_preference"], "overall_preference")
    ends = [cell(row, name, index, may_be_empty=False) for name in ("response1", "response2")]
    return {"prompt": row["context"], "completions": ends, "ranks": [prefers_second, 0.0]}


def number_of(value: Any, column: str) -> float:
    """A rating, a finite number or its text. ValueError if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise ValueError(f"column {column!r} must hold a finite number; got {value!r}")
    return number


# --------------------------------------------------------------------------------------------------------------- pairs
def _pairs(rows: Dataset) -> Sequence[str] | None:
    """Pairs whose prompt is inside both sides."""
    if not _has(rows, "chosen", "rejected"):
        return None
    whole = "prompt" not in rows.column_names or is_chat(_first(rows, "chosen"))
    if not whole or ("prompt" in rows.column_names and is_chat(_first(rows, "prompt"))):
        return None
    return ("chosen", "rejected", "prompt")


def _from_pair(row: Row, index: int) -> dict[str, Any]:
    prompt, (chosen, rejected) = pair_of(row, index)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def pair_of(row: Row, index: int) -> tuple[Any, list[Any]]:
    """(prompt, [chosen, rejected]); the prompt is what both begin with where there is none of its own."""
    chosen, rejected = (cell(row, name, index, may_be_empty=False) for name in ("chosen", "rejected"))
    prompt = cell(row, "prompt", index, may_be_empty=True) if row.get("prompt") is not None else None
    if is_chat(chosen) != is_chat(rejected):
        raise ValueError("chosen and rejected must both be text or both be messages")
    if not is_chat(chosen):
        if "prompt" in row:
            return prompt or "", [chosen, rejected]
        shared = _shared_text(chosen, rejected)
        return shared, [_remainder(text, shared, index) for text in (chosen, rejected)]
    # Messages after a prompt of text, or none, repeat the whole conversation.
    turns = 0 if is_chat(prompt) else _shared_turns(chosen, rejected)
    before, after = [*(prompt if is_chat(prompt) else []), *chosen[:turns]], [chosen[turns:], rejected[turns:]]
    if not before:
        raise ValueError("chosen and rejected must begin with the same messages, or have a prompt of messages")
    if any(rest[end]["role"] != "assistant" for rest in after for end in (0, -1)):
        raise ValueError(
            "chosen and rejected must each begin, after what they share, and end with a reply of the assistant"
        )
    return before, after


def _shared_text(chosen: str, rejected: str) -> str:
    """What both texts begin with, to the last white space or line break: words are not torn.

    Transcripts of turns are shared to the opening of the last one, however alike the replies themselves begin.
    """
    if _HUMAN in chosen and _ASSISTANT in chosen:
        ends = [text.rfind(_ASSISTANT) + len(_ASSISTANT) for text in (chosen, rejected)]
        if ends[0] != ends[1] or chosen[: ends[0]] != rejected[: ends[0]]:
            raise ValueError("chosen and rejected must be transcripts that differ in the assistant's last turn alone")
        return chosen[: ends[0]]
    if chosen == rejected:
        return ""  # nothing tells where the prompt ends
    alike = (left == right for left, right in zip(chosen, rejected, strict=False))
    end = sum(1 for _ in itertools.takewhile(bool, alike))
    return chosen[: max(chosen.rfind(" ", 0, end), chosen.rfind("\n", 0, end) + 1, 0)]


def _remainder(text: str, shared: str, index: int) -> str:
    return checked_text(text[len(shared) :], "what follows the shared beginning", index, may_be_empty=False)


def _shared_turns(chosen: Sequence[Row], rejected: Sequence[Row]) -> int:
    """How many messages both begin with, up to a reply of the assistant in each; the last one is not among them."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
    count = sum(1 for _ in alike)
    # Where the results of a call are what differs, the call stands in both.
    while count and {chosen[count]["role"], rejected[count]["role"]} != {"assistant"}:
        count -= 1
    return count


_FORMS = (
    Form("ShareGPT", _sharegpt, _from_sharegpt, ("system",)),
    Form("Alpaca", _alpaca, _from_alpaca, ("input", "system", "history")),
    Form("Nectar", _nectar, _from_nectar),
    Form("HelpSteer 3", _helpsteer3, _from_helpsteer3),
    Form("responses", _responses, _from_response),
    Form("pairs", _pairs, _from_pair),
)
