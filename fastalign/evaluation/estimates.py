"""Estimates with their uncertainty, and how varied a set of texts is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean, its standard error, and its 95 % interval."""

    mean: float
    se: float
    low: float
    high: float


def estimate(values: np.ndarray) -> Estimate:
    """Mean of independent units with Student's t interval.

    Args:
        values: [units] or [units, samples]. Samples of one unit (continuations of one prompt) are not independent, so
            they are averaged first.
    """
    values = np.asarray(values, dtype=np.float64)
    units = values.reshape(len(values), -1).mean(1)
    mean = float(units.mean())
    if len(units) < 2:
        return Estimate(mean, float("nan"), float("nan"), float("nan"))
    se = float(units.std(ddof=1) / np.sqrt(len(units)))
    half = float(stats.t.ppf(0.975, len(units) - 1)) * se
    return Estimate(mean, se, mean - half, mean + half)


def bootstrap(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of independent units with a 95 % percentile bootstrap interval (Efron and Tibshirani 1993, ch. 13).

    For bounded outcomes, wins and ties above all, where Student's interval may leave [0, 1]. Whole units are drawn,
    so samples of one prompt stay together.

    Args:
        values: [units] or [units, samples].
        resamples: how often the units are drawn anew.
        seed: of those draws.
    """
    values = np.asarray(values, dtype=np.float64)
    units = values.reshape(len(values), -1).mean(1)
    mean = float(units.mean())
    if len(units) < 2:
        return Estimate(mean, float("nan"), float("nan"), float("nan"))
    found = stats.bootstrap(
        (units,), np.mean, n_resamples=resamples, batch=256, method="percentile", rng=np.random.default_rng(seed)
    )
    low, high = found.confidence_interval
    return Estimate(mean, float(found.standard_error), float(low), float(high))


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all of the texts (Li et al. 2016, "distinct-n"); 0 if there are none."""
    grams = [gram for words in map(str.split, texts) for gram in zip(*(words[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0
