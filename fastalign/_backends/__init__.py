"""Which kernels serve which tensors. The only importer of `fastalign.kernels` and of the compiled modules.

One module per backend, each with the functions of `Backend`. A backend is either available or has a reason why not;
asking for one that is not available raises with that reason, and nothing is ever swapped for something else without
being asked. `automatic` says what serves a tensor when nobody asked; `FASTALIGN_BACKEND` or `use_backend` override it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import cpu, cuda, eager, triton
from ._interface import KINDS, KL_TERMS, Backend, Objective
from .cache import LARGE, empty, keep_memory, release_memory
from .cpu import cpu_isa, cpu_isas, loss_program, probe_copy, probe_read, saved_rows

__all__ = [
    "KINDS",
    "KL_TERMS",
    "LARGE",
    "Backend",
    "Objective",
    "automatic",
    "backends",
    "choose",
    "cpu_isa",
    "cpu_isas",
    "direct",
    "empty",
    "keep_memory",
    "loss_program",
    "pick",
    "probe_copy",
    "probe_read",
    "release_memory",
    "saved_rows",
    "use_backend",
]

BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "eager": eager,
}
"""In order of preference: of those that serve a tensor, the first one does."""

_forced: str | None = os.environ.get("FASTALIGN_BACKEND") or None


def backends() -> dict[str, str]:
    """Name of every backend → "available", or the reason why it is not.

    Without a choice of the caller's, CPU tensors of float32, bfloat16 and float16 are served by `cpu` (compiled SIMD
    kernels), the same dtypes on NVIDIA GPUs by `cuda` (compiled kernels) and on others by `triton`, and everything
    else, float64 among it, by `eager` (plain PyTorch operations).
    """
    return {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()}


@contextlib.contextmanager
def use_backend(name: str | None, *, isa: str | None = None) -> Iterator[None]:
    """Within the block every call uses the named backend (None: the automatic choice), `cpu` with the given ISA.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not available.
    """
    global _forced
    before, before_isa = _forced, cpu_isa() or ""
    for wanted in (name, None if isa is None else "cpu"):
        reason = "" if wanted is None else _known(wanted).unavailable()
        if reason:
            raise RuntimeError(f"backend {wanted!r} is not available: {reason}")
    if isa is not None:
        cpu.set_isa(isa)
    _forced = name
    try:
        yield
    finally:
        _forced = before
        if isa is not None:
            cpu.set_isa(before_isa)


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return BACKENDS[name]


def automatic(tensor: Tensor, job: str = "tokens") -> str:
    """Name of the backend that serves this tensor when nobody asks for one; for the jobs see `_interface.DTYPES`."""
    return next(name for name, backend in BACKENDS.items() if not backend.serves(tensor, job))


def choose(tensor: Tensor, job: str = "tokens") -> str:
    """Name of the backend for this tensor: the forced one, checked against device and dtype, or the automatic one."""
    if _forced is None:
        return automatic(tensor, job)
    reason = _known(_forced).serves(tensor, job)
    if reason:
        raise RuntimeError(f"backend {_forced!r} {reason}")
    return _forced


def direct(tensor: Tensor) -> Any:
    """The backend `cpu`, where it may serve this tensor: for its functions that look at the tensors themselves."""
    return cpu if _forced in (None, "cpu") and cpu._C is not None and tensor.is_cpu else None


def pick(tensor: Tensor, job: str = "tokens") -> Backend:
    """The backend that `choose` names: `pick(logits).forward(..)` is the way to every kernel."""
    if _forced is None:
        for backend in BACKENDS.values():
            if not backend.serves(tensor, job):
                return backend
    return BACKENDS[choose(tensor, job)]
