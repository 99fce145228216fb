"""The backend of compiled SIMD kernels for float32, bfloat16 and float16 CPU tensors: calls into `fastalign._C`."""

from __future__ import annotations

import os
from typing import Any

# torch is imported first: the compiled module takes its OpenMP runtime from the process, and that must be torch's.
import torch
from torch import Tensor

from ..kernels.token_results import new_saved, new_statistics
from ._interface import DTYPES, KINDS, KL_TERMS, Objective, Statistics, bad_label

try:
    from .. import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None  # type: ignore[assignment]
    _C_ERROR = f"the compiled module fastalign._C cannot be imported ({error}); install with `pip install .`"
else:
    _C_ERROR, _UNUSUAL = "", _C.UNUSUAL
    _SEEN = (Tensor, (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.float64))
    _C.learn_tensors(*_SEEN, False)
    if os.environ.get("FASTALIGN_CPU_ISA"):
        _C.set_isa(os.environ["FASTALIGN_CPU_ISA"])


def unavailable() -> str:
    return _C_ERROR


GROUP = 3
"""Level of results by pair or list: see `ops.operations`."""


def serves(tensor: Tensor, job: str) -> str:
    if _C is not None and tensor.is_cpu and tensor.dtype in DTYPES[job]:
        return ""
    if _C is None:
        return f"is not available: {_C_ERROR}"
    names = " and ".join(", ".join(str(d).removeprefix("torch.") for d in DTYPES[job]).rsplit(", ", 1))
    return f"serves {names} tensors on cpu; got {tensor.dtype} on {tensor.device}"


def cpu_isa() -> str | None:
    """Instruction set that the `cpu` backend runs: "avx512", "avx2" or "portable"; None where it is not built.

    The best one that the processor has, unless the environment variable FASTALIGN_CPU_ISA names another.
    """
    return None if _C is None else _C.isa()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this build holds and this processor can run, best first."""
    return () if _C is None else tuple(_C.isas())


def set_isa(name: str) -> None:
    """Runs the named instruction set from now on; ValueError for one that `cpu_isas` does not list."""
    _C.set_isa(name)


# ------------------------------------------------------------------------------------------------ token statistics
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def tokens(logits, labels, ref_logits, ignore_index, temperature, softcap) -> tuple:
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
    labels = labels.contiguous()
    found = new_statistics(labels, want_entropy, ref_logits is not None, want_mean)
    saved = new_saved(found[0])
    live = _C.token_stats_forward(
        tokens(logits, labels, ref_logits, ignore_index, temperature, softcap),
        tuple(map(_address, (*found, saved))),
    )
    if live < 0:
        raise bad_label(labels, -1 - live, ignore_index, logits.shape[-1])
    return (*found, saved)


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
    labels = labels.contiguous()
    dense = [None if t is None else t.contiguous() for t in (saved, entropy, kl, *grads)]  # kept until the call is over
    live = _C.token_stats_backward(
        tokens(logits, labels, ref_logits, ignore_index, temperature, softcap),
        tuple(map(_address, dense)),
        out.data_ptr(),
        out.stride(),
    )
    if live < 0:
        raise bad_label(labels, -1 - live, ignore_index, logits.shape[-1])


# ------------------------------------------------------------------------------------------------- directly
# These compiled functions look at the tensors themselves, in a fraction of the time that it takes to do so here, and do
# nothing where they are not plain ones such as the kernels take as they are. `options` are ignore_index, temperature,
# softcap; `inplace`: the gradient is to be written over the logits, which must not share memory with each other; `out`
# is new and dense. What a backward needs is bytes, which are made in a third of a tensor's time; `saved_tensor` makes
# the tensor of `forward` of it.
Kept = bytes


def _done(live: int, labels: Tensor, options: tuple[int, float, float], logits: Tensor) -> bool:
    """Whether the work was done; ValueError for a bad label."""
    if live < 0 and live != _UNUSUAL:
        raise bad_label(labels, -1 - live, options[0], logits.shape[-1])
    return live >= 0


def saved_rows(kept: Kept, labels: Tensor, which: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """saved, entropy and kl as `forward` returns them, of what a call kept; `which`: bits 4, 8 for the last two."""
    numbers = torch.frombuffer(bytearray(kept), dtype=torch.float32) if kept else _ONE.new_empty(0)
    tokens = labels.numel()
    saved, rest = numbers[: 4 * tokens], numbers[4 * tokens :]
    entropy = rest[:tokens].view(labels.shape) if which & 4 else None
    kl = rest[-tokens:].view(labels.shape) if which & 8 else None
    return (saved.view(*labels.shape, 4) if saved.numel() == 4 * tokens else saved), entropy, kl


def logps(
    logits: Tensor, labels: Tensor, options: tuple[int, float, float], inplace: bool
) -> tuple[Tensor, Tensor, Kept] | None:
    """logps, lse and what the backward needs; None, and nothing was done, for other tensors than such."""
    found, lse = torch.empty_like(labels, dtype=torch.float32), torch.empty_like(labels, dtype=torch.float32)
    live, saved = _C.logps_forward(logits, labels, options, inplace, found, lse, torch.get_num_threads())
    return (found, lse, saved) if _done(live, labels, options, logits) else None


# A scalar like one that is there already is made in half the time.
_SCALARS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in _DTYPE_CODES}
_ONE = _SCALARS[torch.float32]


def loss_program(*encoded: Any) -> Any:
    """`Program.encoded()` as the functions below take it; None where the module is not built."""
    return None if _C is None else _C.LossProgram(*encoded)


def _room(found: Any, tokens: int, grouping: tuple[int, int], wanted: bool, loss: Tensor) -> tuple:
    """Where a loss's results go: see `Results` in csrc/losses.h."""
    scalars = _ONE.new_empty((found.scalars,))
    sequences, list_size = grouping
    groups = sequences // (list_size if found.program.lists else 2)
    rows = _ONE.new_empty((found.rows, groups if found.row_level == GROUP else sequences))
    slopes = _ONE.new_empty((found.which.bit_count(), tokens)) if wanted else None
    return loss, scalars, rows, slopes


