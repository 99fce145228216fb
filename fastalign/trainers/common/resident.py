"""Resident memory of this process and its peak, from Linux's /proc. Elsewhere `measurable` is False."""

from __future__ import annotations

from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")


def measurable() -> bool:
    """Whether the kernel keeps a high-water mark that can be reset."""
    return _CLEAR.exists()


def reset_peak() -> None:
    """The peak starts again from what is resident now."""
    _CLEAR.write_text("5")


def resident() -> int:
    """Bytes resident now. The kernel counts pages in batches: good to some 0.3 MB."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that were resident since the process began, or since `reset_peak`."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
