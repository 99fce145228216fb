"""The backend of compiled SIMD kernels for float32, bfloat16 and float16 CPU tensors: calls into `fastalign._C`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

# torch is imported first: the compiled module takes its OpenMP runtime from the process, and that must be torch's.
import torch
from torch import Tensor

from ..kernels.divergence_call import DivergenceCall
from ..kernels.token_call import TokenCall
from ..kernels.token_results import new_diagnostics, new_saved, new_statistics
from ..utils import environment
from ._interface import DTYPES, Forward, Statistics, TokenProgram, bad_label


def _new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


try:
    from .. import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None  # type: ignore[assignment]
    _C_ERROR = f"the compiled module fastalign._C cannot be imported ({error}); install with `pip install .`"
else:
    _C_ERROR, _UNUSUAL = "", _C.UNUSUAL
    _SEEN = (Tensor, (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.float64))
    SEES_BATCHES = _C.learn_tensors(*_SEEN, False, _new_tensor)
    """Whether a tensor that has no memory of its own, as a transform's batch, is seen not to be a plain one."""


def unavailable() -> str:
    return _C_ERROR


def serves(tensor: Tensor, job: str) -> str:
    if _C is not None and tensor.is_cpu and tensor.dtype in DTYPES[job]:
        return ""
    if _C is None:
        return f"is not available: {_C_ERROR}"
    names = " and ".join(", ".join(str(d).removeprefix("torch.") for d in DTYPES[job]).rsplit(", ", 1))
    return f"serves {names} tensors on cpu; got {tensor.dtype} on {tensor.device}"


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this build holds and this processor can run, best first."""
    return () if _C is None else _C.ISAS


def _default_isa() -> int:
    names, wanted = cpu_isas(), environment.CPU_ISA
    if wanted is not None and names and wanted not in names:
        environment.refuse(f"FASTALIGN_CPU_ISA must be one of {', '.join(names)} on this processor; got {wanted!r}")
    return names.index(wanted) if wanted in names else 0


_DEFAULT_ISA = _default_isa()
_isa: ContextVar[int] = ContextVar("fastalign_cpu_isa", default=_DEFAULT_ISA)
"""Position in `cpu_isas()` of what this thread or asyncio task runs; the compiled module reads it with every call."""
if _C is not None:
    _C.follow_isa(_isa)


def cpu_isa() -> str | None:
    """Instruction set that the `cpu` backend runs in this thread or asyncio task: "avx512_bf16", "avx512", "avx2",
    "neon" or "portable"; None where it is not built.

    The best one that the processor has, unless `use_backend` or FASTALIGN_CPU_ISA in the environment names another.
    """
    return None if _C is None else cpu_isas()[_isa.get()]


def set_isa(name: str) -> None:
    """Runs the named instruction set from now on in this thread or asyncio task.

    Raises:
        ValueError: one that `cpu_isas` does not list.
    """
    names = cpu_isas()
    if name not in names:
        raise ValueError(f"isa must be one of {', '.join(names)} on this processor; got {name!r}")
    _isa.set(names.index(name))


# ------------------------------------------------------------------------------------------------ token statistics
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RESULTS = {**_DTYPE_CODES, torch.float64: 5}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def tokens(call: TokenCall, labels: Tensor) -> tuple[Any, ...]:
    """The description of a call that `_C` takes; its tensors, and its labels made dense, must outlive it."""
    logits, _, reference, ignore_index, temperature, softcap = call
    return (
        _DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        tuple(logits.shape),
        logits.stride(),
        _address(reference),
        logits.stride() if reference is None else reference.stride(),
        labels.data_ptr(),
        labels.dtype == torch.int64,
        ignore_index,
        temperature,
        softcap,
        torch.get_num_threads(),
    )


def forward(call: TokenCall, want_entropy: bool, want_mean: bool, want_diagnostics: bool = False) -> Forward:
    labels = call.labels.contiguous()
    found = new_statistics(labels, want_entropy, call.reference is not None, want_mean)
    saved = new_saved(found[0])
    more = new_diagnostics(found[0]) if want_diagnostics else ()
    valid = _C.token_stats_forward(
        tokens(call, labels),
        tuple(map(_address, (*found, saved, *(more or (None, None))))),
    )
    if valid < 0:
        raise bad_label(labels, -1 - valid, call.ignore_index, call.logits.shape[-1])
    return (*found, saved, *more)


def backward(
    call: TokenCall,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    out: Tensor,
) -> None:
    labels = call.labels.contiguous()
    dense = [None if t is None else t.contiguous() for t in (saved, entropy, kl, *grads)]  # kept until the call is over
    valid = _C.token_stats_backward(
        tokens(call, labels),
        tuple(map(_address, dense)),
        out.data_ptr(),
        out.stride(),
    )
    if valid < 0:
        raise bad_label(labels, -1 - valid, call.ignore_index, call.logits.shape[-1])


# ------------------------------------------------------------------------------------------------- directly
# These compiled functions look at the tensors themselves, in a fraction of the time that it takes to do so here, make
# the results, and do nothing where the tensors are not plain ones such as the kernels take as they are. `options` are
# ignore_index, temperature, softcap; `inplace`: the gradient is to be written over the logits, which must not share
# memory with each other. What a backward needs is bytes, which are made in a third of a tensor's time; `kept_rows`
# makes tensors of it.
Kept = bytes


def _done(valid: int, labels: Tensor, options: tuple[int, float, float], logits: Tensor) -> bool:
    """Whether the work was done; ValueError for a bad label."""
    if valid < 0 and valid != _UNUSUAL:
        raise bad_label(labels, -1 - valid, options[0], logits.shape[-1])
    return valid >= 0


def kept_rows(
    kept: Kept, labels: Tensor, which: int = 0
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor | None]:
    """(saved, entropy, kl) as `forward` returns them, and derivatives [k, tokens], of what a call kept.

    `which`: bits of the statistics, in `ops.programs.STATISTICS`, that there are derivatives for; 0: none were kept.
    """
    numbers = torch.frombuffer(bytearray(kept), dtype=torch.float32) if kept else _ONE.new_empty(0)
    parts = 4 + bool(which & 4) + bool(which & 8) + which.bit_count()
    tokens = numbers.numel() // parts
    of_labels = tokens == labels.numel()  # a hook may have changed them: the checks of the backward then say so
    rows = numbers[4 * tokens :].view(parts - 4, tokens)
    saved = numbers[: 4 * tokens].view(*(labels.shape if of_labels else (tokens,)), 4)
    found = [row.view(labels.shape) if of_labels else row for row in rows[: parts - 4 - which.bit_count()]]
    entropy, kl = found.pop(0) if which & 4 else None, found.pop(0) if which & 8 else None
    return (saved, entropy, kl), rows[-which.bit_count() :] if which else None


def logps(
    logits: Tensor, labels: Tensor, options: tuple[int, float, float], inplace: bool
) -> tuple[Tensor, Tensor, Kept] | None:
    """logps, lse and what the backward needs; None, and nothing was done, for other tensors than such."""
    valid, *found = _C.logps_forward(logits, labels, options, inplace, torch.get_num_threads())
    return tuple(found) if _done(valid, labels, options, logits) else None


_ONE = torch.zeros((), dtype=torch.float32, device="cpu")


def loss_program(*encoded: Any) -> Any:
    """`Program.encoded()` as the functions below take it; None where the module is not built."""
    return None if _C is None else _C.loss_program(*encoded)


def _as_given(x: Any) -> Any:
    """What a program is given, as it takes it: dense, of float32 or float64."""
    if not isinstance(x, Tensor):
        return x
    return (x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()).contiguous()


def loss(
    logits: Tensor,
    labels: Tensor,
    options: tuple[int, float, float],
    reference: Tensor | None,
    inplace: bool,
    program: Any,
    given: tuple,
    grouping: tuple[int, int],
    wanted: bool,
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], Kept] | None:
    """Runs a `loss_program`: the formula's results, the loss in the dtype, and what a backward needs if one is wanted.

    None, and nothing was done, for other tensors than plain ones; those that are not dense are copied once.
    """
    code, threads = _RESULTS.get(dtype), torch.get_num_threads()
    if code is None:
        return None
    sequences, list_size = grouping
    valid, kept, results = _C.loss_forward(
        logits, labels, options, reference, inplace, program, given, sequences, list_size, wanted, code, threads
    )
    if valid >= 0:
        return results, kept
    if valid == _UNUSUAL and not inplace:  # a dense copy would hide logits that share memory: they are not written over
        dense, given = (logits.contiguous(), labels.contiguous()), tuple([_as_given(x) for x in given])
        reference = None if reference is None else reference.contiguous()
        rest: tuple[Any, ...] = (program, given, sequences, list_size, wanted, code, threads)
        valid, kept, results = _C.loss_forward(*dense, options, reference, inplace, *rest)
    return (results, kept) if _done(valid, labels, options, logits) else None


def loss_terms(
    statistics: tuple[Tensor | None, ...],
    labels: Tensor,
    ignore_index: int,
    program: Any,
    given: tuple,
    grouping: tuple[int, int],
    wanted: bool,
) -> tuple[list[Tensor | None], Tensor] | None:
    """The same from statistics of the labels' shape: the results, and derivatives [k, tokens] if wanted."""
    labels, threads = labels.contiguous(), torch.get_num_threads()
    rest = (*grouping, wanted, threads)
    results, derivatives = _C.loss_terms(statistics, labels, ignore_index, program, given, *rest)
    if results is None:
        given = tuple([_as_given(x) for x in given])
        results, derivatives = _C.loss_terms(statistics, labels, ignore_index, program, given, *rest)
    return None if results is None else (results, derivatives)


