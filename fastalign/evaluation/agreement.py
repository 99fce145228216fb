"""Whether people agree with each other, and whether what was learned from some holds for others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from .estimates import Estimate, estimate


def krippendorff_alpha(ratings: Sequence[Sequence[float]], *, level: str = "interval") -> float:
    """Krippendorff's alpha: 1 - observed over expected disagreement (Krippendorff 2011, "Computing Krippendorff's
    alpha-reliability"); 1 is perfect agreement, 0 that of chance.

    Needs the package krippendorff (the extra `eval`).

    Args:
        ratings: the ratings of each item, by whoever rated it; items with fewer than two drop out. Which rater gave
            which does not enter alpha.
        level: nominal, ordinal, interval or ratio.

    Raises:
        ValueError: no item with two ratings, or all ratings alike (alpha is undefined).
        ModuleNotFoundError: krippendorff is not installed.
    """
    import krippendorff

    several = [list(values) for values in ratings if len(values) > 1]
    distinct = sorted({float(x) for values in several for x in values})
    if len(distinct) < 2:
        raise ValueError("ratings must hold items with two ratings or more, and two different ratings at least")
    # Counts of each value by item say all that alpha needs, and stay small where every item has raters of its own.
    counts = np.array([[values.count(x) for x in distinct] for values in several])
    measure: Any = level
    return float(krippendorff.alpha(value_counts=counts, value_domain=distinct, level_of_measurement=measure))


def fleiss_kappa(counts: np.ndarray) -> float:
    """Fleiss' kappa for categories (Fleiss 1971): (P - P_e) / (1 - P_e).

    Args:
        counts: [items, categories], how many raters chose each; the same number of raters (two or more) on every item.

    Raises:
        ValueError: uneven numbers of raters, or fewer than two; or one category alone (kappa is undefined).
    """
    counts = np.asarray(counts, dtype=np.float64)
    raters = counts.sum(1)
    if counts.ndim != 2 or len(set(raters)) != 1 or raters[0] < 2:
        raise ValueError("counts must be [items, categories] with the same number of raters, at least 2, on every item")
    n = raters[0]
    observed = ((counts**2).sum(1) - n) / (n * (n - 1))
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    if expected == 1:
        raise ValueError("counts must hold two categories at least; all ratings are of one")
    return float((observed.mean() - expected) / (1 - expected))


class Rating(NamedTuple):
    """One person's rating of one text."""

    item: str
    labeler: str
    value: float


def pairwise_agreement(ratings: Sequence[Rating]) -> Estimate:
    """How often two people who both rated two items agree on which is better, ties of either left out.

    Ouyang et al. 2022 report 72.6 % between training labelers (sec. 3.4). Each person counts by the mean over those
    they share pairs with, and is a unit of the interval, which is a little narrow: everyone is in others' means too.

    Raises:
        ValueError: no two people who both preferred one of the same two items to the other.
    """
    by_labeler: dict[str, dict[str, float]] = {}
    labelers_of: dict[str, list[str]] = {}
    for item, labeler, value in ratings:
        by_labeler.setdefault(labeler, {})[item] = value
        labelers_of.setdefault(item, []).append(labeler)
    together = {pair for names in labelers_of.values() for pair in combinations(sorted(set(names)), 2)}
    shares: dict[str, list[float]] = {}
    for pair in sorted(together):
        one, other = (by_labeler[name] for name in pair)
        common = sorted(set(one) & set(other))
        mine, theirs = (_order(np.array([side[item] for item in common])) for side in (one, other))
        decided = (mine != 0) & (theirs != 0)
        if decided.any():
            for name in pair:
                shares.setdefault(name, []).append(float(np.mean(mine[decided] == theirs[decided])))
    if not shares:
        raise ValueError("ratings must hold two people who both preferred one of the same two items to the other")
    return estimate(np.array([np.mean(each) for each in shares.values()]))


def _order(values: np.ndarray) -> np.ndarray:
    """Sign of the difference of each pair i < j."""
    upper = np.triu_indices(len(values), 1)
    return np.sign(values[:, None] - values[None, :])[upper]


class Generalisation(NamedTuple):
    """Accuracy on held-out items of preferences by labelers that were learned from, and by others; over labelers."""

    known: Estimate
    new: Estimate
    labelers: int


Fit = Callable[[Sequence[str], Sequence[float]], Callable[[Sequence[str]], np.ndarray]]
"""(items, ratings) to a function that scores items."""


def held_out_labelers(
    ratings: Sequence[Rating], fit: Fit, *, folds: int = 5, held_out_items: float = 0.2, seed: int = 0
) -> Generalisation:
    """Cross-validation over labelers (Ouyang et al. 2022, sec. 4.1: 72.4 % on training labelers, 69.6 % on others).

    A share of the items is never learned from. For each fold of labelers, a scorer is fitted to the others' ratings of
    the remaining items; both sides are then asked for every pair of held-out items that a labeler rated differently:
    the share that the scorer orders alike. Every labeler is new once and known `folds` - 1 times.

    Raises:
        ValueError: fewer labelers than folds, fewer than two folds, or no pairs to judge by.
    """
    labelers, items = sorted({r.labeler for r in ratings}), sorted({r.item for r in ratings})
    if not 2 <= folds <= len(labelers):
        raise ValueError(f"folds must be at least 2 and at most the number of labelers, {len(labelers)}; got {folds}")
    draw = random.Random(seed)
    unseen = set(draw.sample(items, round(held_out_items * len(items))))
    draw.shuffle(labelers)
    test: dict[str, list[Rating]] = {}
    for rating in ratings:
        if rating.item in unseen:
            test.setdefault(rating.labeler, []).append(rating)
    sides: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for fold in range(folds):
        new = set(labelers[fold::folds])
        seen = [r for r in ratings if r.labeler not in new and r.item not in unseen]
        score = fit([r.item for r in seen], [r.value for r in seen])
        order = sorted(unseen)
        scores = dict(zip(order, np.asarray(score(order)).tolist(), strict=True))
        for name, own in test.items():
            accuracy = _accuracy(own, scores)
            if accuracy is not None:
                sides[name in new].setdefault(name, []).append(accuracy)
    if not sides[True]:
        raise ValueError("ratings leave no pair of held-out items that one labeler rated differently")
    known, held = (estimate(np.array([np.mean(v) for v in sides[side].values()])) for side in (False, True))
    return Generalisation(known, held, len(sides[True]))


def _accuracy(own: Sequence[Rating], scores: dict[str, float]) -> float | None:
    said = _order(np.array([r.value for r in own]))
    predicted = _order(np.array([scores[r.item] for r in own]))
    decided = said != 0
    return float(np.mean(said[decided] == predicted[decided])) if decided.any() else None
