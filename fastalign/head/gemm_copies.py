"""Which products of a head keep a float32 copy of their 16-bit result while they run on this processor.

A CPU with 16-bit units accumulates in registers. Others (and oneDNN or torch in their place) may form the whole result
in float32 first: then logits of 40 MiB take 80 more. Which do depends on processor, dtype, layout and release, and no
interface tells, so each kind is run once, small, and the memory pages that the process touches meanwhile are counted.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_SIDE, _INNER = 512, 32  # a float32 result of 1 MiB: 256 pages, where all else takes some ten
_GET_HUGE, _SET_HUGE = 42, 41  # prctl: PR_GET_THP_DISABLE, PR_SET_THP_DISABLE


class Copies(NamedTuple):
    """Bytes of the copy for each element of a product's result: 4, or 0."""

    logits: int
    """hidden @ weight.T"""
    hidden: int
    """dlogits @ weight"""
    weight: int
    """dlogits.T @ hidden"""


@functools.cache
def gemm_copies(dtype: torch.dtype) -> Copies:
    """Of products in a dtype on the CPU, measured in a tenth of a second, once per process and dtype.

    Where pages cannot be counted (no glibc), 16-bit products are taken to make a copy: an upper bound.
    """
    if dtype.itemsize != 2:
        return Copies(0, 0, 0)
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not hasattr(libc, "prctl"):
        return Copies(4, 4, 4)
    tall, wide = (torch.ones(shape, dtype=dtype) for shape in ((_SIDE, _INNER), (_INNER, _SIDE)))
    out = torch.ones(_SIDE, _SIDE, dtype=dtype)
    pairs = ((tall, tall.t()), (tall, wide), (wide.t(), wide))
    huge = libc.prctl(_GET_HUGE, 0, 0, 0, 0)
    libc.prctl(_SET_HUGE, 1, 0, 0, 0)  # or one page would be 2 MiB
    try:
        return Copies(*(4 * _touches(libc, functools.partial(torch.mm, a, b, out=out)) for a, b in pairs))
    finally:
        libc.prctl(_SET_HUGE, huge, 0, 0, 0)


def _touches(libc: Any, product: Callable[[], Any]) -> bool:
    """Whether a product touches new memory of a float32 result's size."""
    import resource  # not on Windows, which has no glibc either

    def pages() -> int:
        libc.malloc_trim(0)  # freed memory that was kept would be used again unseen
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        product()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    product()  # what is compiled or kept the first time
    # Other threads touch pages too: the fewest of some tries.
    return min(pages() for _ in range(3)) * mmap.PAGESIZE > _SIDE * _SIDE * 4 / 2
