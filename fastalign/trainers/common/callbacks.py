"""Where a run's log lines go: one JSON object a line in the output folder, and a short line on the console."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from . import resident
from .allocator import give_back

LOG_NAME = "log.jsonl"
_SHOWN = (
    "loss",
    "eval_loss",
    "rewards/accuracies",
    "rewards/margins",
    "eval_rewards/accuracies",
    "learning_rate",
    "grad_norm",
)


class JsonlCallback(TrainerCallback):
    """Appends every log line to `output_dir/log.jsonl`; a resumed run first drops the lines it will write again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = os.path.join(args.output_dir, LOG_NAME)
        kept = [line for line in read_log(path) if state.global_step and line["step"] <= state.global_step]
        os.makedirs(args.output_dir, exist_ok=True)
        with open(path + ".partial", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(path + ".partial", path)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with open(os.path.join(args.output_dir, LOG_NAME), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": time.time(), **logs}) + "\n")


class GiveBackCallback(TrainerCallback):
    """Gives free memory back to the system before an update, if the process has grown by `above` bytes since.

    glibc keeps what is freed in its heap, which activations of ever other lengths fragment: left to itself, a training
    process takes half as much again as it ever uses at one time. Pages given back once an update cost little.
    """

    def __init__(self, above: int = 512 << 20) -> None:
        self.above = above
        self._least: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not resident.measurable():
            return
        now = resident.resident()
        if self._least is not None and now >= self._least + self.above:
            give_back()
            now = self._least = resident.resident()
        self._least = now if self._least is None else min(self._least, now)


def read_log(path: str) -> list[dict[str, Any]]:
    """The lines of a JSONL log; none if there is no such file. A last line cut short by a crash is left out."""
    if not os.path.exists(path):
        return []
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def shown(step: int, logs: Mapping[str, float], names: Sequence[str] = _SHOWN) -> str:
    """The line of the console: the numbers that matter; empty if there are none."""
    text = "  ".join(f"{name} {logs[name]:.4g}" for name in names if name in logs)
    return f"step {step:>6}  {text}" if text else ""


class LinesCallback(TrainerCallback):
    """A line on the console for each log line, without a progress bar: for `disable_tqdm`, and files that keep both."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = shown(state.global_step, logs or {})
        if state.is_world_process_zero and line:
            print(line, flush=True)


class ConsoleCallback(ProgressCallback):
    """Transformers' progress bar with the numbers that matter beside it, instead of a dictionary per log line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        line = shown(state.global_step, logs or {})
        if line:
            self.training_bar.write(line)
