"""The C library's allocator, kept from holding on to memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_STATM = Path("/proc/self/statm")


def _libc(name: str) -> Any:
    """A function of the C library; None where it has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def map_large_blocks(above: int = 1 << 20) -> None:
    """Makes glibc map every block of more bytes than `above`, and so give it back when freed.

    For measuring how much memory something takes. Every block is then zeroed by the kernel page by page, each time:
    training becomes a third slower. Other C libraries have no such function; whoever set glibc's own variables
    (MALLOC_MMAP_THRESHOLD_) is left with them.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, above)
        mallopt(_M_TRIM_THRESHOLD, above)


class GiveBack(TrainerCallback):
    """Gives free memory back to the system before an update, if the process has grown by `above` bytes since.

    glibc keeps what is freed in its heap, which activations of ever other lengths fragment: left to itself, a training
    process takes half as much again as it ever uses at one time. Pages given back once an update cost little.
    """

    def __init__(self, above: int = 512 << 20) -> None:
        self.above = above
        self._least: int | None = None
        self._trim = _libc("malloc_trim") if _STATM.exists() else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trim is None:
            return
        resident = _resident()
        if self._least is None or resident < self._least + self.above:
            self._least = resident if self._least is None else min(self._least, resident)
            return
        self._trim(0)
        self._least = _resident()


def _resident() -> int:
    """Bytes of the process in memory."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
