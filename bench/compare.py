"""A gate against regressions: two results files of one machine, case by case, for every variant of ours.

    python bench/compare.py before.json after.json [--ratio 1.1]

prints how many times longer each takes after than before (medians), and exits with 1 if one exceeds the ratio or a case
is missing after. Where a peer was measured both times, what its time changed by is shown beside it: a machine that was
slower that day slows both. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from harness.results import key, label, results_file


@dataclass(frozen=True)
class Change:
    """`ratio`: after over before; None where it was not measured after. `machine`: the same of eager torch."""

    case: str
    variant: str
    ratio: float | None
    machine: float | None

    def passes(self, limit: float) -> bool:
        return self.ratio is not None and self.ratio <= limit

    def line(self, limit: float) -> str:
        ratio = "missing" if self.ratio is None else f"{self.ratio:.3f}x"
        machine = "" if self.machine is None else f"  (eager {self.machine:.3f}x)"
        return f"{'ok  ' if self.passes(limit) else 'FAIL'}  {self.case:<58}{self.variant:<32}{ratio:>9}{machine}"


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """One for every case and variant of ours in `before`, slowest first. ValueError unless the machine is the same."""
    for name in ("cpu", "threads", "device"):
        old, new = (run["environment"].get(name, "cpu") for run in (before, after))
        if old != new:
            raise ValueError(
                f"both files must come from one machine; {name} is {old!r} in one and {new!r} in the other"
            )
    found, later = [], {key(case): case for case in after["cases"]}
    for case in before["cases"]:
        rows = later.get(key(case), {"variants": {}})["variants"]

        def ratio(name: str, old: dict[str, Any] = case["variants"], new: dict[str, Any] = rows) -> float | None:
            return new[name]["median"] / old[name]["median"] if name in new and name in old else None

        ours = [name for name, row in case["variants"].items() if row["ours"]]
        found += [Change(label(case), name, ratio(name), ratio("eager")) for name in ours]
    return sorted(found, key=lambda change: -(change.ratio or float("inf")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=results_file)
    parser.add_argument("after", type=results_file)
    parser.add_argument(
        "--ratio", type=float, default=1.1, help="how many times longer is allowed (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.ratio > 0:
        parser.error(f"--ratio must be above 0; got {arguments.ratio}")
    found = changes(arguments.before, arguments.after)
    failed = [change for change in found if not change.passes(arguments.ratio)]
    print("\n".join(change.line(arguments.ratio) for change in found))
    print(f"{len(found) - len(failed)} of {len(found)} within {arguments.ratio}x")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
