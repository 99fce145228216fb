"""The C library's allocator, kept from holding on to memory."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def map_large_blocks(above: int = 1 << 20) -> None:
    """Makes glibc map every block of more bytes than `above`, and so give it back when freed.

    Left to itself it raises that bound to 32 MB as blocks are freed: activations then come from a heap that batches of
    ever other lengths fragment, and a training process grows from step to step. Other C libraries have no such habit
    and no such function; whoever set glibc's own variables (MALLOC_MMAP_THRESHOLD_) is left with them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, above)
        mallopt(_M_TRIM_THRESHOLD, above)
