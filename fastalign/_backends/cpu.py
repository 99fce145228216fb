"""The backend of compiled SIMD kernels for float32, bfloat16 and float16 CPU tensors: calls into `fastalign._C`."""

from __future__ import annotations

import os

# torch is imported first: the compiled module takes its OpenMP runtime from the process, and that must be torch's.
import torch
from torch import Tensor

from ..kernels.token_results import SAVED, new_saved, new_statistics
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


def saved_tensor(saved: Kept, labels: Tensor) -> Tensor:
    """[..., SAVED], as `forward` returns it, if these are its labels."""
    rows = torch.frombuffer(bytearray(saved), dtype=torch.float32) if saved else _ONE.new_empty(0)
    return rows.view(*labels.shape, SAVED) if rows.numel() == SAVED * labels.numel() else rows


def logps(
    logits: Tensor, labels: Tensor, options: tuple[int, float, float], inplace: bool
) -> tuple[Tensor, Tensor, Kept] | None:
    """logps, lse and what the backward needs; None, and nothing was done, for other tensors than such."""
    found, lse = torch.empty_like(labels, dtype=torch.float32), torch.empty_like(labels, dtype=torch.float32)
    live, saved = _C.logps_forward(logits, labels, options, inplace, found, lse, torch.get_num_threads())
    return (found, lse, saved) if _done(live, labels, options, logits) else None


def sums(
    logits: Tensor, labels: Tensor, options: tuple[int, float, float], inplace: bool, parts: int
) -> tuple[tuple[Tensor, ...], Kept] | None:
    """Sums of logps over all but the first dimension, in parts of equally many each, and what the backward needs."""
    count, rest = divmod(labels.shape[0], parts)
    if rest:
        return None
    found = tuple(_ONE.new_empty((count,)) for _ in range(parts))
    live, saved = _C.sums_forward(logits, labels, options, inplace, found, torch.get_num_threads())
    return (found, saved) if _done(live, labels, options, logits) else None


def logps_backward(
    logits: Tensor,
    labels: Tensor,
    saved: Kept,
    gradients: tuple[Tensor, ...],
    options: tuple[int, float, float],
    out: Tensor,
) -> bool:
    """Whether the gradient of the logits was written, given that of the log-probabilities, or, in one or more parts,
    that of their sums over equally many labels each."""
    live = _C.logps_backward(logits, labels, options, saved, gradients, out, torch.get_num_threads())
    return _done(live, labels, options, logits)


# A scalar like one that is there already is made in half the time.
_SCALARS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in _DTYPE_CODES}
_ONE = _SCALARS[torch.float32]


def mean_nll(
    logits: Tensor,
    labels: Tensor,
    count: int,
    least: int,
    options: tuple[int, float, float],
    inplace: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Kept, int] | None:
    """-sum(logps) / count, a scalar of the dtype; what the backward needs; and how many labels are not ignored.

    None, and nothing was done, for other tensors than plain, checked ones.

    Args:
        count: 0: that number, taken as `least` at least; where it is 0 the mean is NaN.
    """
    like = _SCALARS.get(dtype)
    if like is None:
        return None
    loss, threads = torch.empty_like(like), torch.get_num_threads()
    live, saved = _C.mean_nll_forward(logits, labels, options, inplace, loss, count, least, threads)
    if live == _UNUSUAL and not inplace:  # a dense copy would hide logits that share memory, which are not written over
        dense = logits.contiguous(), labels.contiguous()
        live, saved = _C.mean_nll_forward(*dense, options, inplace, loss, count, least, threads)
    return (loss, saved, live) if _done(live, labels, options, logits) else None


def mean_nll_backward(
    logits: Tensor,
    labels: Tensor,
    saved: Kept,
    gradient: Tensor,
    count: int,
    options: tuple[int, float, float],
    out: Tensor,
) -> bool:
    """Whether the gradient of the logits was written, given that of the loss and what it was divided by."""
    threads = torch.get_num_threads()
    live = _C.mean_nll_backward(logits, labels, options, saved, gradient, count, out, threads)
    if live == _UNUSUAL:
        dense = logits.contiguous(), labels.contiguous()
        live = _C.mean_nll_backward(*dense, options, saved, gradient, count, out, threads)
    return _done(live, labels, options, logits)


def pair_loss(
    logits: Tensor,
    labels: Tensor,
    references: tuple[Tensor, ...],
    loss: tuple[float, float, float],
    options: tuple[int, float, float],
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Kept] | None:
    """(loss, results, slopes, saved) of a loss of pairs, see kernels/pair_loss_cpu.h: the mean; rewards of both sides,
    margins, accuracies and sums of both sides, [6, B]; the mean's gradient for the sums, [2B]; and what a backward
    needs. None, and nothing was done, for other tensors than plain ones.

    Args:
        references: none, or those of the chosen and of the rejected.
        loss: beta, and the weights of -log sigmoid(z) and -log sigmoid(-z).
    """
    pairs = labels.shape[0] // 2
    made = (torch.empty_like(_ONE), _ONE.new_empty((6, pairs)), _ONE.new_empty((2 * pairs,)))
    threads = torch.get_num_threads()
    live, saved = _C.pair_loss_forward(logits, labels, options, inplace, references, loss, pairs, made, threads)
    return (*made, saved) if _done(live, labels, options, logits) else None


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    objective: Objective,
    over: float,
    options: tuple[int, float, float],
    inplace: bool,
) -> tuple[Tensor, Tensor, Kept] | None:
    """(results, slopes, saved) of a policy objective, see kernels/policy_loss_cpu.h: loss, policy term, KL, approximate
    KL to the old policy, share that was cut, mean ratio, [6]; the loss's gradient for each log-probability, flat; and
    what a backward needs. None, and nothing was done, for other tensors than plain ones, float32 beside the logits.

    Args:
        inputs: old_logps and advantages (of tokens, or one for all of the last dimension's), and ref_logps or None.
        over: what the losses are divided by; 0: the number of tokens.
    """
    made = (_ONE.new_empty((6,)), _ONE.new_empty((labels.numel(),)))
    threads = torch.get_num_threads()
    live, saved = _C.policy_loss_forward(
        logits, labels, options, inplace, inputs, _codes(objective), over, made, threads
    )
    return (*made, saved) if _done(live, labels, options, logits) else None


def list_loss(
    logits: Tensor,
    labels: Tensor,
    size: int,
    loss: tuple[bool, bool, bool, float],
    options: tuple[int, float, float],
    inplace: bool,
) -> tuple[Tensor, Tensor, Kept] | None:
    """(results, slopes, saved) of a loss of ranked lists, see kernels/list_loss_cpu.h: loss, ranking term, supervised
    term, accuracy, top-1 accuracy, margin, [6]; the loss's gradient for each response's sum, flat; and what a backward
    needs. None, and nothing was done, for other tensors than plain ones, and where a response is hidden.

    Args:
        size: responses of a list.
        loss: whether the first term counts alone, whether scores are means, whether the supervised term takes a mean,
            and its weight.
    """
    made = (_ONE.new_empty((6,)), _ONE.new_empty((labels.numel() // max(labels.shape[-1], 1),)))
    threads = torch.get_num_threads()
    live, saved = _C.list_loss_forward(logits, labels, options, inplace, size, loss, made, threads)
    return (*made, saved) if _done(live, labels, options, logits) else None


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
