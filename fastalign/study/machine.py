"""Where and when results were taken: machine, versions, commit. Stands beside every figure that is kept."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..utils.processors import cpu_model
from ..utils.version import version_of


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Date, commit, processor, accelerator, system, and the versions of the packages."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "accelerator": None if accelerator is None else str(accelerator),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in packages},
    }


def git(*arguments: str) -> str | None:
    """What git says about the checkout that this file is in; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
