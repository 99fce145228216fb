"""Where ours is behind: cases slower than the best peer, and those furthest from what the machine allows.

    python bench/behind.py results.json

A case is behind where our median exceeds the best peer's by more than 5 % and 10 µs; the exit status is then 1. Of the
limit: the time that the bytes that have to be moved (of the fused head: the bare matrix products) take, measured in the
same rounds, over ours; only of cases that take a millisecond or more, since shorter ones live in the caches and consist
of the call. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from _results import label, merged, results_file

OURS = "fastalign"
SHARE, SECONDS = 0.05, 10e-6
_LEAST = 1e-3


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=results_file, nargs="+", help="later files' cases win")
    results = merged(parser.parse_args(argv).results)
    print(text(results))
    return int(any(standing.behind for standing in standings(results)))


if __name__ == "__main__":
    sys.exit(main())
