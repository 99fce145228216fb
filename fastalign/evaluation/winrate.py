"""Win rate of a model's answers against a baseline's or against reference texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .estimates import Estimate, bootstrap
from .judges import PairJudge
from .scorers import Prompt

Answers = Sequence[str] | Sequence[Sequence[str]]
"""One text for each prompt, or several."""


class WinRate(NamedTuple):
    """How often one side's answers are preferred. Shares are of all pairs; wins, ties and losses add up to 1."""

    rate: Estimate
    """Wins plus half of the ties, with its bootstrap interval over prompts."""
    wins: float
    ties: float
    losses: float
    consistency: float | None
    """Share of pairs with the same verdict in both orders; None where order cannot matter."""
    first_position: float | None
    """Mean verdict for the answer shown first: 0.5 where the judge has no bias for a place. None as above."""
    outcomes: np.ndarray
    """[prompts, samples]: 1, 0.5 or 0 (what lies between is several people's mean)."""


def win_rate(
    judge: PairJudge, prompts: Sequence[Prompt], ours: Answers, theirs: Answers, *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """Judges answers pair by pair, sample against sample.

    Where the order of showing may matter, both orders are asked, and a win is one in both: verdicts that turn with the
    order are ties (Zheng et al. 2023, sec. 3.4). The interval is a bootstrap over prompts (samples of one prompt are
    not independent).

    Args:
        judge: which of two is better.
        prompts: texts or messages.
        ours, theirs: the answers to each prompt; a single text stands against every one of the other side's.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: lengths that do not fit each other, or no prompts.
    """
    left, right = _even(prompts, ours, theirs)
    flat = [p for p, each in zip(prompts, left, strict=True) for _ in each]
    first, second = ([text for each in side for text in each] for side in (left, right))
    forward = np.asarray(judge(flat, first, second), dtype=np.float64)
    consistency = first_position = None
    outcomes = forward
    if judge.positional:
        backward = 1 - np.asarray(judge(flat, second, first), dtype=np.float64)
        outcomes = np.where(forward == backward, forward, 0.5)
        consistency = float(np.mean(forward == backward))
        first_position = float(np.mean(np.concatenate([forward, 1 - backward])))
    found = tally(outcomes.reshape(len(prompts), -1), resamples=resamples, seed=seed)
    return found._replace(consistency=consistency, first_position=first_position)


def tally(outcomes: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> WinRate:
    """The win rate that verdicts [prompts, samples] amount to, from a judge for whom order does not matter."""
    return WinRate(
        bootstrap(outcomes, resamples=resamples, seed=seed),
        float(np.mean(outcomes > 0.5)),
        float(np.mean(outcomes == 0.5)),
        float(np.mean(outcomes < 0.5)),
        None,
        None,
        outcomes,
    )


def length_matched(outcomes: np.ndarray, ours: np.ndarray, theirs: np.ndarray, *, tolerance: float = 0.1) -> Estimate:
    """Win rate over the pairs whose lengths differ by at most a share `tolerance` of the longer one.

    What is left of a win rate when no side may win by length. Prompts without such a pair drop out; with fewer than two
    left the interval is not a number.

    Args:
        outcomes, ours, theirs: [prompts, samples]: verdicts, and lengths of either side's answers.
    """
    near = np.abs(ours - theirs) <= tolerance * np.maximum(ours, theirs)
    kept = [row[mask].mean() for row, mask in zip(outcomes, near, strict=True) if mask.any()]
    return bootstrap(np.array(kept)) if kept else Estimate(*[float("nan")] * 4)


def _even(prompts: Sequence[Prompt], ours: Answers, theirs: Answers) -> tuple[list[list[str]], list[list[str]]]:
    """Both sides as lists of equally many texts for each prompt."""
    sides = [[[a] if isinstance(a, str) else list(a) for a in side] for side in (ours, theirs)]
    if not prompts or any(len(side) != len(prompts) for side in sides):
        raise ValueError(
            f"ours and theirs must have answers to each of the prompts; got {len(sides[0])} and {len(sides[1])} for "
            f"{len(prompts)} prompts"
        )
    sizes = {len(each) for side in sides for each in side}
    most = max(sizes)
    if sizes - {1, most} or most == 0:
        raise ValueError(f"every prompt must have one answer or {most}; got {sorted(sizes)}")
    left, right = ([each * most if len(each) == 1 else each for each in side] for side in sides)
    return left, right
