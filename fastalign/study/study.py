"""What every study does: claim its folder, prepare a setup for each seed, run its cells, gather their results."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..demo.command import claim
from ..demo.stages import Demo
from ..trainers.common.checkpoints import write_json
from .config import StudyConfig
from .machine import machine
from .runs import Cell, Runner, Work, done, read
from .setup import Setup

OWN = ("grounds", "frontier", "hacking", "transfer")
"""Folders of cells that studies leave in their folder."""

PACKAGES = ("fastalign", "torch", "transformers", "numpy", "scikit-learn")


def prepare_setup(root: Path, config: StudyConfig, name: str) -> dict[str, Any]:
    """The cell `grounds/seed-N`."""
    return Setup(root, config, seed_of(name)).prepare()


def seed_of(name: str) -> int:
    """The seed in a cell's name, which ends with it."""
    return int(name.rpartition("-")[2])


def run_study(
    command: str, config: StudyConfig, cells: Sequence[str], work: Work, console: Console
) -> dict[str, Any] | None:
    """Runs what is not done yet; the results by cell, or None if the time was up before all were there.

    Args:
        command: the study's name.
        cells: names of the cells after the setups, each ending in its seed.
        work: runs one of them.
    """
    config.output_dir = os.path.expanduser(config.output_dir)
    root, settings = Path(config.output_dir), config.settings()
    check = Demo(config.demo(config.first_seed), root).check
    claim(root, "study.json", settings, "study", overwrite=config.overwrite, own=OWN, check=check)
    start = time.monotonic()
    deadline = start + config.max_seconds if config.max_seconds else None
    runner = Runner(root, config, config.processes, deadline, console)
    grounds = [f"grounds/seed-{seed}" for seed in config.all_seeds]
    todo = [name for name in [*grounds, *cells] if not done(root, name)]
    console.print(f"cells: {len(grounds) + len(cells)}, {len(todo)} of them to run", highlight=False)
    left = runner.run(
        [Cell(name, prepare_setup) for name in grounds]
        + [Cell(name, work, needs=f"grounds/seed-{seed_of(name)}") for name in cells]
    )
    if left:
        console.print(f"time is up with {left} cells to go; the same command goes on from here")
        return None
    found = {name: read(root, name) for name in cells}
    return {
        "study": command,
        "command": f"fastalign study {command} {written(config)}".strip(),
        "machine": machine(PACKAGES),
        "settings": settings,
        "seeds": config.seeds,
        "first_seed": config.first_seed,
        "call": {"seconds": time.monotonic() - start, "cells": len(todo)},
        "grounds": {name: read(root, name) for name in grounds},
        "cells": found,
        **{kind: sum(read(root, name)[kind] for name in [*grounds, *found]) for kind in ("seconds", "cpu_seconds")},
    }


def save(path: Path, results: Any) -> None:
    """Writes results as JSON that every reader takes: what is not a number becomes null."""
    write_json(path, _plain(results))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(config: StudyConfig) -> str:
    """The keys of the command line that make these settings: the size, and what differs from it."""
    size = "--full true" if config.full else "--quick true"
    plain = type(config)(full=config.full, quick=not config.full)
    skipped = ("quick", "full", "output_dir", "overwrite", "max_seconds", "processes")
    changed = {
        name: value for name, value in vars(config).items() if name not in skipped and value != getattr(plain, name)
    }
    parts = (f"--{k} {shlex.quote(','.join(v) if isinstance(v, list) else str(v))}" for k, v in changed.items())
    return " ".join([size, *parts])
