"""Matrix products of a head, whose sums over tiles are float32 until they are rounded once.

A 16-bit product of torch's is rounded to 16 bits. That is right for a whole one; parts that are added afterwards would
be rounded each. So parts are summed in float32 inside the product: by our own on the CPU, by cuBLAS on CUDA, elsewhere
by a product of float32 copies.

Processors without 16-bit units form a 16-bit product at a fraction of their float32 rate (torch 2.13 on AVX2: a
fortieth). There the head takes its own float32 sums for everything, and float32 logits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _backends
from ..utils import environment

_SIZE = (128, 512, 128)  # of the product that is timed
_RUNS = 5
# How much slower than float32 is slow: with 16-bit units 0.5 to 0.7 times was measured, without them 30 times.
# Far from both, so that a busy machine does not decide it, and with it the numbers, otherwise from one run to the next.
_SLOWER = 5.0


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b where it is the first part, else total += a @ b, summed in the dtype of total.

    Args:
        total: [m, n], of the dtype of a and b or wider.
        a, b: [m, k] and [k, n].
    """
    if total.dtype == a.dtype == b.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.dtype == torch.float32 and _backends.direct(total) is not None:
        _backends.direct(total).add_product(total, a, b, first)
    elif total.is_cuda and total.dtype == torch.float32 and a.dtype == b.dtype:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        wide = a.to(total.dtype), b.to(total.dtype)
        torch.mm(*wide, out=total) if first else total.addmm_(*wide)


def product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b, rounded once to the dtype of out."""
    if a.dtype == b.dtype == out.dtype and quick(out.dtype, out.device):
        return torch.mm(a, b, out=out)
    if out.dtype.itemsize > 2:
        add_product(out, a, b, True)
        return out
    total = torch.empty_like(out, dtype=torch.float32)
    add_product(total, a, b, True)
    return out.copy_(total)


def quick(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's products of this dtype are about as quick as those of float32: of 16 bits on the CPU, measured
    once per process in some milliseconds; FASTALIGN_CPU_GEMM=16bit or float32 says it instead."""
    if device.type != "cpu" or dtype.itemsize != 2:
        return True
    if environment.CPU_GEMM is not None:
        return environment.CPU_GEMM == "16bit"
    return slowness(dtype) < _SLOWER


@functools.cache
def slowness(dtype: torch.dtype) -> float:
    """The time of a small 16-bit product of torch's on the CPU, as a multiple of the same in float32: of one thread,
    and its own time, on which other processes have next to no influence."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(dtype) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def advice(dtype: torch.dtype) -> str | None:
    """What to tell who is about to run a 16-bit model on this machine's CPU; None: nothing."""
    if dtype.itemsize != 2 or torch.accelerator.is_available() or slowness(dtype) < _SLOWER:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"this processor has no units for {name}: its products take {slowness(dtype):.0f} times as long as those of "
        "float32. The head computes in float32 by itself, the model's other layers do not: dtype=float32 is quicker"
    )


def _seconds(dtype: torch.dtype) -> float:
    m, k, n = _SIZE
    a, b, out = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    return min(_timed(lambda: torch.mm(a, b, out=out)) for _ in range(_RUNS))


def _timed(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return max(time.thread_time() - start, 1e-9)


def logits_dtype(wanted: torch.dtype | None, hidden: torch.dtype, device: torch.device) -> torch.dtype:
    """Of a head's logits: as asked for, else that of the hidden states where products of it are quick, else float32.

    Raises:
        TypeError: another one than float32 or that of hidden.
    """
    if wanted is None:
        return hidden if quick(hidden, device) else torch.float32
    if wanted != hidden and (wanted != torch.float32 or hidden.itemsize > 2):
        other = ", or torch.float32" if hidden.itemsize == 2 else ""
        raise TypeError(f"logits_dtype must be None, that of hidden, {hidden}{other}; got {wanted}")
    return wanted
