"""What tells the cases of a results file apart, and how one is called. Needs nothing but Python."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_KEYS = ("suite", "job", "rows", "vocab", "dtype", "threads", "list_length", "hidden", "objective")
"""Those after the fifth are in sweeps and of the head alone."""


def key(case: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for the same case in two files."""
    return tuple(case.get(name) for name in _KEYS)


def size(case: dict[str, Any]) -> str:
    """Tokens x vocabulary, dtype, and what else the case was measured at."""
    more = [f"{case[name]} {text}" for name, text in _EXTRAS.items() if case.get(name)]
    return ", ".join([f"{case['rows']:,} x {case['vocab']:,} {case['dtype']}", *more])


_EXTRAS = {"list_length": "in a list", "hidden": "hidden", "threads": "threads"}


def label(case: dict[str, Any]) -> str:
    """The case in words."""
    objective = f" {case['objective']}" if case.get("objective") else ""
    return f"{case['suite']}{objective} {case['job']}, {size(case)}"


def results_file(path: str) -> dict[str, Any]:
    """What a results file holds: the type of a command's argument."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be a file of results, as --json writes; {path!r}: {error}") from None
    if not isinstance(found, dict) or "cases" not in found:
        raise argparse.ArgumentTypeError(f"must be a file of results, as --json writes; {path!r} has no cases")
    return found


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One set of results from several runs on one machine: a case is its last run's, the environment the last one's."""
    environments = [run["environment"] for run in runs]
    places = {(env["cpu"], env["threads"], env.get("device", "cpu")) for env in environments}
    if len(places) > 1:
        raise ValueError("results must come from one machine, device and number of threads; got several")
    cases = {key(case): case for run in runs for case in run["cases"]}
    return {**runs[-1], "cases": list(cases.values())}
