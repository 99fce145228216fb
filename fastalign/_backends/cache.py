"""Memory of large results on the CPU: a cache that spares the system's clearing of pages (kernels/large_blocks.h)."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..utils import environment
from . import cpu

LARGE = 8 << 20
"""Bytes beyond which a result has a block of the cache. The C library gives freed blocks back to the system from some
size on that moves with what a program allocates (glibc's: up to 32 MiB, and always beyond)."""


def _default_limit() -> int:
    if environment.KEPT_BYTES is not None:
        return environment.KEPT_BYTES
    known = hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 if known else 0


if cpu._C is not None:
    cpu._C.HeldBlock.keep_at_most(_default_limit())


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new dense tensor on the device of another, of its dtype if none is given. On the CPU, where it is large, in
    memory that comes back from one step to the next."""
    dtype, count = like.dtype if dtype is None else dtype, math.prod(shape)
    if cpu._C is None or count * dtype.itemsize <= LARGE or not like.is_cpu:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.frombuffer(cpu._C.HeldBlock(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def keep_memory(limit: int) -> None:
    """How many bytes of the memory of large results (above 8 MiB, on the CPU) are kept for others when it is freed.

    New memory takes longer to touch than a kernel takes to compute what goes into it: a gradient of 262 MB costs 64 ms
    in new memory and 19 in memory that was there. What is kept and what is in use are together no more than was in use
    at once at some time, so the peak of a loop does not rise. Before any call the limit is an eighth of the machine's
    memory, or what the environment variable FASTALIGN_KEPT_MIB says.

    Args:
        limit: in bytes; 0: every block goes back to the system at once.

    Raises:
        ValueError: a negative limit.
    """
    if limit < 0:
        raise ValueError(f"limit must be a number of bytes, 0 or more; got {limit}")
    if cpu._C is not None:
        cpu._C.HeldBlock.keep_at_most(limit)


def release_memory() -> int:
    """Gives what is kept (see `keep_memory`) back to the system; returns how many bytes that were."""
    return 0 if cpu._C is None else cpu._C.HeldBlock.release_kept()
