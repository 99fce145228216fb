"""Which kernels serve which tensors. The only importer of `fastalign.kernels` and of the compiled modules.

One module per backend, each with the functions of `Backend`. A backend is either available or has a reason why not;
asking for one that is not available raises with that reason, and nothing is ever swapped for something else without
being asked. `automatic` says what serves a tensor when nobody asked; `FASTALIGN_BACKEND` or `use_backend` override it.
A choice of `use_backend` is its thread's or asyncio task's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..kernels.divergence_call import DivergenceCall, Mixture, Side
from ..kernels.eager.divergence_eager import terms as divergence_terms
from ..kernels.token_call import TokenCall
from ..utils import environment, private
from . import cpu, cuda, eager, triton
from ._interface import Backend, Forward, TokenProgram, check_labels
from .cache import LARGE, empty, keep_memory, release_memory
from .cpu import cpu_isa, cpu_isas, kept_rows, loss_program, probe_copy, probe_read

__all__ = [
    "LARGE",
    "Backend",
    "DivergenceCall",
    "Forward",
    "Mixture",
    "Side",
    "TokenCall",
    "TokenProgram",
    "automatic",
    "backends",
    "check_labels",
    "choose",
    "cpu_isa",
    "cpu_isas",
    "direct",
    "divergence_terms",
    "empty",
    "keep_memory",
    "kept_rows",
    "loss_program",
    "pick",
    "probe_copy",
    "probe_read",
    "release_memory",
    "runs_programs",
    "use_backend",
]

BACKENDS: dict[str, Backend] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "eager": eager,
}
"""In order of preference: of those that serve a tensor, the first one does."""

_choice: ContextVar[str | None] = ContextVar("fastalign_backend", default=environment.BACKEND)
"""The backend that this thread or asyncio task asks for; None: the automatic choice."""

_CARRIED = "fastalign_backend"
"""Key of (thread, its choice) among the objects that torch carries into the threads where autograd runs the backward of
other devices than the CPU: a ContextVar ends at the thread."""


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

    The choice is that of the calling thread or asyncio task: others, and threads that are started within the block, go
    on as before. A backward runs what is chosen where `backward` or `grad` is called.

    Raises:
        ValueError: an unknown name.
        RuntimeError: with the reason, for a backend that is not available.
    """
    before, before_isa = _choice.get(), cpu_isa()
    for wanted in (name, None if isa is None else "cpu"):
        reason = "" if wanted is None else _known(wanted).unavailable()
        if reason:
            raise RuntimeError(f"backend {wanted!r} is not available: {reason}")
    if isa is not None:
        cpu.set_isa(isa)
    carried = _carried()
    _choose(name, (threading.get_ident(), name))
    try:
        yield
    finally:
        _choose(before, carried)
        if before_isa is not None and isa is not None:
            cpu.set_isa(before_isa)


def _choose(name: str | None, carried: tuple[int, str | None] | None) -> None:
    _choice.set(name)
    private.carry(_CARRIED, carried)


def _carried() -> tuple[int, str | None] | None:
    return private.carried(_CARRIED) if private.is_carried(_CARRIED) else None


def _chosen(tensor: Tensor) -> str | None:
    """The backend that is asked for where this tensor is computed on; None: the automatic choice."""
    carried = None if tensor.is_cpu else _carried()  # the CPU's backward runs in the thread that calls it
    return _choice.get() if carried is None or carried[0] == threading.get_ident() else carried[1]


def _known(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return BACKENDS[name]


def automatic(tensor: Tensor, job: str = "tokens") -> str:
    """Name of the backend that serves this tensor when nobody asks for one; for the jobs see `_interface.DTYPES`."""
    return next(name for name, backend in BACKENDS.items() if not backend.serves(tensor, job))


def choose(tensor: Tensor, job: str = "tokens") -> str:
    """Name of the backend for this tensor: the forced one, checked against device and dtype, or the automatic one."""
    forced = _chosen(tensor)
    if forced is None:
        return automatic(tensor, job)
    reason = _known(forced).serves(tensor, job)
    if reason:
        raise RuntimeError(f"backend {forced!r} {reason}")
    return forced


def direct(tensor: Tensor) -> Any:
    """The backend `cpu`, where it may serve this tensor: for its functions that look at the tensors themselves."""
    return cpu if tensor.is_cpu and _choice.get() in (None, "cpu") and cpu._C is not None else None


def runs_programs(tensor: Tensor, tokens: int) -> Any:
    """The backend that `pick` names, if it runs a loss's program on so many tokens in a launch of its own; else
    None."""
    backend = pick(tensor)
    return backend if backend is cuda and tokens <= cuda.PROGRAM_TOKENS else None


def pick(tensor: Tensor, job: str = "tokens") -> Backend:
    """The backend that `choose` names: `pick(call.logits).forward(call, ..)` is the way to every kernel."""
    if (_choice.get() if tensor.is_cpu else _chosen(tensor)) is None:
        for backend in BACKENDS.values():
            if not backend.serves(tensor, job):
                return backend
    return BACKENDS[choose(tensor, job)]
