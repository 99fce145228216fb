"""Contenders timed in turn, in a new random order every round, and the statistics of such rounds.

Timing one contender to the end and then the next compares two states of the machine (clock, page cache, neighbours)
as much as two pieces of code. Here every round visits each contender once, so a round is one state of the machine, and
contenders are compared within rounds: `ratio` is the median of the rounds' ratios, not a ratio of medians.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Run = Callable[[], object]
Prepare = Callable[[], Run]
"""Does what must not be timed (inputs, a forward pass whose backward is to be timed) and returns what must be."""


def interleave(
    contenders: Mapping[str, Prepare],
    *,
    rounds: int,
    warmup: int = 1,
    calls: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Run, int], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of each contender in each round, after `warmup` rounds that are thrown away.

    Args:
        contenders: name → function that prepares a run.
        rounds: rounds that count.
        warmup: rounds before them.
        calls: calls of one run between two readings of the clock; the sample is their mean.
        seed: of the random orders.
        clock: returns seconds.
        measure: takes (run, calls) and returns seconds a call, in place of two readings of the clock (on a GPU, whose
            work goes on after a call has returned).
    """
    for name, value, low in (("rounds", rounds, 1), ("warmup", warmup, 0), ("calls", calls, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}; got {value}")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # what was there before is not looked through again, so that collecting once a round is cheap
    try:
        for turn in range(-warmup, rounds):
            gc.collect()
            shuffle(order)
            for name in order:
                run = contenders[name]()
                sample = _time(run, calls, clock) if measure is None else measure(run, calls)
                del run
                if turn >= 0:
                    seconds[name].append(sample)
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return seconds


def _time(run: Run, calls: int, clock: Callable[[], float]) -> float:
    # The last result outlives the second reading: giving its memory back is not the contender's work.
    start = clock()
    for _ in range(calls):
        result = run()
    stop = clock()
    del result
    return (stop - start) / calls


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum, 10th and 90th percentile and interquartile range."""
    p10, p25, p50, p75, p90 = (float(v) for v in np.percentile(samples, [10, 25, 50, 75, 90]))
    return {"median": p50, "min": float(min(samples)), "p10": p10, "p90": p90, "iqr": p75 - p25}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summary of the ratio of two contenders, round by round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


# ------------------------------------------------------------------------------------- into pytest-benchmark's tables
_ticks: Iterator[float] = iter(())


def replay_clock() -> float:
    """A timer for pytest-benchmark that reads samples taken earlier instead of the time; see `replay`."""
    return next(_ticks)


def replay(benchmark, samples: Sequence[float]) -> None:
    """Gives a `benchmark` fixture with the timer `replay_clock` one round for each sample.

    pytest-benchmark times a test's rounds one after the other, which an interleaved run cannot be. It reads its timer
    once before and once after a round, so a timer that answers 0 and the sample makes it record the interleaved
    samples; its tables, groups, storage and comparisons work as ever.
    """
    global _ticks
    _ticks = iter([tick for sample in samples for tick in (0.0, sample)])
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
