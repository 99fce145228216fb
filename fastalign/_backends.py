"""Which kernels serve which tensors. The only importer of `fastalign.kernels` and of the compiled `fastalign._C`.

Every backend is either available or has a reason why not; asking for one that is not available raises with that
reason, and nothing is ever swapped for something else without being asked. `automatic` says what serves a tensor when
nobody asked; `FASTALIGN_BACKEND` or `use_backend` override it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import gae_eager, token_stats_eager

# torch is imported first: the compiled module takes its OpenMP runtime from the process, and that must be torch's.
try:
    from . import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None  # type: ignore[assignment]
    _C_ERROR = f"the compiled module fastalign._C cannot be imported ({error}); install with `pip install .`"
else:
    _C_ERROR = ""
    if os.environ.get("FASTALIGN_CPU_ISA"):
        _C.set_isa(os.environ["FASTALIGN_CPU_ISA"])

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
    """Within the block every call uses the named backend (None: the automatic choice), `cpu` with the given ISA.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not available.
    """
    global _forced
    before, before_isa = _forced, cpu_isa() or ""
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


# ------------------------------------------------------------------------------------------------ token statistics
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Results larger than this leave the caches anyway.
_STREAM_BYTES = 32 << 20


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _tokens(logits, labels, ref_logits, ignore_index, temperature, softcap) -> tuple:
    """The description of a call that `_C` takes; `labels` and the tensors must outlive it."""
    return (
        _DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        tuple(logits.shape),
        logits.stride(),
        _address(ref_logits),
        logits.stride() if ref_logits is None else ref_logits.stride(),
        labels.data_ptr(),
        labels.dtype == torch.int64,
        ignore_index,
        temperature,
        softcap,
        torch.get_num_threads(),
    )


def _fresh(out: Tensor, logits: Tensor) -> bool:
    """A large separate result, which is written past the caches, into huge pages."""
    return out.data_ptr() != logits.data_ptr() and out.numel() * out.element_size() > _STREAM_BYTES


def _bad_label(labels: Tensor, at: int, ignore_index: int, vocab: int) -> ValueError:
    return ValueError(
        f"labels must be in [0, {vocab}) or equal to ignore_index={ignore_index}; "
        f"got {int(labels.flatten()[at])} at flat position {at}"
    )


def _check_labels(labels: Tensor, ignore_index: int, vocab: int) -> None:
    """Reads the labels of a call, never its logits. Off the CPU it would stop the host, and kernels guard instead."""
    if labels.device.type == "cpu":
        bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bad.any():
            raise _bad_label(labels, int(bad.flatten().nonzero()[0]), ignore_index, vocab)


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
    """(logps, lse, entropy, kl, mean, saved) by the chosen backend; see `kernels.token_stats_eager` for their meaning.

    Raises ValueError, before any logit is read, for a label that is neither in [0, V) nor `ignore_index`.
    """
    if choose(logits) == "eager":
        _check_labels(labels, ignore_index, logits.shape[-1])
        return token_stats_eager.forward(
            logits, labels, ref_logits, ignore_index, temperature, softcap, want_entropy, want_mean
        )
    labels = labels.contiguous()
    rows = labels.shape

    def out(wanted: bool = True) -> Tensor | None:
        return torch.empty(rows) if wanted else None

    logps, lse, saved = torch.empty(rows), torch.empty(rows), torch.empty((*rows, 4))
    entropy, kl, mean = out(want_entropy), out(ref_logits is not None), out(want_mean)
    bad = _C.token_stats_forward(
        _tokens(logits, labels, ref_logits, ignore_index, temperature, softcap),
        logps.data_ptr(),
        lse.data_ptr(),
        _address(entropy),
        _address(kl),
        _address(mean),
        saved.data_ptr(),
    )
    if bad >= 0:
        raise _bad_label(labels, bad, ignore_index, logits.shape[-1])
    return logps, lse, entropy, kl, mean, saved


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
        _check_labels(labels, ignore_index, logits.shape[-1])
        token_stats_eager.backward(
            logits, labels, ref_logits, saved, entropy, kl, grads, ignore_index, temperature, softcap, out
        )
        return
    labels = labels.contiguous()
    dense = [None if t is None else t.contiguous() for t in (saved, entropy, kl, *grads)]  # kept until the call is over
    bad = _C.token_stats_backward(
        _tokens(logits, labels, ref_logits, ignore_index, temperature, softcap),
        tuple(map(_address, dense)),
        out.data_ptr(),
        out.stride(),
        _fresh(out, logits),
    )
    if bad >= 0:
        raise _bad_label(labels, bad, ignore_index, logits.shape[-1])


# ------------------------------------------------------------------------------------------------- one launch
KINDS = {"sft": 0, "reinforce": 1, "surrogate": 2, "clip": 3, "cispo": 4}
KL_TERMS = {None: 0, "k1": 1, "k2": 2, "k3": 3, "exact": 4}


class Objective(NamedTuple):
    """A token-level objective as `kernels/objectives.h` knows it; see `ops.token_objective` for the fields."""

    kind: str
    low: float = 0.0
    high: float = 0.0
    dual_clip: float = math.inf
    kl: str | None = None
    kl_coef: float = 0.0
    kl_reversed: bool = False
    entropy_coef: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def objective(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    options: Objective,
    ignore_index: int,
    temperature: float,
    softcap: float,
    want_entropy: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logps, lse, entropy, kl, mean); the gradient of the objective goes into `out`, which may be `logits` itself.

    `inputs` are weight, old_logps, advantages, ref_logps: float32 of the labels' shape. Only `cpu` can do this today.
    """
    name = choose(logits)
    if name != "cpu":
        raise RuntimeError(
            f"the one-launch objective needs the backend 'cpu' (float32, bfloat16 or float16 on cpu); "
            f"{logits.dtype} on {logits.device} is served by {name!r}: use two steps (one_launch=False)"
        )
    labels = labels.contiguous()
    dense = [None if t is None else t.contiguous() for t in inputs]

    def result(wanted: bool) -> Tensor | None:
        return torch.empty(labels.shape) if wanted else None

    logps, lse = torch.empty(labels.shape), torch.empty(labels.shape)
    entropy, kl, mean = result(want_entropy), result(ref_logits is not None), result(options.label_smoothing != 0)
    codes = (KINDS[options.kind], *options[1:4], KL_TERMS[options.kl], *options[5:])
    bad = _C.token_objective(
        _tokens(logits, labels, ref_logits, ignore_index, temperature, softcap),
        codes,
        tuple(map(_address, dense)),
        tuple(map(_address, (logps, lse, entropy, kl, mean))),
        out.data_ptr(),
        out.stride(),
        _fresh(out, logits),
    )
    if bad >= 0:
        raise _bad_label(labels, bad, ignore_index, logits.shape[-1])
    return logps, lse, entropy, kl, mean


