"""The best gold reward that a method reaches within a budget of KL, without the luck of picking the best of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..evaluation.estimates import Estimate, estimate

BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""KL budgets of the tables, in nats a text."""


class Point(NamedTuple):
    """One policy: its KL to the reference, and the mean gold reward on either half of the held-out prompts."""

    kl: float
    halves: tuple[float, float]


def envelope(points: Sequence[Point], budgets: Sequence[float]) -> np.ndarray:
    """[budgets]: gold reward of the best policy within each KL budget; not a number where there is none.

    The best of many noisy figures is too good on average. So the policy is chosen by one half of the prompts and
    counted by the other, both ways round, and the two are averaged.
    """
    out = np.full(len(budgets), np.nan)
    for i, budget in enumerate(budgets):
        within = [p for p in points if p.kl <= budget]
        if within:
            choices = [max(within, key=lambda p, half=half: p.halves[half]).halves[1 - half] for half in (0, 1)]  # type: ignore[misc]
            out[i] = np.mean(choices)
    return out


def over_seeds(curves: Sequence[np.ndarray]) -> list[Estimate]:
    """Mean over seeds at each budget, with Student's interval (which one seed alone does not have)."""
    return [estimate(np.array(column)) for column in zip(*curves, strict=True)]


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[Estimate]:
    """Of two methods, seed by seed: the same corpus split, model, prompts and draws are behind both."""
    return over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])
