"""Rows of one kind as those of another, where a trainer asks for it: rated completions as lists, lists as pairs, ...

What cannot be converted is counted and told: ratings that are all alike make no pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from datasets import Dataset

from .chat import is_chat
from .forms import number_of, pair_of
from .mixed import from_rows
from .problems import Problems, Tally, report
from .rowwise import Row, map_rows

T = TypeVar("T")

_BESIDE = ("tools", "chat_template_kwargs")
"""Columns that go with every row that is made of one."""

_RATINGS = ("label", "helpfulness")
"""Columns that rate one completion: KTO's and HelpSteer's."""


def as_completions(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """For supervised fine-tuning: of rated completions the good ones, of lists the best of each.

    Raises:
        ValueError: a label that is neither true nor false; no good one.
    """
    names = set(rows.column_names)
    if {"prompt", "completion", "label"} <= names and "messages" not in names:
        labels = _of_each(rows, ["label"], lambda row: label_of(row["label"]), skip_bad_rows)
        good = [i for i, label in labels.items() if label]
        if not good:
            raise ValueError("dataset must have a row whose label is true")
        if len(good) < len(rows):
            said = f"of {len(rows)} rows the {len(good)} whose label is true are trained on"
            report(Tally(said=[said]))
        return rows.select(good).remove_columns("label")
    if {"prompt", "completions"} <= names and not names & {"messages", "completion", "text"}:
        report(Tally(said=["of each list the best completion is trained on"]))
        return map_rows(rows, _best, _list_columns(rows), skip_bad_rows=skip_bad_rows, desc="best of lists")
    return rows


def as_lists(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """For ranked lists: rated completions of one prompt, wherever they stand, as one list with `rewards`.

    Raises:
        ValueError: a rating that is none; no prompt with two completions that differ in it.
    """
    names = set(rows.column_names)
    rating = next((name for name in _RATINGS if name in names), None)
    if rating is None or not {"prompt", "completion"} <= names or names & {"chosen", "completions"}:
        return rows
    groups: dict[str, dict[str, Any]] = {}
    found = _of_each(rows, [rating], lambda row: _rating(row[rating], rating), skip_bad_rows)
    for i, row in enumerate(rows.select_columns(["prompt", "completion"])):
        if i not in found:
            continue
        group = groups.setdefault(repr(row["prompt"]), {"prompt": row["prompt"], "completions": [], "rewards": []})
        group["completions"].append(row["completion"])
        group["rewards"].append(found[i])
    lists = [group for group in groups.values() if len(set(group["rewards"])) > 1]
    if not lists:
        raise ValueError(f"dataset of rated completions needs two of one prompt that differ in {rating}; none do")
    if len(lists) < len(groups):
        alone = len(groups) - len(lists)
        report(Tally(said=[f"of {len(groups)} prompts {alone} have no two completions that differ in {rating}"]))
    return from_rows(lists)


def as_pairs(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """For preferences: of each list the best completion and the worst.

    Raises:
        ValueError: no list whose completions differ; what `as_lists` refuses.
    """
    rows = as_lists(rows, skip_bad_rows)
    names = set(rows.column_names)
    if not {"prompt", "completions"} <= names or "chosen" in names:
        return rows
    columns = [name for name in ("completions", "rewards", "ranks") if name in names]
    ranks = _of_each(rows, columns, _ranks, skip_bad_rows)
    differ = [i for i, each in ranks.items() if len(set(each)) > 1]
    if not differ:
        raise ValueError("dataset of lists needs one whose completions differ in rank, to make pairs; none does")
    said = [f"of {len(ranks)} lists {len(ranks) - len(differ)} have no two ranks and make no pair"]
    said = said if len(differ) < len(ranks) else []
    report(Tally(said=[*said, "of each list the best and the worst completion make the pair"]))
    return map_rows(rows.select(differ), _ends, _list_columns(rows), skip_bad_rows=skip_bad_rows, desc="pairs of lists")


def as_unpaired(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """For single completions with a `label`: of each pair the chosen one with true, then the rejected one with false.

    Raises:
        ValueError: rows with neither labels nor pairs (nor lists, which make pairs); a row that is no pair.
    """
    if {"prompt", "completion", "label"} <= set(rows.column_names):
        return rows
    rows = as_pairs(rows, skip_bad_rows)
    if not {"chosen", "rejected"} <= set(rows.column_names):
        raise ValueError(
            "dataset needs the columns prompt, completion and label, or pairs (chosen, rejected); it has "
            f"{', '.join(rows.column_names)}"
        )
    more = [name for name in _BESIDE if name in rows.column_names]
    numbers = itertools.count()
    columns = [name for name in ("prompt", "chosen", "rejected") if name in rows.column_names]
    pairs = _of_each(rows, columns, lambda row: pair_of(row, next(numbers)), skip_bad_rows)
    found = []
    for i, (prompt, ends) in pairs.items():
        beside = {name: rows[i][name] for name in more}
        found += [
            {"prompt": prompt, "completion": end, "label": label, **beside}
            for end, label in zip(ends, (True, False), strict=True)
        ]
    report(Tally(said=[f"of {len(pairs)} pairs both sides are rows of their own: chosen is true, rejected false"]))
    return from_rows(found)


def as_prompts(rows: Dataset, skip_bad_rows: bool = False) -> Dataset:
    """For sampling: of a conversation what stands before its last reply."""
    if "prompt" in rows.column_names or "messages" not in rows.column_names:
        return rows
    return map_rows(rows, _before_reply, ["messages"], skip_bad_rows=skip_bad_rows, desc="prompts of conversations")


# ---------------------------------------------------------------------------------------------------- one row of each
def _of_each(rows: Dataset, columns: Sequence[str], what: Callable[[Row], T], skip_bad_rows: bool) -> dict[int, T]:
    """Row number → what is asked of it, of the rows that have it."""
    problems, found = Problems(skip_bad_rows), {}
    for i, row in enumerate(rows.select_columns(list(columns))):
        try:
            found[i] = what(row)
        except ValueError as error:
            problems.add(f"row {i} (from 0): {error}")
    problems.close(len(found))
    return found


def _list_columns(rows: Dataset) -> list[str]:
    return [name for name in ("completions", "rewards", "ranks") if name in rows.column_names]


def _ranks(row: Row) -> Sequence[float]:
    """A number for each completion; low is good. ValueError if the row has no such."""
    if not isinstance(row["completions"], list) or not row["completions"]:
        raise ValueError("column 'completions' must hold a list with at least one completion")
    count = len(row["completions"])
    ranks = [float(k) for k in range(count)]
    if row.get("ranks") is not None:
        ranks = [number_of(r, "ranks") for r in row["ranks"]]
    elif row.get("rewards") is not None:
        ranks = [-number_of(r, "rewards") for r in row["rewards"]]
    if len(ranks) != count:
        raise ValueError(f"dataset of lists needs one number for each of {count} completions; got {len(ranks)}")
    return ranks


def _best(row: Row, index: int) -> dict[str, Any]:
    ranks = _ranks(row)
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


def label_of(value: Any) -> bool:
    """A label as it may be written: true, 1, "True". ValueError if it is none."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).lower() not in known:
        raise ValueError(f"column 'label' must hold true or false; got {value!r}")
    return known[str(value).lower()]


def _rating(value: Any, column: str) -> float:
    return float(label_of(value)) if column == "label" else number_of(value, column)