def loss_backward(
    logits: Tensor,
    labels: Tensor,
    options: tuple[int, float, float],
    reference: Tensor | None,
    kept: Kept,
    upstream: tuple[Tensor, ...],
    which: int,
    out: Tensor,
) -> bool:
    """Whether the logits' gradient was written into `out`, which is new and dense, given that of the loss or of equally
    long runs of tokens; nothing was done for other tensors than plain ones.

    Args:
        which: bits of the statistics whose derivatives were kept; 0: the logps, whose slope is 1.
    """
    threads = torch.get_num_threads()
    valid = _C.loss_backward(logits, labels, options, reference, kept, upstream, which, out, threads)
    if valid == _UNUSUAL:
        dense, upstream = (logits.contiguous(), labels.contiguous()), tuple([g.contiguous() for g in upstream])
        reference = None if reference is None else reference.contiguous()
        valid = _C.loss_backward(*dense, options, reference, kept, upstream, which, out, threads)
    return valid >= 0 or _done(valid, labels, options, logits)


# ------------------------------------------------------------------------------------------------- one launch
def objective(
    call: TokenCall,
    program: TokenProgram,
    weight: Tensor,
    inputs: tuple[Tensor, ...],
    want_entropy: bool,
    out: Tensor,
) -> Statistics:
    labels = call.labels.contiguous()
    dense = [t.contiguous() for t in (weight, *inputs)]
    found = new_statistics(labels, want_entropy, call.reference is not None, program.uses[4])
    valid = _C.token_objective(
        tokens(call, labels),
        program.encoded,
        tuple(map(_address, dense)),
        tuple(map(_address, (*found, None))),
        out.data_ptr(),
        out.stride(),
    )
    if valid < 0:
        raise bad_label(labels, -1 - valid, call.ignore_index, call.logits.shape[-1])
    return found


