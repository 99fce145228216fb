"""Rows in any of the usual forms to token ids; a row that cannot be used is named.

| form | columns |
| --- | --- |
| prompt and completion | `prompt`, `completion` |
| text alone | `text`, or `completion` |
| conversation | `messages` |
| pair | `prompt`, `chosen`, `rejected`; or `chosen`, `rejected` that begin alike: what they share is the prompt |
| triple | `prompt`, `chosen`, `rejected`, `reference` (gold) |
| rated completion | `prompt`, `completion`, `label` (true or false) |
| ranked list | `prompt`, `completions`, and `rewards` (high is good) or `ranks` (0 is best); without them best first |

Beside pairs may stand `margin`, and both of `ref_chosen_logps`, `ref_rejected_logps`; beside pairs and lists `labeler`.
Every prompt and completion is a text or a list of messages (`role`, `content`, and what else the chat template reads:
`tool_calls`, `reasoning_content`, ...). A completion of several messages (calls of tools, their results, further turns)
begins and ends with a reply of the assistant, and its replies are what is trained on. Beside messages may stand `tools`
and `chat_template_kwargs`. A reply of the assistant with a `weight` of 0 is context; with
another, in supervised fine-tuning, its tokens count for so much. What the chat template leaves out
is refused, with the row. Forms of well-known data sets become one of these on reading (see `forms`); rated completions
become lists, and lists pairs, where they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Value

from .cells import cell, checked_text
from .chat import Messages, check_messages, is_chat, template_options
from .cut import Cuts
from .encode import Encoder
from .files import Rows, read_rows, together
from .forms import pair_of
from .problems import Tally, report
from .rowwise import map_rows
from .targets import as_completions, as_lists, as_pairs, as_unpaired, label_of

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
SFT_FORMS = (("messages",), ("prompt", "completion"), ("text",), ("completion",))
PAIR_FORMS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
TRIPLE_FORM = ("prompt", "chosen", "rejected", "reference")
UNPAIRED_FORM = ("prompt", "completion", "label")
LIST_FORMS = (("prompt", "completions"), *PAIR_FORMS)

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that the chat template is told of."""

WEIGHTS = "weights"
"""Column of what the tokens of a completion count for."""

_PROMPT_CUT, _REPLY_CUT = "_prompt_cut", "_reply_cut"

Row = Mapping[str, Any]


def tokenize_sft(source: Rows, encode: Encoder) -> Dataset:
    """Rows to `prompt_ids`, `completion_ids`, `length`, and for conversations `own`: which ids are the assistant's;
    where replies have weights of their own, `weights`, what each of these ids counts for.

    A conversation whose earlier turns the chat template writes anew when later ones follow gives several rows (see
    `Encoder.conversations`), in its place.

    Raises ValueError naming the row if a completion is empty.
    """
    rows = as_completions(read_rows(source), encode.skip_bad_rows)
    form = _form(rows, SFT_FORMS)
    if isinstance(rows.features[form[-1]], Value) and form != ("messages",):
        return _map(rows, _completion, form, encode)
    found = _map(rows, _conversations, form, encode).map(_one_each, batched=True, desc="sequences")
    return found if _differ(found) else found.remove_columns(WEIGHTS)


def _differ(rows: Dataset) -> bool:
    """Whether replies have weights of their own."""
    weights = pc.unique(pc.list_flatten(rows.data.column(WEIGHTS)))
    return bool(set(weights.to_pylist()) - {0.0, 1.0})


def tokenize_preferences(source: Rows, encode: Encoder) -> Dataset:
    """Pairs to `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_own`, `rejected_own` (which ids are the assistant's)
    and `length`.

    Precomputed log-probabilities of the reference are kept. Raises ValueError naming the row if a completion is empty.
    """
    rows = as_pairs(read_rows(source), encode.skip_bad_rows)
    return _map(rows, _pair, _form(rows, PAIR_FORMS), encode, keep=together(rows, REFERENCE_COLUMNS, source))


def tokenize_triples(source: Rows, encode: Encoder) -> Dataset:
    """Rows of `prompt`, `chosen`, `rejected`, `reference` (gold) to `prompt_ids`, `chosen_ids`, `rejected_ids`,
    `gold_ids`, as many `*_own` (which ids are the assistant's) and `length`.

    Raises ValueError naming the row if a completion is empty.
    """
    rows = read_rows(source)
    return _map(rows, _triple, _form(rows, (TRIPLE_FORM,)), encode)


def tokenize_unpaired(source: Rows, encode: Encoder) -> Dataset:
    """Rows of `prompt`, `completion` and `label`, or pairs, to `prompt_ids`, `completion_ids`, `own` (which ids are the
    assistant's), `label` and `length`.

    Raises ValueError naming the row if a completion is empty or a label neither true nor false.
    """
    rows = as_unpaired(read_rows(source), encode.skip_bad_rows)
    return _map(rows, _labelled, UNPAIRED_FORM, encode)


