"""The C library's allocator and our own cache of large blocks, kept from holding on to memory."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from ..._backends import keep_memory, release_memory
from ...utils import environment

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def _libc(name: str) -> Any:
    """A function of the C library; None where it has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def map_large_blocks(above: int = 1 << 20) -> None:
    """Makes glibc map every block of more bytes than `above`, and so give it back when freed.

    For measuring how much memory something takes. Every block is then zeroed by the kernel page by page, each time:
    training becomes a third slower. Other C libraries have no such function; whoever set glibc's own variables
    (MALLOC_MMAP_THRESHOLD_) is left with them.
    """
    keep_memory(0)
    mallopt = _libc("mallopt")
    if mallopt is not None and not environment.allocator_is_set():
        mallopt(_M_MMAP_THRESHOLD, above)
        mallopt(_M_TRIM_THRESHOLD, above)


def give_back() -> None:
    """Gives the pages of freed blocks back to the system; nothing where the C library cannot."""
    release_memory()
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)
