"""The doctor's checks of data and tokenizer. Each takes the patient and returns findings; none means all is well."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from scipy import stats

from ..trainers.data.chat import content_of, is_chat, template_options
from ..trainers.data.encode import Encoder
from ..trainers.data.targets import label_of
from ..trainers.data.tokenize import LIST_FORMS, PAIR_FORMS, SFT_FORMS, UNPAIRED_FORM
from ..trainers.policy.config import PolicyConfig
from .rows import PROMPTS, Walk, first_words, not_numbers, ratings, walk

_MARKERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")


class Finding(NamedTuple):
    """What a check found: ok, note, warning or error; in words; by which check."""

    level: str
    text: str
    check: str = ""


@dataclass
class Patient:
    """What is looked at: the settings of the run, some of its rows, its tokenisation, its models."""

    config: Any
    rows: Dataset
    encode: Encoder
    model: Any
    said: list[str] = field(default_factory=list)
    """What reading the data had to tell."""
    reward_model: Any = None
    reward_tokenizer: Any = None
    teacher: Any = None
    teacher_tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        return self.encode.tokenizer

    @property
    def form(self) -> tuple[str, ...]:
        """The columns that the rows are read by. ValueError if they have no form that any trainer takes."""
        names = set(self.rows.column_names)
        for form in (*LIST_FORMS, *SFT_FORMS, ("prompt",)):
            if set(form) <= names:
                return form
        raise ValueError(f"dataset has no form that a trainer takes; its columns are {', '.join(sorted(names))}")

    def completions(self) -> Iterator[tuple[int, Any, list[Any]]]:
        """(row, prompt, completions) of every row that is not a conversation in one piece."""
        form = self.form
        for i, row in enumerate(self.rows):
            if form == ("messages",):
                continue
            ends = row["completions"] if "completions" in form else [row[n] for n in form if n != "prompt"]
            ends = list(ends) if isinstance(ends, (list, tuple)) else []
            yield i, row.get("prompt") if "prompt" in form else "", ends

    @functools.cached_property
    def walk(self) -> Walk:
        """What the trainers make of the rows."""
        return walk(self.rows, self.form, self.encode)

    def texts(self) -> Iterator[tuple[int, str, list[str]]]:
        """The same, of the rows of plain text alone."""
        for i, prompt, ends in self.completions():
            if isinstance(prompt, str) and all(isinstance(e, str) and e.strip() for e in ends):
                yield i, prompt, ends


def _rows(numbers: Sequence[int]) -> str:
    """'rows 1, 2, 3 and 14 more (from 0)'."""
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more} (from 0)"


def _content(completion: Any) -> str:
    """A completion as text: of messages, what the assistant says and calls."""
    if is_chat(completion):
        replies = [m for m in completion if m.get("role") == "assistant"]
        return "\n".join(content_of(m) or str(m.get("tool_calls") or "") for m in replies)
    return completion if isinstance(completion, str) else ""


# ---------------------------------------------------------------------------------------------------------- the checks
def refused(p: Patient) -> list[Finding]:
    """Rows that could not be read or that a trainer refuses, and what else reading told."""
    out = [Finding("error" if "faulty" in text else "note", text) for text in p.said]
    if p.walk.refused:
        out.append(Finding("error", f"{_rows(p.walk.refused)} would be refused: {first_words(p.walk.words)}"))
    return out


def rated(p: Patient) -> list[Finding]:
    """Numbers that are none, and lists without any comparison."""
    bad = [f"{_rows(rows)}: column {name!r} holds no finite number" for name, rows in not_numbers(p.rows).items()]
    tied: list[int] = []
    if "completions" in p.form:
        found = [ratings(row) for row in p.rows]
        none = [i for i, values in enumerate(found) if values is None]
        if none:
            bad.append(f"{_rows(none)}: not one finite number (rewards or ranks) for each completion")
        tied = [i for i, values in enumerate(found) if values is not None and len(set(values)) < 2]
    out = [Finding("error", "; ".join(bad))] if bad else []
    if tied:
        level = "error" if len(tied) == len(p.rows) else "warning"
        out.append(Finding(level, f"{_rows(tied)}: all completions have one rating: nothing is learned from the list"))
    return out


def labelled(p: Patient) -> list[Finding]:
    """Labels of single completions: what is none, and whether the two classes weigh alike."""
    if not set(UNPAIRED_FORM) <= set(p.rows.column_names):
        return []
    bad, good = [], 0
    for i, value in enumerate(p.rows["label"]):
        try:
            good += label_of(value)
        except ValueError:
            bad.append(i)
    if bad:
        return [Finding("error", f"{_rows(bad)}: column 'label' must hold true or false")]
    total = len(p.rows)
    if good in (0, total):
        said = f"every label is {str(good > 0).lower()}: kto learns from both desirable and undesirable completions"
        return [Finding("error", said)]
    ratio = good / (total - good)
    if 1 <= ratio <= 1.5:  # what the paper keeps the weights times the numbers within: see `losses.kto_loss`
        return []
    name, low, high = ("undesirable", ratio / 1.5, ratio) if ratio > 1 else ("desirable", 1 / ratio, 1.5 / ratio)
    said = f"{good} of {total} rows are desirable; kto's classes weigh alike with a {name}_weight from {low:.3g} to "
    return [Finding("warning", f"{said}{high:.3g}")]


def boundaries(p: Patient) -> list[Finding]:
    """Prompts and completions whose joint tokenisation merges over the border."""
    merged, spaces = [], 0
    for i, prompt, ends in p.texts():
        alone = p.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        for end in ends:
            joined = p.tokenizer(prompt + end, add_special_tokens=False, verbose=False)["input_ids"]
            if joined[: len(alone)] != alone:
                merged.append(i)
                spaces += prompt[-1:].isspace()
                break
    if not merged:
        return []
    hint = " Most of these prompts end in white space: move it to the completion." if spaces > len(merged) / 2 else ""
    return [
        Finding(
            "warning",
            f"in {_rows(merged)} a token would span prompt and completion. Training here splits at the border, as "
            f"generation does, but the model has rarely seen such a split.{hint}",
        )
    ]


def padding(p: Patient) -> list[Finding]:
    """The tokenizer's end-of-sequence and padding tokens."""
    t = p.tokenizer
    if t.eos_token_id is None:
        return [Finding("error", "the tokenizer has no end-of-sequence token: the model cannot learn to stop")]
    if t.pad_token_id == t.eos_token_id:
        return [
            Finding(
                "note",
                f"padding and end-of-sequence are one token, {t.eos_token!r}. The trainers here mask by length, so it "
                "is learned all the same; code that masks by token will never teach the model to stop. Reward models "
                "get a padding token of their own",
            )
        ]
    return []


