"""Which kernels serve which tensors. The only importer of `fastalign.kernels` and of the compiled `fastalign._C`.

Every backend is either available or has a reason why not; asking for one that is not available raises with that
reason, and nothing is ever swapped for something else without being asked. `automatic` says what serves a tensor when
nobody asked; `FASTALIGN_BACKEND` or `use_backend` override it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels import token_stats_eager

# torch is imported first: the compiled module takes its OpenMP runtime from the process, and that must be torch's.
try:
    from . import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None  # type: ignore[assignment]
    _C_ERROR = f"the compiled module fastalign._C cannot be imported ({error}); install with `pip install .`"
else:
    _C_ERROR = ""

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("cpu", "eager")

_forced: str | None = os.environ.get("FASTALIGN_BACKEND") or None


def backends() -> dict[str, str]:
    """Name of every backend → "available", or the reason why it is not.

    Without a choice of the caller's, CPU tensors of float32, bfloat16 and float16 are served by `cpu` (compiled SIMD
    kernels) and everything else, float64 among it, by `eager` (plain PyTorch operations).
    """
    return {"cpu": _C_ERROR or "available", "eager": "available"}


def cpu_isa() -> str | None:
    """Instruction set that the `cpu` backend runs: "avx512", "avx2" or "portable"; None where it is not built.

    The best one that the processor has, unless the environment variable FASTALIGN_CPU_ISA names another.
    """
    return None if _C is None else _C.isa()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this build holds and this processor can run, best first."""
    return () if _C is None else tuple(_C.isas())


@contextlib.contextmanager
def use_backend(name: str | None, *, isa: str | None = None) -> Iterator[None]:
    """Within the block every call uses the named backend (None: the automatic choice), the `cpu` one with the given ISA.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not available.
    """
    global _forced
    before, before_isa = _forced, cpu_isa()
    if name is not None:
        _require(name)
    if isa is not None:
        if _C is None:
            raise RuntimeError(f"backend 'cpu' is not available: {_C_ERROR}")
        _C.set_isa(isa)
    _forced = name
    try:
        yield
    finally:
        _forced = before
        if isa is not None:
            _C.set_isa(before_isa)


def _require(name: str) -> None:
    known = backends()
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}; got {name!r}")
    if known[name] != "available":
        raise RuntimeError(f"backend {name!r} is not available: {known[name]}")


def automatic(tensor: Tensor) -> str:
    """Name of the backend that serves this tensor when nobody asks for one."""
    return "cpu" if tensor.device.type == "cpu" and tensor.dtype in CPU_DTYPES and _C is not None else "eager"


def choose(tensor: Tensor) -> str:
    """Name of the backend for this tensor: the forced one, checked against device and dtype, or the automatic one."""
    if _forced is None:
        return automatic(tensor)
    _require(_forced)
    if _forced == "cpu" and (tensor.device.type != "cpu" or tensor.dtype not in CPU_DTYPES):
        raise RuntimeError(
            f"backend 'cpu' serves float32, bfloat16 and float16 tensors on cpu; got {tensor.dtype} on {tensor.device}"
        )
    return _forced


def forward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    ignore_index: int,
    temperature: float,
    softcap: float,
    want_entropy: bool,
    want_mean: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(logps, lse, entropy, kl, mean, saved) by the chosen backend; see `kernels.token_stats_eager` for their meaning."""
    if choose(logits) == "eager":
        return token_stats_eager.forward(
            logits, labels, ref_logits, ignore_index, temperature, softcap, want_entropy, want_mean
        )
    raise RuntimeError("not built")


def backward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    ignore_index: int,
    temperature: float,
    softcap: float,
    out: Tensor,
) -> None:
    """Writes the gradient of the logits into `out`, which may be `logits` itself."""
    if choose(logits) == "eager":
        token_stats_eager.backward(
            logits, labels, ref_logits, saved, entropy, kl, grads, ignore_index, temperature, softcap, out
        )
        return
    raise RuntimeError("not built")