def scale(gradient: Tensor, by: Tensor) -> None:
    if by.item() != 1.0:
        gradient.mul_(by)


# ------------------------------------------------------------------------------------------------- two models
def divergence(
    call: DivergenceCall, g_divergence: Tensor | None, g_logps: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    student, teacher, labels, mixture = call
    found = torch.empty((2, *labels.shape), dtype=torch.float32)
    per_row = (labels, *found, g_divergence, g_logps)
    ours, theirs = ((_address(s.logits), s.logits.stride(0), _address(s.scale), s.softcap) for s in (student, teacher))
    _C.divergence(
        _DTYPE_CODES[student.logits.dtype],
        ours,
        theirs,
        list(student.logits.shape),
        [*mixture, mixture.difference],
        tuple(map(_address, per_row)),
        _address(out),
        0 if out is None else out.stride(0),
        torch.get_num_threads(),
    )
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------- products
def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total [m, n] (+)= a [m, k] @ b [k, n]: float32, dense columns, and factors of any of the kernels' dtypes."""
    _C.gemm(
        (a.data_ptr(), _DTYPE_CODES[a.dtype], *a.stride()),
        (b.data_ptr(), _DTYPE_CODES[b.dtype], *b.stride()),
        total.data_ptr(),
        total.stride(0),
        [*total.shape, a.shape[1]],
        not first,
        torch.get_num_threads(),
    )


# ------------------------------------------------------------------------------------------------- advantages
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    length = rewards.shape[-1]
    _C.gae(
        rewards.dtype == torch.float64,
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
    return _C.probe(0, tensor.data_ptr(), tensor.numel() * tensor.element_size(), torch.get_num_threads())


def probe_copy(to: Tensor, source: Tensor) -> None:
    """Copies a contiguous CPU tensor with streaming stores over torch's threads: the machine's copy rate."""
    _C.probe(to.data_ptr(), source.data_ptr(), source.numel() * source.element_size(), torch.get_num_threads())