def empty(p: Patient) -> list[Finding]:
    """Completions without text, which a trainer refuses."""
    if p.form == ("prompt",):
        return []
    rows = [i for i, _, ends in p.completions() if not ends or any(not _content(e).strip() for e in ends)]
    return [Finding("error", f"{_rows(rows)}: a completion is empty")] if rows else []


def duplicates(p: Patient) -> list[Finding]:
    """Rows that are there twice, and lists that hold one completion twice."""
    seen: Counter[str] = Counter()
    twice, inside = [], []
    for i, prompt, ends in p.completions():
        seen[repr((prompt, ends))] += 1
        if seen[repr((prompt, ends))] > 1:
            twice.append(i)
        contents = [_content(e) for e in ends]
        if "completions" in p.form and len(set(contents)) < len(contents):
            inside.append(i)
    out = []
    if twice:
        out.append(Finding("warning", f"{_rows(twice)} repeat earlier rows"))
    if inside:
        out.append(Finding("warning", f"{_rows(inside)}: the list holds one completion more than once"))
    return out


def chosen_is_rejected(p: Patient) -> list[Finding]:
    """Pairs whose sides are the same text."""
    if p.form not in PAIR_FORMS:
        return []
    rows = [i for i, _, (chosen, rejected) in p.completions() if _content(chosen).strip() == _content(rejected).strip()]
    return [Finding("error", f"{_rows(rows)}: chosen and rejected are the same")] if rows else []


def length_bias(p: Patient) -> list[Finding]:
    """Whether the preferred completion is the longer one more often than chance and than is harmless."""
    longer, gaps = [], []
    for i, _, ends in p.completions():
        lengths = [len(_content(e).split()) for e in ends]
        for better, worse in _preferences(p, i, lengths):
            if better != worse:
                longer.append(better > worse)
                gaps.append(better - worse)
    if len(longer) < 10:
        return []
    share, pairs = float(np.mean(longer)), len(longer)
    if abs(share - 0.5) < 0.1 or stats.binomtest(sum(longer), pairs).pvalue > 0.01:
        return []
    word, advice = (
        ("longer", "length_alpha (dpo) penalises length") if share > 0.5 else ("shorter", "outputs may shrink")
    )
    return [
        Finding(
            "warning",
            f"the preferred completion is the {word} one in {max(share, 1 - share):.0%} of {pairs} comparisons "
            f"({np.mean(gaps):+.1f} words on average): length alone would earn that accuracy. {advice}",
        )
    ]


