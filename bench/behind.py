"""Where ours is behind: cases slower than the best peer, and those furthest from what the machine allows.

    python bench/behind.py results.json
    python bench/behind.py sweep.json other.json --update README.md    rewrite the table of sweeps between its markers

A case is behind where our median exceeds the best peer's by more than 5 % and 10 µs; the exit status is then 1. Of the
limit: the time that the bytes that have to be moved (of the fused head: the bare matrix products) take, measured in the
same rounds, over ours; only of cases that take a millisecond or more, since shorter ones live in the caches and consist
of the call. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness.results import label, merged, results_file
from report import update

OURS = "fastalign"
SHARE, SECONDS = 0.05, 10e-6
_LEAST = 1e-3
_LARGE = 1 << 20
BEGIN = "<!-- sweeps: written by bench/behind.py -->"
END = "<!-- end of sweeps -->"


class Standing(NamedTuple):
    """A case: ours against the fastest of the peers, in seconds."""

    case: str
    ours: float
    peer: str
    best: float

    @property
    def behind(self) -> bool:
        return self.ours > (1 + SHARE) * self.best + SECONDS

    def __str__(self) -> str:
        return f"{self.case:<58}{self.ours * 1e6:>12,.0f} µs  {self.peer} {self.best * 1e6:,.0f} µs"


def standings(results: dict[str, Any]) -> Iterator[Standing]:
    """One for each case that has a peer."""
    for case in results["cases"]:
        rows = case["variants"]
        peers = {name: row["median"] for name, row in rows.items() if not row["ours"]}
        if OURS in rows and peers:
            best = min(peers, key=peers.__getitem__)
            yield Standing(label(case), rows[OURS]["median"], best, peers[best])


def furthest(results: dict[str, Any], count: int = 5) -> list[tuple[float, str]]:
    """(share of the limit, case), lowest first."""
    rows = [(case["variants"].get(OURS, {}), label(case)) for case in results["cases"]]
    return sorted((r["of_limit"], name) for r, name in rows if "of_limit" in r and r["median"] >= _LEAST)[:count]


def text(results: dict[str, Any]) -> str:
    """Both lists, and how many cases there are."""
    every = list(standings(results))
    late = sorted((s for s in every if s.behind), key=lambda s: s.best - s.ours)
    lines = [
        f"{len(late)} of {len(every)} cases behind the best peer by more than {SHARE:.0%} + {SECONDS * 1e6:.0f} µs"
    ]
    lines += [f"  {standing}" for standing in late]
    lines += ["furthest from the limit:"]
    return "\n".join(lines + [f"  {name:<58}{100 * share:.0f} %" for share, name in furthest(results)])


def _span(cases: list[dict[str, Any]], large: bool) -> str:
    """How many times as fast as the fastest peer ours is, over the cases from 2^20 logits on, or over the others."""
    found = [
        min(row["median"] for row in case["variants"].values() if not row["ours"]) / case["variants"][OURS]["median"]
        for case in cases
        if case["suite"] != "gae" and (case["rows"] * case["vocab"] >= _LARGE) == large  # GAE has no logits
    ]
    if not found:
        return "-"
    return f"{min(found):.2f} to {max(found):.1f}, median {median(found):.2f} ({len(found)})"


def table(sweeps: list[dict[str, Any]]) -> str:
    """A row for each sweep."""
    lines = [
        "| sweep | cases | behind | from 2^20 logits on | below |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for results in sweeps:
        env, every = results["environment"], list(standings(results))
        cases = [case for case in results["cases"] if len({row["ours"] for row in case["variants"].values()}) == 2]
        commit = f"{(env['commit'] or 'no commit')[:12]}{' with uncommitted changes' if env['dirty'] else ''}"
        where = f"{env['cpu']}, {env['threads']} threads, {env['isa']}, {env['date'][:10]}, {commit}"
        late = sum(standing.behind for standing in every)
        lines.append(f"| {where} | {len(every)} | {late} | {_span(cases, True)} | {_span(cases, False)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=results_file, nargs="+", help="later files' cases win")
    parser.add_argument("--update", type=Path, metavar="FILE", help="rewrite the table of sweeps, a row for each file")
    arguments = parser.parse_args(argv)
    if arguments.update:
        text_before = arguments.update.read_text(encoding="utf-8")
        after = update(text_before, table(arguments.results), BEGIN, END)
        arguments.update.write_text(after, encoding="utf-8")
        return 0
    results = merged(arguments.results)
    print(text(results))
    return int(any(standing.behind for standing in standings(results)))


if __name__ == "__main__":
    sys.exit(main())
