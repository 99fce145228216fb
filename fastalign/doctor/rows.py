"""The doctor's checks of what the trainers make of the rows: which they refuse, cut or drop, and what has no rating."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..trainers.data.encode import Encoder
from ..trainers.data.problems import LIMIT
from ..trainers.data.rowwise import Dropped
from ..trainers.data.tokenize import REFERENCE_COLUMNS, TEMPLATE_COLUMNS, converter
from ..trainers.policy.config import PolicyConfig

_RATINGS = ("rewards", "ranks")
_NUMBERS = ("margin", *REFERENCE_COLUMNS)


@dataclass
class Walk:
    """What became of every row on its way to token ids: numbers of rows, and words for the refused ones."""

    refused: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    prompts_cut: list[int] = field(default_factory=list)
    replies_cut: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    longest: int = 0


PROMPTS = ("prompt",)
"""The form of rows that only the policy's trainers take, whose prompts have a bound of their own."""


def walk(rows: Any, form: Sequence[str], encode: Encoder) -> Walk:
    """Every row through the conversion that the trainers use for rows of this form."""
    convert = converter(form)
    if tuple(form) == PROMPTS:
        limit = encode.max_prompt_length or PolicyConfig.max_prompt_length
        encode = replace(encode, max_length=2**30, max_prompt_length=limit)
    given = [name for name in TEMPLATE_COLUMNS if name in rows.column_names]
    columns = [*form, *given, *(name for name in _RATINGS if name in rows.column_names and "completions" in form)]
    out, cuts = Walk(), encode.cuts
    for i, row in enumerate(rows.select_columns(columns)):
        cuts.prompt = cuts.reply = False
        try:
            out.longest = max(out.longest, convert(row, i, encode)["length"])
        except Dropped:
            out.dropped.append(i)
            continue
        except Exception as error:  # a chat template is a program of its own and may raise anything
            out.refused.append(i)
            text = " ".join(str(error).split())
            out.words.append(text if f"row {i} " in text else f"row {i} (from 0): {text}")
            continue
        out.prompts_cut += [i] * cuts.prompt
        out.replies_cut += [i] * cuts.reply
    return out


def first_words(words: Sequence[str]) -> str:
    """The first ten of them, and how many more there are."""
    more = f"; and {len(words) - LIMIT} more" if len(words) > LIMIT else ""
    return "; ".join(words[:LIMIT]) + more


def ratings(row: Any) -> list[float] | None:
    """A list's ratings, high is good; those of the order where it has none. None for what is no rating of each."""
    completions = row.get("completions")
    if not isinstance(completions, (list, tuple)):
        return None
    for name, sign in (("rewards", 1.0), ("ranks", -1.0)):
        if name not in row:
            continue
        values = row[name]
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            return None
        if not all(is_number(value) for value in values):
            return None
        return [sign * value for value in values]
    return [-float(k) for k in range(len(completions))]


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def not_numbers(rows: Any) -> dict[str, list[int]]:
    """Column → rows in which it should hold a number and does not."""
    names = [name for name in _NUMBERS if name in rows.column_names]
    return {name: bad for name in names if (bad := [i for i, value in enumerate(rows[name]) if not is_number(value)])}