def _preferences(p: Patient, row: int, lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(length of the better, length of the worse) of every comparison of a row."""
    if p.form in PAIR_FORMS:
        yield lengths[0], lengths[1]
    elif "completions" in p.form:
        values = ratings(p.rows[row]) or []
        for a, b in itertools.permutations(range(len(values)), 2):
            if values[a] > values[b]:
                yield lengths[a], lengths[b]


def truncation(p: Patient) -> list[Finding]:
    """Rows that max_length or max_prompt_length cuts, or drops."""
    w, total, mode = p.walk, len(p.rows), p.encode.truncation_mode
    if p.form == PROMPTS and mode not in PolicyConfig.truncation_modes:
        known = ", ".join(PolicyConfig.truncation_modes)
        return [Finding("error", f"truncation_mode must be one of {known} for rows of a prompt alone; got {mode!r}")]
    parts = [
        (w.replies_cut, "a completion is longer than max_length and loses its end"),
        (w.prompts_cut, "the prompt loses its beginning to max_length or max_prompt_length"),
        (w.dropped, "too long, and left out"),
    ]
    told = [f"{_rows(rows)} of {total}: {what}" for rows, what in parts if rows]
    return [Finding("warning", f"{'; '.join(told)} (truncation_mode {mode})")] if told else []


def template(p: Patient) -> list[Finding]:
    """What a chat template does to conversations, and whether rows of text have one written into them already."""
    conversations = list(_conversations(p))
    if not conversations:
        return _written_out(p)
    if p.tokenizer.chat_template is None:
        return [Finding("error", "the rows are conversations and the tokenizer has no chat template")]
    out: list[Finding] = []
    for i, messages in conversations:
        try:
            options = template_options(p.rows[i])
            p.encode.conversations(messages, options)
            opened = p.encode.unmet_opening(messages, options)
        except Exception as error:  # messages without a role or content, say
            out.append(Finding("error", f"row {i} (from 0): {error}"))
            break
        if opened:
            out.append(
                Finding(
                    "warning",
                    f"row {i} (from 0): generation begins a reply with {opened!r}, and this reply is written without. "
                    "Give replies that have it, or chat_template_kwargs that turn it off",
                )
            )
            break
    if not any(f.level == "error" for f in out):
        out += _ending(p, conversations[0][1], template_options(p.rows[conversations[0][0]]))
    roles = [i for i, m in conversations if any(a.get("role") == b.get("role") for a, b in itertools.pairwise(m))]
    if roles:
        out.append(Finding("warning", f"{_rows(roles)}: two messages of one role follow each other"))
    return out


def _ending(p: Patient, messages: Any, options: Any) -> list[Finding]:
    """Whether what ends a reply is a token that generation stops at."""
    ids = p.encode.conversations(messages, options)[-1].ids
    stops = getattr(p.model.generation_config, "eos_token_id", None)
    known = {p.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    if known & set(ids[-3:]):
        return []
    return [
        Finding(
            "error",
            f"replies end with {p.tokenizer.decode(ids[-2:])!r}, at which generation does not stop: it stops at "
            f"{', '.join(repr(p.tokenizer.decode([i])) for i in sorted(known))}. Set eos_token of the tokenizer or of "
            "the model's generation config to what the template ends turns with",
        )
    ]


def _conversations(p: Patient) -> Iterator[tuple[int, Any]]:
    """(row, messages to the end of a reply) of the conversational rows."""
    if p.form == ("messages",):
        yield from ((i, row["messages"]) for i, row in enumerate(p.rows) if is_chat(row["messages"]))
    for i, prompt, ends in p.completions():
        for end in ends[:1]:
            if is_chat(end):
                yield i, [*(prompt if is_chat(prompt) else []), *end]
            elif is_chat(prompt) and isinstance(end, str):
                yield i, [*prompt, {"role": "assistant", "content": end}]


def _written_out(p: Patient) -> list[Finding]:
    """Rows of text: chat markers inside them, or a template that they do not use."""
    marked = [i for i, prompt, ends in p.texts() if any(m in t for t in (prompt, *ends) for m in _MARKERS)]
    if marked:
        return [
            Finding(
                "warning",
                f"{_rows(marked)} are text with chat markers in it: give messages instead, and the tokenizer's "
                "template writes them as generation does",
            )
        ]
    if p.tokenizer.chat_template is not None:
        return [Finding("note", "the tokenizer has a chat template, which rows of plain text do not go through")]
    return []


DATA_CHECKS: dict[str, Callable[[Patient], list[Finding]]] = {
    "rows": refused,
    "ratings": rated,
    "labels": labelled,
    "boundaries": boundaries,
    "padding": padding,
    "empty completions": empty,
    "duplicates": duplicates,
    "chosen equals rejected": chosen_is_rejected,
    "length bias": length_bias,
    "truncation": truncation,
    "chat template": template,
}
