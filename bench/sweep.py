"""Every job over sizes: tokens 1 to 65,536, vocabulary 256 to 262,144, hidden size, threads, list length.

    python bench/sweep.py --json sweep.json [--minutes 4] [--seconds-per-case 3] [--only sft,dpo] [--tokens N,N]
                          [--vocab V,V] [--dtype D,D] [--threads N,N] [--again]

writes the results file after every case and skips the cases that it holds, so that a sweep can be done in pieces
(`--minutes`: no case is begun later; `--again`: measured ones are measured once more). Contenders of a case take turns
in random order; calls shorter than a millisecond are repeated between two readings of the clock (all contenders'
alike, on the same inputs). A case gets as many rounds as fit its time, three at least.

Bound: no case has more than 2^27 logits (tokens x vocabulary), 512 MiB in float32, of which eager's forward and
backward hold four copies. Tokens are cut into 8 sequences where that divides them, preferences need two at least.
Jobs: log-probs forward; forward and backward of SFT's mean, of a cross-entropy, of DPO, of PPO (these with their
metrics), of PRO over list lengths and of SFT from hidden states (`head.py`); GAE, whose rows and "vocabulary" are
sequences and their length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import head
import torch
from harness.environment import environment
from harness.head_objectives import Shape
from harness.interleave import interleave, ratio, summary
from harness.results import key, label
from harness.suite import Options, peer_ratios, prepare_copy, prepare_read
from harness.sweep_jobs import Point, contenders, variants_of
from harness.variants import OURS

SCHEMA = 1
MAX_LOGITS = 1 << 27
TOKENS = (1, 16, 256, 4096, 65536)
VOCABS = (256, 4096, 32000, 262144)
FEWER = (256, 32000)
DTYPES = ("float32", "bfloat16")
LISTS = (2, 4, 8, 16, 64)
HIDDEN = (128, 1024, 4096)
ADVANTAGES = ((1, 64), (64, 64), (8, 1024), (512, 2048))
LOGITS_JOBS = {"logps": "forward", "sft": "both", "cross_entropy": "both", "dpo": "both", "ppo": "both"}
SUITES = (*LOGITS_JOBS, "pro", "gae", "head")
_SHORT, _CALLS = 1e-3, 50
_LEAST, _MOST = 3, 25
_KINDS = ("difference", "gradient_difference")  # of a result, and of the logits' gradient


# --------------------------------------------------------------------------------------------------------------- grid
def grid(
    tokens: tuple[int, ...] = TOKENS,
    vocabs: tuple[int, ...] = VOCABS,
    dtypes: tuple[str, ...] = DTYPES,
    threads: tuple[int, ...] = (2, 1),
    only: tuple[str, ...] = SUITES,
) -> list[Point]:
    """All points; with other than the first number of threads SFT alone, and at fewer vocabularies."""
    points = []
    for count, dtype in itertools.product(threads, dtypes):
        for n, vocab in itertools.product(tokens, vocabs):
            for suite, job in LOGITS_JOBS.items():
                rows = max(n, 2) if suite == "dpo" else n
                if rows * vocab <= MAX_LOGITS and (count == threads[0] or (suite == "sft" and vocab in FEWER)):
                    points.append(Point(suite, job, rows, vocab, dtype, count))
        if count == threads[0]:
            points += [Point("pro", "both", 1024, 4096, dtype, count, list_length=k) for k in LISTS]
            points += [Point("head", "both", 256, 32000, dtype, count, hidden=h) for h in HIDDEN]
    points += [Point("gae", "forward", *size, "float32", count) for size in ADVANTAGES for count in threads]
    return [point for point in points if point.suite in only]


# ------------------------------------------------------------------------------------------------------------ one case
def measure(point: Point, options: Options, seconds: float) -> dict[str, Any]:
    """The point's record, in about the given time once everything is compiled."""
    if point.suite == "head":
        shape = Shape(point.rows, point.vocab, point.hidden, point.dtype, 2, "sft")
        names = head.available(head.COMPARABLE, shape.objective)
        return head.measure(shape, names, _LEAST, options.seed, with_errors=False) | {"threads": point.threads}
    problem, runs = contenders(point, options)
    longest, fastest, checks = _once(runs)
    if problem is not None:
        spare = torch.empty_like(problem.logits).zero_()
        runs |= {"read": prepare_read(problem), "copy": prepare_copy(problem, spare)}
    calls = max(1, min(_CALLS, int(_SHORT / fastest)))
    rounds = max(_LEAST, min(_MOST, int(seconds / (longest * calls))))
    samples = interleave(runs, rounds=rounds, calls=calls, seed=options.seed)
    return point.to_dict() | {"calls": calls} | _rows(point, samples) | {"checks": checks}


