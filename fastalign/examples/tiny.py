"""What the examples stand on: a tokenizer and a model made in a second, a few pairs, and an end where a package is
missing."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

_GOOD = (" a delight.", " great fun.", " warm and clever.", " good to the end.")
_BAD = (" a bore.", " awful and dull.", " long and flat.", " bad to the end.")
_PROMPTS = ("the movie is", "this film was", "the story is", "a sequel that is")

PAIRS = [
    {"prompt": prompt, "chosen": good, "rejected": bad}
    for prompt, (good, bad) in itertools.product(_PROMPTS, zip(_GOOD, _BAD, strict=True))
]
"""Sixteen prompts with a completion that is preferred and one that is not."""

TEXTS = [pair["prompt"] + pair["chosen"] for pair in PAIRS]


def tiny_tokenizer() -> Any:
    """Byte-level BPE of 300 tokens, trained on both completions of every pair."""
    from fastalign.demo.models import train_tokenizer

    return train_tokenizer([*TEXTS, *(pair["prompt"] + pair["rejected"] for pair in PAIRS)], vocab_size=300)


def tiny_model(tokenizer: Any) -> Any:
    """A GPT-2 of one layer with fresh weights, the same ones at each call."""
    from fastalign.demo.models import small_model

    return small_model(len(tokenizer), hidden_size=64, layers=1, seed=0)


def run(main: Callable[[], str], extra: str) -> int:
    """Runs an example and prints its line of result, or which package is missing; returns the exit status."""
    try:
        print(main())
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "fastalign"):
            raise
        print(
            f"the package {name!r} is missing; this example needs the extra: pip install 'fastalign[{extra}]'",
            file=sys.stderr,
        )
        return 1
    return 0
