"""Where and with what results were taken: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import _device
import torch
from _probe import SOURCE
from _suite import Options

from fastalign import _backends

_PACKAGES = ("fastalign", "torch", "trl", "numpy", "pytest-benchmark", "triton", "liger-kernel", "quack-kernels")


def environment(options: Options) -> dict[str, Any]:
    """The results file's `environment`."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": _backends.cpu_isa(),
        "backend": _backends.choose(torch.empty(0, device=options.device)),
        "device": options.device,
        "accelerator": _device.description(options.device),
        "threads": options.threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "probe": SOURCE if options.device == "cpu" else "torch",
        "options": asdict(options),
    }


def _cpu_model() -> str:
    """The processor's name as Linux has it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    """Version of an installed package, None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