def _once(runs: dict[str, Callable[[], Callable[[], object]]]) -> tuple[float, float, dict[str, float]]:
    """Seconds that one round takes, and its fastest run, after a first one that compiles; and how far the others'
    results and gradients are from ours at most, these as a share of the largest."""
    taken: list[float] = []
    checks, ours = {"difference": 0.0}, ()
    for name in sorted(runs, key=lambda name: name != OURS):
        result = runs[name]()()
        result = tuple(t.detach() for t in (result if isinstance(result, tuple) else (result,)) if t is not None)
        ours = result if name == OURS else ours
        pairs = zip(_KINDS, result, ours, strict=False) if name != OURS else ()
        for kind, got, want in pairs:
            share = float(want.abs().max()) or 1.0 if kind == "gradient_difference" else 1.0
            checks[kind] = max(checks.get(kind, 0.0), _apart(got, want) / share)
        del result
        run = runs[name]()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sum(taken), min(taken), checks


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, sequence by sequence, since whole gradients are large; infinite where there is a NaN."""
    if got.shape != want.shape:
        raise ValueError(f"results must have one shape; got {list(got.shape)} and {list(want.shape)}")
    parts = zip(got, want, strict=True) if got.dim() > 1 else [(got, want)]
    found = torch.stack([(a.double() - b.double()).abs().max() for a, b in parts]).max()
    return math.inf if torch.isnan(found) else float(found)


def _rows(point: Point, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Variants, probes and ratios of the record."""
    moved = {"read": point.logits_bytes, "copy": 2 * point.logits_bytes}
    probes = {name: samples.pop(name) for name in moved if name in samples}
    variants = variants_of(point)
    rows: dict[str, dict[str, Any]] = {
        name: {"ours": variants[name].ours, "seconds": times, **summary(times)} for name, times in samples.items()
    }
    if not probes:
        return {"variants": rows, "ratios": peer_ratios(rows)}
    pairs = zip(probes["read"], probes["copy"], strict=True)
    limits = [point.limit_seconds(moved["read"] / r, moved["copy"] / c) for r, c in pairs]
    for row in rows.values():
        row["of_limit"] = ratio(limits, row["seconds"])["median"]
        row["rate"] = (point.read_bytes + point.copied_bytes) / row["median"]
    rates = {
        name: {"seconds": times, "bytes": moved[name], "rate": moved[name] / summary(times)["median"]}
        for name, times in probes.items()
    }
    return {"probes": rates, "variants": rows, "ratios": peer_ratios(rows)}


# ------------------------------------------------------------------------------------------------------- the whole run
def unavailable(only: tuple[str, ...]) -> dict[str, str]:
    """Peer → why it takes no part."""
    found = {"Liger cross_entropy": "runs on a GPU alone", "quack cross_entropy": "runs on a GPU alone"}
    for suite in (s for s in only if s != "head"):
        point = Point(suite, "both", 2, 256, "float32", list_length=2 if suite == "pro" else 0)
        found |= {n: f"{v.missing} is not installed" for n, v in variants_of(point).items() if v.missing}
    return found | (head.unavailable("sft") if "head" in only else {})


def run(path: Path, points: list[Point], options: Options, seconds: float, minutes: float, again: bool) -> int:
    """Measures what the file lacks; returns how many points it still lacks."""
    start = time.perf_counter()
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": SCHEMA, "cases": []}
    cases = {key(case): case for case in results["cases"]}
    open_ = [point for point in points if again or key(_name(point)) not in cases]
    while open_ and time.perf_counter() - start < 60 * minutes:
        point = open_.pop()
        torch.set_num_threads(point.threads)
        record = measure(point, options, seconds)
        cases[key(record)] = record
        about = environment(options) | {"unavailable": unavailable(SUITES)}
        whole = {"schema": SCHEMA, "environment": about, "cases": list(cases.values())}
        written = path.with_suffix(".part")
        written.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        written.replace(path)  # whole or not at all
        print(label(record), *_line(record), sep="  ", flush=True)
    return len(open_)


def _name(point: Point) -> dict[str, Any]:
    return point.to_dict() | ({"objective": "sft"} if point.suite == "head" else {})


def _line(record: dict[str, Any]) -> Iterator[str]:
    for name, row in sorted(record["variants"].items(), key=lambda item: item[1]["median"]):
        yield f"{name} {row['median'] * 1e6:,.0f} µs"


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _own_compile_cache() -> None:
    """Graphs that torch.compile made for longer vectors write past their buffers where ATEN_CPU_CAPABILITY asks for
    shorter ones, and its cache does not tell them apart (torch 2.13)."""
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if capability:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"inductor-{capability}"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no case is begun later (default: none is)")
    parser.add_argument("--seconds-per-case", type=float, default=3.0)
    parser.add_argument("--only", default=",".join(SUITES), metavar="JOB,JOB", help="(default: %(default)s)")
    for name, default in (("tokens", TOKENS), ("vocab", VOCABS), ("threads", (2, 1))):
        parser.add_argument(f"--{name}", type=_integers, default=default, metavar="N,N", help="(default: %(default)s)")
    parser.add_argument("--dtype", default=",".join(DTYPES), metavar="D,D", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and the orders (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what the file holds once more")
    given = parser.parse_args(argv)
    _own_compile_cache()
    only, dtypes = tuple(given.only.split(",")), tuple(given.dtype.split(","))
    for name, got, known in (("only", only, SUITES), ("dtype", dtypes, DTYPES)):
        if set(got) - set(known):
            parser.error(f"--{name} must be among {', '.join(known)}; got {', '.join(got)}")
    points = grid(given.tokens, given.vocab, dtypes, given.threads, only)
    random.Random(given.seed).shuffle(points)  # a slow spell of the machine shall not fall on one job
    options = Options(threads=max(given.threads), seed=given.seed, memory=False, device="cpu")
    left = run(given.json, points, options, given.seconds_per_case, given.minutes, given.again)
    print(f"{left} of {len(points)} cases left" if left else f"all {len(points)} cases are in {given.json.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
