"""`fastalign demo`: controlled sentiment (Rafailov et al. 2023, sec. 6) from nothing to an aligned model, in minutes.

    fastalign demo

makes a small language model from human-rated movie reviews, fine-tunes it, fits a gold reward on the human ratings,
samples several continuations of each review's opening words, pairs them by that reward, runs DPO on the pairs, and
compares both models on the openings of held-out reviews. `--model smollm2` takes a real 135M model instead, `--model
FOLDER` any causal language model. What it leaves out: the gold reward never sees anything but text, nor does the policy
see the gold reward except through the pairs.

Every stage leaves its result in `output_dir`; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from transformers import logging as transformers_logging

from ..trainers.common import arguments
from ..trainers.common.checkpoints import make_folder, write_json
from . import report as demo_report
from .config import DemoConfig
from .stages import OWN, Demo, clear

_MARK = "demo.json"


def claim(
    path: Path,
    mark: str,
    settings: dict[str, Any],
    what: str,
    *,
    overwrite: bool,
    own: Sequence[str],
    check: Callable[[], None],
) -> None:
    """Marks a folder as that of a run with these settings, so that a later run with the same ones goes on there.

    Args:
        mark: name of the file that holds the settings.
        what: what the folder is then said to hold.
        overwrite: remove an earlier run with other settings.
        own: names that such a run leaves in its folder; nothing else is ever removed.
        check: raises if the run cannot begin; called before anything is removed or marked.

    Raises:
        ValueError: it is no folder, or holds something else, or a run with other settings.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir must be a folder; {str(path)!r} is none")
    known = path.exists() and any(path.iterdir())
    if known:
        if not (path / mark).exists():
            raise ValueError(f"output_dir must be empty or hold an earlier {what}; {str(path)!r} is neither")
        before = _settings(path / mark)
        if before != settings and not overwrite:
            changed = sorted(k for k in settings if before.get(k) != settings[k])
            raise ValueError(
                f"output_dir {str(path)!r} holds a {what} with other settings ({', '.join(changed)} differ): "
                "choose another folder, or --overwrite true"
            )
    if overwrite or not known:
        check()
    if overwrite:
        clear(path, own)
    make_folder(str(path))
    write_json(path / mark, settings)


def _settings(mark: Path) -> dict[str, Any]:
    """What a run left of its settings."""
    try:
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"output_dir: {str(mark)!r} must hold a run's settings; it cannot be read: {error}") from None


class Workplace:
    """The output folder: runs stages in order, keeps each one's result as JSON, and skips those that are there."""

    def __init__(self, demo: Demo, console: Console) -> None:
        """Marks the folder as this demo's. ValueError if it holds something else, or a demo with other settings."""
        self.console, self.path = console, demo.path
        self.results: dict[str, Any] = {}
        self.stages = 0
        settings = {k: v for k, v in dataclasses.asdict(demo.config).items() if k not in ("output_dir", "overwrite")}
        claim(self.path, _MARK, settings, "demo", overwrite=demo.config.overwrite, own=OWN, check=demo.check)

    def stage(self, name: str, title: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result: as it was left by an earlier run, or by running it now."""
        self.stages += 1
        file = self.path / "stages" / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text(encoding="utf-8"))
            self.console.print(f"[bold]{self.stages}. {title}[/] (done before)")
        else:
            self.console.print(f"[bold]{self.stages}. {title}[/]")
            start = time.perf_counter()
            result = run()
            result["seconds"] = time.perf_counter() - start
            write_json(file, result)
            self.console.print(f"   {result['seconds']:.1f} s")
        self.results[name] = result
        return result


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """All stages; returns what `results.json` holds."""
    console = Console(width=None if Console().is_terminal else 110)
    demo = Demo(config, Path(os.path.expanduser(config.output_dir)))
    place = Workplace(demo, console)
    place.stage("corpus", "Human-rated reviews, and the gold reward fitted on them", demo.corpus)
    place.stage("base", "Tokenizer and base model", demo.base)
    place.stage("sft", "Supervised fine-tuning", demo.sft)
    place.stage("pairs", "Sampling continuations, and pairing them by the gold reward", demo.pairs)
    place.stage("dpo", "Direct preference optimisation", demo.dpo)
    place.stage("compare", "Before and after, on held-out prompts", demo.compare)
    place.stage("memory", "Memory of a DPO pass, logits formed whole and not", demo.memory)
    results = {"config": dataclasses.asdict(config), **place.results}
    write_json(place.path / "results.json", results)
    demo_report.curves(results, place.path)
    demo_report.show(results, console)
    console.print(f"\nmodel, results.json and curves.png are in [bold]{place.path}[/]")
    return results


def main(argv: list[str]) -> int:
    """The `fastalign demo` command."""
    config = arguments.parse(DemoConfig, argv, command="demo")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    run_demo(config)
    return 0
