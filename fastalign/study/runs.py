"""Running the cells of a study: each in its own folder, each once, several side by side, over as many calls as needed.

A cell is done when its folder holds `result.json`, which is written whole or not at all. What else a cell that was cut
off left in its folder is for its work to use or to remove.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ..trainers.common.checkpoints import write_json

RESULT, OUTPUT = "result.json", "output.txt"
Work = Callable[[Path, Any, str], dict[str, Any]]
"""(root folder, the study's configuration, the cell's name) → the result. Other processes call it, so no lambda."""


class Cell(NamedTuple):
    """One cell.

    Attributes:
        name: its folder under the root.
        work: what makes its result.
        needs: name of a cell that must be done before, or none.
    """

    name: str
    work: Work
    needs: str = ""


class Runner(NamedTuple):
    """How cells are run.

    Attributes:
        root: the study's folder.
        config: the study's configuration, which the work is given.
        processes: cells at once; with one, everything runs in this process.
        deadline: `time.monotonic()` after which no cell is started; None for never.
        console: where progress is told.
    """

    root: Path
    config: Any
    processes: int
    deadline: float | None
    console: Console

    def run(self, cells: Sequence[Cell]) -> int:
        """Runs the cells that are not done, each after what it needs; returns how many are left.

        What a cell raises is raised when those that run beside it have ended.

        Raises:
            ValueError: what a cell was given is wrong, or a file cannot be had; its cause is the cell's own error.
            RuntimeError: a cell failed in any other way; the same.
        """
        todo = [cell for cell in cells if not done(self.root, cell.name)]
        if not todo:
            return 0
        start = _in_line if self.processes == 1 else _in_processes
        finished, failed = start(self, todo)
        if failed is not None:
            name, cause = failed
            kind = ValueError if isinstance(cause, (ValueError, TypeError, OSError)) else RuntimeError
            raise kind(f"cell {name} failed: {cause}") from cause
        return len(todo) - finished

    def late(self) -> bool:
        """Whether no further cell may be started."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def next(self, waiting: Sequence[Cell]) -> Cell | None:
        """The first that lacks nothing it needs."""
        return next((c for c in waiting if not c.needs or done(self.root, c.needs)), None)

    def tell(self, name: str, count: int, total: int) -> None:
        """One line for a finished cell."""
        seconds = read(self.root, name)["seconds"]
        self.console.print(f"   {count}/{total} {name} ({seconds:.0f} s)", highlight=False)


def _in_line(runner: Runner, cells: Sequence[Cell]) -> tuple[int, tuple[str, BaseException] | None]:
    waiting = list(cells)
    while waiting and not runner.late():
        cell = runner.next(waiting)
        if cell is None:
            break
        waiting.remove(cell)
        try:
            run_cell(cell.work, runner.root, runner.config, cell.name)
        except Exception as error:
            return len(cells) - len(waiting) - 1, (cell.name, error)
        runner.tell(cell.name, len(cells) - len(waiting), len(cells))
    return len(cells) - len(waiting), None


def _in_processes(runner: Runner, cells: Sequence[Cell]) -> tuple[int, tuple[str, BaseException] | None]:
    """Cells are handed out one by one, so that the deadline counts for each. A fresh process forks no threads."""
    waiting, running = list(cells), dict[Future, str]()
    finished, failed = 0, None
    threads = max(1, (os.cpu_count() or 1) // runner.processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(runner.processes, spawn, initializer=_share, initargs=(threads,)) as pool:
        while True:
            while len(running) < runner.processes and failed is None and not runner.late():
                cell = runner.next(waiting)
                if cell is None:
                    break
                waiting.remove(cell)
                running[pool.submit(run_cell, cell.work, runner.root, runner.config, cell.name)] = cell.name
            if not running:
                return finished, failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.exception()
                if error is not None:
                    failed = failed or (name, error)
                    continue
                finished += 1
                runner.tell(name, finished, len(cells))


def _share(threads: int) -> None:
    """A worker keeps to its share of the cores."""
    torch.set_num_threads(threads)


def run_cell(work: Work, root: Path, config: Any, name: str) -> None:
    """Runs one cell and leaves its result, with the seconds that it took; what it prints goes to a file beside."""
    start, cpu = time.perf_counter(), time.process_time()
    (root / name).mkdir(parents=True, exist_ok=True)
    with open(root / name / OUTPUT, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        result = work(root, config, name)
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    write_json(root / name / RESULT, result)


def done(root: Path, name: str) -> bool:
    """Whether the cell has its result."""
    return (root / name / RESULT).exists()


def read(root: Path, name: str) -> dict[str, Any]:
    """The cell's result."""
    return json.loads((root / name / RESULT).read_text(encoding="utf-8"))