# ------------------------------------------------------------------------------------------------- advantages
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of checked rewards and values (one dtype, float32 or float64) and a boolean mask."""
    # float64 too, unlike the token statistics: here it costs nothing.
    if _C is None or rewards.device.type != "cpu" or _forced == "eager":
        return gae_eager.gae(rewards, values, mask, gamma, lam)
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    length = rewards.shape[-1]
    call = _C.gae_float64 if rewards.dtype == torch.float64 else _C.gae_float32
    call(
        rewards.data_ptr(),
        values.data_ptr(),
        mask.data_ptr(),
        advantages.data_ptr(),
        returns.data_ptr(),
        rewards.numel() // length if length else 0,
        length,
        gamma,
        gamma * lam,
        torch.get_num_threads(),
    )
    return advantages, returns


# ------------------------------------------------------------------------------------------------- machine's rates
def probe_read(tensor: Tensor) -> float:
    """Reads every byte of a contiguous CPU tensor with a plain SIMD loop over torch's threads; returns a checksum.

    Timing it gives the machine's read rate, the limit of every kernel that reads its input once.
    """
    return _C.read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())


def probe_copy(to: Tensor, source: Tensor) -> None:
    """Copies a contiguous CPU tensor with streaming stores over torch's threads: the machine's copy rate."""
    _C.copy(to.data_ptr(), source.data_ptr(), source.numel() * source.element_size(), torch.get_num_threads())
