"""The processors: their name, and how many a process may use at a time, where that is fewer than it sees."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_model() -> str:
    """The processor's name as Linux has it, else as Python does."""
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def allowed_processors(root: str = "/") -> int | None:
    """The quota of the process's control groups in whole processors, at least 1; None where none is below what the
    process sees (an affinity, which OpenMP knows of by itself, is seen).

    Args:
        root: of the file system, for tests.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_quotas(Path(root)), default=math.inf)
    return max(1, math.ceil(quota)) if quota < seen else None


def _quotas(root: Path) -> Iterator[float]:
    """Processors that each of the groups may use, from the process's own up to the root; both versions of cgroups."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, place = (*line.split(":", 2), "", "")[:3]
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        # In a container the place may be the host's, and then only the top of what is mounted is ours.
        for group in (PurePosixPath(place), *PurePosixPath(place).parents):
            inside = str(group).lstrip("/")
            for mount in ("cpu", "cpu,cpuacct") if controllers else ("", "unified"):
                yield from _quota(root / "sys/fs/cgroup" / mount / inside)


def _quota(folder: Path) -> Iterator[float]:
    words = _text(folder / "cpu.max").split() or [
        _text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):  # "max" and -1: no quota
        yield int(words[0]) / int(words[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