def tokenize_lists(source: Rows, encode: Encoder) -> Dataset:
    """Ranked lists and pairs to `prompt_ids`, `completions_ids` (best first), `completions_own` (which ids are the
    assistant's), `ranks`, `length`.

    Where the rows bring them, also `rewards`, `margin` (pairs only) and `labeler`. Raises ValueError naming the row if
    a completion is empty, or rewards or ranks do not match the completions.
    """
    rows = as_lists(read_rows(source), encode.skip_bad_rows)
    form = _form(rows, LIST_FORMS)
    if form in PAIR_FORMS:
        return _map(rows, _pair_as_list, form, encode, keep=_present(rows, "margin", "labeler"))
    if "margin" in rows.column_names:
        raise ValueError("dataset with the column margin must hold pairs (chosen, rejected); this one has completions")
    if {"rewards", "ranks"} <= set(rows.column_names):
        raise ValueError("dataset must have one of the columns rewards and ranks; this one has both")
    order = _present(rows, "rewards", "ranks")
    return _map(rows, _ranked, (*form, *order), encode, keep=_present(rows, "labeler"))


# ------------------------------------------------------------------------------------------------------ forms of rows
def _form(rows: Dataset, forms: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of the forms whose columns are all there."""
    for columns in forms:
        if set(columns) <= set(rows.column_names):
            return columns
    choices = " or ".join(f"({', '.join(columns)})" for columns in forms)
    raise ValueError(f"dataset needs the columns {choices}; it has {', '.join(rows.column_names)}")


def _present(rows: Dataset, *names: str) -> list[str]:
    return [name for name in names if name in rows.column_names]


def _map(
    rows: Dataset,
    convert: Callable[[Row, int, Encoder], dict[str, Any]],
    columns: Sequence[str],
    encode: Encoder,
    keep: Sequence[str] = (),
) -> Dataset:
    """Every row through `convert`, which sees `columns`; the columns `keep` stay as they are, all others go.

    Tells how many rows were cut or left out, and how many are left. Each gets `rows`, its own number, by which a batch
    that goes wrong is named.
    """
    given = [*columns, *_present(rows, *TEMPLATE_COLUMNS)]
    rows = rows.select_columns([*given, *keep])
    cuts = Cuts()
    encode = replace(encode, cuts=cuts)

    def one(row: Row, index: int) -> dict[str, Any]:
        cuts.prompt = cuts.reply = False
        for name in keep:
            check_finite(row[name], name)
        out = convert(row, index, encode)
        several = isinstance(out["length"], list)
        number: list[Any] = [[index]] * len(out["length"]) if several else [index]
        return {**out, "rows": number, _PROMPT_CUT: cuts.prompt, _REPLY_CUT: cuts.reply}

    gone = [name for name in given if name not in keep]
    found = map_rows(rows, one, gone, skip_bad_rows=encode.skip_bad_rows, desc="tokenising")
    prompts, replies = sum(found[_PROMPT_CUT]), sum(found[_REPLY_CUT])
    report(Tally(rows=len(found), prompts_cut=prompts, replies_cut=replies))
    return found.remove_columns([_PROMPT_CUT, _REPLY_CUT])


def _one_each(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """A row for each of the sequences that a row's columns list."""
    return {name: [one for several in values for one in several] for name, values in rows.items()}


def converter(form: Sequence[str]) -> Callable[[Row, int, Encoder], dict[str, Any]]:
    """What makes token ids and their `length` of a row of these columns; of a `prompt` alone its `prompt_ids`."""
    single = {("messages",): _longest, ("prompt", "completions"): _ranked, ("prompt",): _prompt}
    return single.get(tuple(form)) or (_pair if tuple(form) in PAIR_FORMS else _completion)


# ---------------------------------------------------------------------------------------------------- one row of each
def _prompt(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    ids, _, _ = encode.policy_prompt(cell(row, "prompt", index, may_be_empty=True), template_options(row))
    if not ids:
        raise ValueError("column 'prompt' must have at least one token")
    return {"prompt_ids": ids, "length": len(ids)}


def _completion(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    prompt = cell(row, "prompt", index, may_be_empty=True) if "prompt" in row else ""
    column = "text" if "text" in row else "completion"
    if is_chat(row[column]):
        return _longest(row, index, encode)
    prompt_ids, (ids,) = encode(prompt, [cell(row, column, index, may_be_empty=False)], template_options(row))
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "length": len(prompt_ids) + len(ids)}


def _conversations(row: Row, index: int, encode: Encoder) -> dict[str, list[Any]]:
    """A conversation, or a prompt and the messages that follow it: lists, with an entry for each sequence."""
    before, messages = _conversation_of(row, index)
    found = encode.conversations([*before, *messages], template_options(row), len(before))
    return {
        "prompt_ids": [each.prompt_ids for each in found],
        "completion_ids": [each.ids for each in found],
        "own": [each.own for each in found],
        WEIGHTS: [each.weights for each in found],
        "length": [len(each.prompt_ids) + len(each.ids) for each in found],
    }


def _longest(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    """The length of the longest sequence of a conversation."""
    return {"length": max(_conversations(row, index, encode)["length"])}


def _conversation_of(row: Row, index: int) -> tuple[Messages, Messages]:
    """(what is context alone, the conversation from there on)."""
    column = "messages" if "messages" in row else "completion"
    if not is_chat(row[column]):
        raise ValueError(f"column {column!r} must hold a list of messages; got {type(row[column]).__name__}")
    messages = cell(row, column, index, may_be_empty=False)
    if column == "messages" or not row.get("prompt"):
        return [], messages
    prompt = cell(row, "prompt", index, may_be_empty=True)
    if not is_chat(prompt):
        raise ValueError("a completion of messages needs a prompt of messages; this prompt is text")
    return prompt, messages


def _pair(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    prompt_ids, (chosen, rejected), own = encode.trajectories(*pair_of(row, index), template_options(row))
    length = len(prompt_ids) + max(len(chosen), len(rejected))
    found = {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}
    return {**found, "chosen_own": own[0], "rejected_own": own[1]}


def _triple(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    prompt, (chosen, rejected) = pair_of(row, index)
    gold = cell(row, "reference", index, may_be_empty=False)
    prompt_ids, ids, own = encode.trajectories(prompt, [chosen, rejected, gold], template_options(row))
    found = {"prompt_ids": prompt_ids, "length": len(prompt_ids) + max(map(len, ids))}
    for name, end, mask in zip(("chosen", "rejected", "gold"), ids, own, strict=True):
        found |= {f"{name}_ids": end, f"{name}_own": mask}
    return found


def _labelled(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    label = label_of(row["label"])
    prompt = cell(row, "prompt", index, may_be_empty=True)
    completion = cell(row, "completion", index, may_be_empty=False)
    prompt_ids, (ids,), (own,) = encode.trajectories(prompt, [completion], template_options(row))
    found = {"prompt_ids": prompt_ids, "completion_ids": ids, "own": own, "length": len(prompt_ids) + len(ids)}
    return {**found, "label": label}


def _pair_as_list(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    prompt_ids, completions, own = encode.trajectories(*pair_of(row, index), template_options(row))
    return _list(prompt_ids, completions, own, {"ranks": [0.0, 1.0]})


def _ranked(row: Row, index: int, encode: Encoder) -> dict[str, Any]:
    completions = row["completions"]
    if not isinstance(completions, list) or not completions:
        raise ValueError("column 'completions' must hold a list with at least one completion")
    for k, completion in enumerate(completions):
        where = f"column 'completions', number {k} (from 0),"
        if is_chat(completion):
            check_messages(completion, f"{where} row {index} (from 0),")
        else:
            checked_text(completion, where, index, may_be_empty=False)
    prompt = cell(row, "prompt", index, may_be_empty=True)
    prompt_ids, ids, own = encode.trajectories(prompt, completions, template_options(row))
    columns = {name: _numbers(row[name], name, len(completions)) for name in ("rewards", "ranks") if name in row}
    ranks = columns.get("ranks", [-r for r in columns.get("rewards", [])] or [float(k) for k in range(len(ids))])
    order = sorted(range(len(ids)), key=lambda k: ranks[k])
    columns["ranks"] = ranks
    in_order = {name: [c[k] for k in order] for name, c in columns.items()}
    return _list(prompt_ids, [ids[k] for k in order], [own[k] for k in order], in_order)


def check_finite(value: Any, column: str) -> None:
    """ValueError for a number that is NaN or infinite: its loss would be, and all weights after it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"column {column!r} must hold finite numbers; got {value}")


def _numbers(values: Any, column: str, count: int) -> list[float]:
    good = isinstance(values, list) and all(isinstance(v, (int, float)) and v == v for v in values)
    if not good or len(values) != count:
        raise ValueError(f"column {column!r} must hold one number for each of the {count} completions; got {values!r}")
    for value in values:
        check_finite(value, column)
    return [float(v) for v in values]


def _list(
    prompt_ids: list[int], completions: list[list[int]], own: list[list[bool]], columns: dict[str, list[float]]
) -> dict[str, Any]:
    length = len(prompt_ids) + max(map(len, completions))
    found = {"prompt_ids": prompt_ids, "completions_ids": completions, "completions_own": own, "length": length}
    return {**found, **columns}
