"""Rows of one kind as those of another, where a trainer asks for it: rated completions as lists, lists as pairs, ...

What cannot be converted is counted and told: ratings that are all alike make no pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .chat import is_chat
from .forms import number_of
from .mixed import from_rows
from .problems import Tally, report
from .rowwise import Row, map_rows

_RATINGS = ("label", "helpfulness")
"""Columns that rate one completion: KTO's and HelpSteer's."""


def as_completions(rows: Dataset) -> Dataset:
    """For supervised fine-tuning: of rated completions the good ones, of lists the best of each.

    Raises:
        ValueError: a label that is neither true nor false; no good one.
    """
    names = set(rows.column_names)
    if {"prompt", "completion", "label"} <= names and "messages" not in names:
        good = [i for i, label in enumerate(rows["label"]) if _label(label, i)]
        if not good:
            raise ValueError("dataset must have a row whose label is true")
        if len(good) < len(rows):
            said = f"of {len(rows)} rows the {len(good)} whose label is true are trained on"
            report(Tally(said=[said]))
        return rows.select(good).remove_columns("label")
    if {"prompt", "completions"} <= names and not names & {"messages", "completion", "text"}:
        report(Tally(said=["of each list the best completion is trained on"]))
        return map_rows(rows, _best, _list_columns(rows), skip_bad_rows=False, desc="best of lists")
    return rows


def as_lists(rows: Dataset) -> Dataset:
    """For ranked lists: rated completions of one prompt, wherever they stand, as one list with `rewards`.

    Raises:
        ValueError: a rating that is none; no prompt with two completions that differ in it.
    """
    names = set(rows.column_names)
    rating = next((name for name in _RATINGS if name in names), None)
    if rating is None or not {"prompt", "completion"} <= names or names & {"chosen", "completions"}:
        return rows
    groups: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows.select_columns(["prompt", "completion", rating])):
        group = groups.setdefault(repr(row["prompt"]), {"prompt": row["prompt"], "completions": [], "rewards": []})
        group["completions"].append(row["completion"])
        group["rewards"].append(_rating(row[rating], rating, i))
    lists = [group for group in groups.values() if len(set(group["rewards"])) > 1]
    if not lists:
        raise ValueError(f"dataset of rated completions needs two of one prompt that differ in {rating}; none do")
    if len(lists) < len(groups):
        alone = len(groups) - len(lists)
        report(Tally(said=[f"of {len(groups)} prompts {alone} have no two completions that differ in {rating}"]))
    return from_rows(lists)


def as_pairs(rows: Dataset) -> Dataset:
    """For preferences: of each list the best completion and the worst.

    Raises:
        ValueError: no list whose completions differ; what `as_lists` refuses.
    """
    rows = as_lists(rows)
    names = set(rows.column_names)
    if not {"prompt", "completions"} <= names or "chosen" in names:
        return rows
    columns = [name for name in ("completions", "rewards", "ranks") if name in names]
    differ = [i for i, row in enumerate(rows.select_columns(columns)) if len(set(_ranks(row))) > 1]
    if not differ:
        raise ValueError("dataset of lists needs one whose completions differ in rank, to make pairs; none does")
    said = [f"of {len(rows)} lists {len(rows) - len(differ)} have no two ranks and make no pair"]
    said = said if len(differ) < len(rows) else []
    report(Tally(said=[*said, "of each list the best and the worst completion make the pair"]))
    return map_rows(rows.select(differ), _ends, _list_columns(rows), skip_bad_rows=False, desc="pairs of lists")


def as_prompts(rows: Dataset) -> Dataset:
    """For sampling: of a conversation what stands before its last reply."""
    if "prompt" in rows.column_names or "messages" not in rows.column_names:
        return rows
    return map_rows(rows, _before_reply, ["messages"], skip_bad_rows=False, desc="prompts of conversations")


# ---------------------------------------------------------------------------------------------------- one row of each
def _list_columns(rows: Dataset) -> list[str]:
    return [name for name in ("completions", "rewards", "ranks") if name in rows.column_names]


def _ranks(row: Row) -> Sequence[float]:
    """Low is good. Of lists that are no lists, or whose numbers do not match, nothing."""
    count = len(row["completions"] or [])
    ranks = row["ranks"] if row.get("ranks") is not None else None
    if ranks is None and row.get("rewards") is not None:
        ranks = [-number_of(r, "rewards") for r in row["rewards"]]
    ranks = range(count) if ranks is None else ranks
    if len(ranks) != count:
        raise ValueError(f"dataset of lists needs one number for each of {count} completions; got {len(ranks)}")
    return ranks


def _best(row: Row, index: int) -> dict[str, Any]:
    ranks = _ranks(row)
    if not ranks:
        raise ValueError("column 'completions' must hold a list with at least one completion")
    return {"completion": row["completions"][min(range(len(ranks)), key=lambda k: ranks[k])]}


def _ends(row: Row, index: int) -> dict[str, Any]:
    ranks, completions = _ranks(row), row["completions"]
    order = sorted(range(len(ranks)), key=lambda k: ranks[k])
    return {"chosen": completions[order[0]], "rejected": completions[order[-1]]}


def _before_reply(row: Row, index: int) -> dict[str, Any]:
    messages = row["messages"]
    if not is_chat(messages):
        raise ValueError(f"column 'messages' must hold a list of messages; got {type(messages).__name__}")
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=len(messages))
    return {"prompt": list(messages[:last])}


def _label(value: Any, index: int) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in known:
        raise ValueError(f"column 'label' must hold true or false; row {index} (from 0) has {value!r}")
    return known[str(value).lower()]


def _rating(value: Any, column: str, index: int) -> float:
    if column == "label":
        return float(_label(value, index))
    try:
        return number_of(value, column)
    except ValueError as error:
        raise ValueError(f"{error} in row {index} (from 0)") from None
