"""What fastalign's CPU kernels have to reach, against what a results file says.

    python bench/targets.py results.json

prints every target with the measured figure, and exits with 1 unless all are met. A figure that the file does not
hold (a case that was not run) counts as missed. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import math
import statistics
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

ROWS, VOCABS, DTYPES = 512, (128256, 32000), ("float32", "bfloat16")
OURS, IN_PLACE, EAGER, COMPILED = "fastalign", "fastalign in place", "eager", "torch.compile"
ONE_LAUNCH = "fastalign one launch in place"
MARGIN = 1e-6
"""By how much of the result's scale (`output_scale`; the gradient's norm) our error may exceed eager torch's."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """`figure` takes the case's record to the measured number, which must be >= `bound` (or <=, with `at_most`)."""

    name: str
    case: tuple[str, str, int, int, str]
    figure: Callable[[Record], float | None]
    bound: float | Callable[[Record], float]
    at_most: bool = False
    unit: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Verdict:
    target: Target
    measured: float | None
    bound: float | None

    @property
    def met(self) -> bool:
        if self.measured is None or self.bound is None:
            return False
        return self.measured <= self.bound if self.target.at_most else self.measured >= self.bound

    def __str__(self) -> str:
        target = self.target

        def show(value: float | None) -> str:
            return "missing" if value is None else f"{value * target.scale:.4g}{target.unit}"

        sign = "≤" if target.at_most else "≥"
        suite, job, rows, vocab, dtype = target.case
        size = f"{suite} {job}, {rows} x {vocab:,} {dtype}"
        head = f"{'met ' if self.met else 'MISS'}  {size:<40}{target.name:<46}"
        return f"{head}{show(self.measured):>11} {sign} {show(self.bound)}"


# ------------------------------------------------------------------------------------------------ figures of a record
def _ratio(ours: str, peer: str) -> Callable[[Record], float | None]:
    return lambda case: case["ratios"].get(ours, {}).get(peer, {}).get("median")


def _of_limit(ours: str) -> Callable[[Record], float | None]:
    return lambda case: case["variants"][ours]["of_limit"]


def _own(ours: str, other: str) -> Callable[[Record], float | None]:
    """How many times longer another of our own variants takes, within rounds."""

    def figure(case: Record) -> float | None:
        if not {ours, other} <= case["variants"].keys():
            return None
        pairs = zip(case["variants"][other]["seconds"], case["variants"][ours]["seconds"], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return figure


def _peak(ours: str) -> Callable[[Record], float | None]:
    def share(case: Record) -> float | None:
        peak = case["variants"][ours]["peak_bytes"]
        return None if peak is None else peak / case["logits_bytes"]

    return share


def _error(variant: str, kind: str) -> Callable[[Record], float | None]:
    return lambda case: case["variants"][variant]["error"].get(kind)


def _eager_output_error(case: Record) -> float:
    error = case["variants"][EAGER]["error"]
    return error["output"] + MARGIN * error["output_scale"]


def _eager_gradient_error(case: Record) -> float:
    return case["variants"][EAGER]["error"]["gradient"] + MARGIN


def _check(name: str) -> Callable[[Record], float | None]:
    return lambda case: case["checks"].get(name)


# ------------------------------------------------------------------------------------------------------------- targets
_READ = {("float32", 128256): 0.85, ("float32", 32000): 0.85, ("bfloat16", 128256): 0.70}
_FORWARD_COMPILED = {"float32": 1.9, "bfloat16": 2.5}
LN2 = struct.unpack("f", struct.pack("f", math.log(2)))[0]  # the float32 nearest to it


def _speed(dtype: str, vocab: int) -> Iterator[Target]:
    forward, dpo = ("logps", "forward", ROWS, vocab, dtype), ("dpo", "both", ROWS, vocab, dtype)
    if (dtype, vocab) in _READ:
        bound = _READ[dtype, vocab]
        yield Target("of the measured read rate", forward, _of_limit(OURS), bound, unit=" %", scale=100)
    yield Target("times faster than eager", forward, _ratio(OURS, EAGER), 10)
    yield Target("times faster than torch.compile", forward, _ratio(OURS, COMPILED), _FORWARD_COMPILED[dtype])
    yield Target("in place, times faster than torch.compile", dpo, _ratio(IN_PLACE, COMPILED), 4.5)
    yield Target("in place, times faster than eager", dpo, _ratio(IN_PLACE, EAGER), 10)
    yield Target("times faster than torch.compile", dpo, _ratio(OURS, COMPILED), 2.5)


def _one_launch(dtype: str, vocab: int) -> Iterator[Target]:
    if vocab != VOCABS[0]:
        return
    ppo = ("ppo", "both", ROWS, vocab, dtype)
    yield Target("one launch, times faster than in place", ppo, _own(ONE_LAUNCH, IN_PLACE), 1.4)
    yield Target("one launch, times faster than torch.compile", ppo, _ratio(ONE_LAUNCH, COMPILED), 6)
    yield Target("one launch, times faster than eager", ppo, _ratio(ONE_LAUNCH, EAGER), 12)
    yield Target("one launch, error of the gradient", ppo, _error(ONE_LAUNCH, "gradient"), _eager_gradient_error, True)


def _memory(dtype: str, vocab: int) -> Iterator[Target]:
    dpo = ("dpo", "both", ROWS, vocab, dtype)
    percent: dict[str, Any] = {"at_most": True, "unit": " %", "scale": 100}
    yield Target("in place, peak beyond the logits", dpo, _peak(IN_PLACE), 0.01, **percent)
    # One gradient buffer, and the same per-token odds and ends that the in-place variant is allowed.
    yield Target("peak beyond the logits", dpo, _peak(OURS), 1.01, **percent)


def _accuracy(dtype: str, vocab: int) -> Iterator[Target]:
    for suite, job in (("logps", "forward"), ("dpo", "forward"), ("logps", "both"), ("dpo", "both")):
        case = (suite, job, ROWS, vocab, dtype)
        yield Target("error of the result", case, _error(OURS, "output"), _eager_output_error, at_most=True)
        if job == "both":
            for ours in (OURS, IN_PLACE):
                name = f"error of the gradient{ours.removeprefix(OURS)}"
                yield Target(name, case, _error(ours, "gradient"), _eager_gradient_error, at_most=True)
    step_zero = ("dpo", "forward", ROWS, vocab, dtype)
    yield Target("|loss - ln 2| at step 0", step_zero, _from_ln2, 0.0, at_most=True)
    yield Target("|reward| at step 0", step_zero, _check("step_zero_reward"), 0.0, at_most=True)


def _from_ln2(case: Record) -> float | None:
    loss = _check("step_zero_loss")(case)
    return None if loss is None else abs(loss - LN2)


def targets() -> list[Target]:
    """Every target, speed first."""
    sizes = [(dtype, vocab) for vocab in VOCABS for dtype in DTYPES]
    found = [target for group in (_speed, _one_launch, _memory, _accuracy) for size in sizes for target in group(*size)]
    overhead = ("overhead", "forward", 1, 32, "float32")
    us: dict[str, Any] = {"at_most": True, "unit": " µs", "scale": 1e6}
    gae = Target("times faster than a loop", ("gae", "forward", 512, 2048, "float32"), _ratio(OURS, EAGER), 50)
    return [*found, gae, Target("call over its kernel alone", overhead, _check("overhead_seconds"), 25e-6, **us)]


def judge(results: dict[str, Any], wanted: list[Target] | None = None) -> list[Verdict]:
    """A verdict for each target."""
    records = {(c["suite"], c["job"], c["rows"], c["vocab"], c["dtype"]): c for c in results["cases"]}

    def verdict(target: Target) -> Verdict:
        case = records.get(target.case)
        if case is None:
            return Verdict(target, None, target.bound if isinstance(target.bound, float | int) else None)
        bound = target.bound(case) if callable(target.bound) else target.bound
        return Verdict(target, target.figure(case), bound)

    return [verdict(target) for target in (targets() if wanted is None else wanted)]


def main() -> int:
    from harness.results import merged, results_file  # beside this file, which is where Python looks when it is run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=results_file, nargs="+", help="JSON written by `pytest bench --json`; later cases win"
    )
    runs = parser.parse_args().results
    verdicts = judge(merged(runs) if len(runs) > 1 else runs[0])
    print(*verdicts, sep="\n")
    met = sum(verdict.met for verdict in verdicts)
    print(f"{met} of {len(verdicts)} targets met")
    return 0 if met == len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