def loss(
    logits: Tensor,
    labels: Tensor,
    options: tuple[int, float, float],
    reference: Tensor | None,
    inplace: bool,
    found: Any,
    given: tuple,
    grouping: tuple[int, int],
    wanted: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None, Kept] | None:
    """Runs a compiled loss (`ops.fused_loss._Compiled`): the loss in the dtype, other numbers of the batch, results by
    sequence or group, slopes [k, tokens] if wanted, and what a backward needs.

    None, and nothing was done, for other tensors than plain ones; logits that are not dense are copied once.
    """
    like = _SCALARS.get(dtype)
    if like is None:
        return None
    made, threads = _room(found, labels.numel(), grouping, wanted, torch.empty_like(like)), torch.get_num_threads()
    rest: tuple[Any, ...] = (reference, inplace, found.handle, given, *grouping, made, threads)
    live, kept = _C.loss_forward(logits, labels, options, *rest)
    if live == _UNUSUAL and not inplace:  # a dense copy would hide logits that share memory, which are not written over
        dense = logits.contiguous(), labels.contiguous()
        rest = (None if reference is None else reference.contiguous(), *rest[1:])
        live, kept = _C.loss_forward(*dense, options, *rest)
    if not _done(live, labels, options, logits):
        return None
    return made[0], made[1].unbind(), made[2].unbind(), made[3], kept


def loss_terms(
    statistics: dict[str, Tensor | None],
    labels: Tensor,
    ignore_index: int,
    found: Any,
    given: tuple,
    grouping: tuple[int, int],
    wanted: bool,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], Tensor] | None:
    """The same from statistics of the labels' shape: loss, numbers of the batch, results by sequence or group, and
    slopes."""
    made = _room(found, labels.numel(), grouping, wanted, torch.empty_like(_ONE))
    dense = tuple([None if t is None else t.detach().contiguous() for t in statistics.values()])
    rest = (ignore_index, found.handle, given, *grouping, made, torch.get_num_threads())
    if not _C.loss_terms(dense, labels.contiguous(), *rest):
        return None
    return made[0], made[1].unbind(), made[2].unbind(), made[3]


def loss_backward(
    logits: Tensor,
    labels: Tensor,
    options: tuple[int, float, float],
    reference: Tensor | None,
    kept: Kept,
    upstream: tuple[Tensor, ...],
    slopes: Tensor | None,
    which: int,
    out: Tensor,
) -> bool:
    """Whether the logits' gradient was written into `out`, which is new and dense, given that of the loss or of equally
    long runs of tokens, and the tokens' own slopes for the statistics of the bits `which` (None: 1 for the logps)."""
    rest: tuple[Any, ...] = (kept, upstream, slopes, which, out, torch.get_num_threads())
    live = _C.loss_backward(logits, labels, options, reference, *rest)
    if live == _UNUSUAL:
        dense = logits.contiguous(), labels.contiguous()
        live = _C.loss_backward(*dense, options, None if reference is None else reference.contiguous(), *rest)
    return _done(live, labels, options, logits)


# ------------------------------------------------------------------------------------------------- one launch
def _codes(o: Objective) -> tuple:
    return (KINDS[o.kind], *o[1:4], KL_TERMS[o.kl], *o[5:])


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
) -> Statistics:
    labels = labels.contiguous()
    dense = [None if t is None else t.contiguous() for t in inputs]
    found = new_statistics(labels, want_entropy, ref_logits is not None, options.label_smoothing != 0)
    live = _C.token_objective(
        tokens(logits, labels, ref_logits, ignore_index, temperature, softcap),
        _codes(options),
        tuple(map(_address, dense)),
        tuple(map(_address, (*found, None))),
        out.data_ptr(),
        out.stride(),
    )
    if live < 0:
        raise bad_label(labels, -1 - live, ignore_index, logits.shape[-1])
    return found


def scale(gradient: Tensor, by: Tensor) -> None:
    if by.item() != 1.0:
        gradient.mul_(by)


# ------------------------------------------------------------------------------------------------- advantages
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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
