"""The backend of CUDA C++ kernels for NVIDIA devices of compute capability 8.0 and later: calls into `fastalign._cuda`.

The kernels were compiled when the package was built; nothing is compiled at run time. They run on the current stream of
the tensors' device, never wait for it, and can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.divergence_call import DivergenceCall
from ..kernels.token_call import TokenCall
from ..kernels.token_results import new_diagnostics, new_saved, new_statistics
from ._interface import DTYPES, Forward, Statistics, TokenProgram

try:
    from .. import _cuda
except ImportError as error:  # built without an nvcc or a driver, or with FASTALIGN_CUDA=0
    _cuda = None  # type: ignore[assignment]
    absent = importlib.util.find_spec("fastalign._cuda") is None
    _BUILD_ERROR = (
        f"{'fastalign was built without CUDA kernels' if absent else f'fastalign._cuda cannot be imported ({error})'}; "
        "install with nvcc at hand (CUDA_HOME, PATH, or the package nvidia-cuda-nvcc) and FASTALIGN_CUDA=1"
    )
    ARCHITECTURES: tuple[str, ...] = ()
else:
    _BUILD_ERROR = ""
    ARCHITECTURES = tuple(_cuda.architectures.split())
"""What the kernels were compiled for, as sm_90a; compute_90 is PTX, which the driver translates for later devices."""

_LEAST_CAPABILITY = (8, 0)


def unavailable() -> str:
    if _BUILD_ERROR:
        return _BUILD_ERROR
    if not torch.backends.cuda.is_built() or torch.version.hip:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device or no driver"


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a device."""
    number = architecture.partition("_")[2].rstrip("a")
    least = (int(number[:-1]), int(number[-1]))
    if architecture.startswith("compute"):
        return capability >= least
    # Code for sm_90a runs there alone, other code on later devices of the same generation too.
    return capability == least if architecture.endswith("a") else capability[0] == least[0] and capability >= least


@functools.cache
def _without_code(index: int) -> str:
    """Why no kernel runs on a device, "" where they do."""
    capability = torch.cuda.get_device_capability(index)
    got = f"got {capability[0]}.{capability[1]} on cuda:{index}"
    if capability < _LEAST_CAPABILITY:
        return f"serves compute capability 8.0 and later; {got}"
    if any(_runs_on(architecture, capability) for architecture in ARCHITECTURES):
        return ""
    return f"was built for {', '.join(ARCHITECTURES)}; {got}: install again with FASTALIGN_CUDA_ARCHS=all"


def serves(tensor: Tensor, job: str) -> str:
    if job == "divergence":
        return "has no kernel for the divergence of two models' distributions; 'triton' and 'eager' have"
    if tensor.device.type == "cuda" and tensor.dtype in DTYPES[job] and not unavailable():
        return _without_code(tensor.device.index)
    if unavailable():
        return f"is not available: {unavailable()}"
    names = " and ".join(", ".join(str(d).removeprefix("torch.") for d in DTYPES[job]).rsplit(", ", 1))
    return f"serves {names} tensors on cuda; got {tensor.dtype} on {tensor.device}"


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device and current stream of a tensor, as `_cuda` takes them."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(map(_address, tensors))


def _tokens(call: TokenCall, labels: Tensor) -> tuple[Any, ...]:
    """The description of a call, its labels made dense, that `_cuda` takes. Memory freed while it runs is reused on the
    same stream only."""
    logits, _, reference, ignore_index, temperature, softcap = call
    return (
        _DTYPE_CODES[logits.dtype],
        _address(logits),
        tuple(logits.shape),
        logits.stride(),
        _address(reference),
        logits.stride() if reference is None else reference.stride(),
        _address(labels),
        labels.dtype == torch.int64,
        ignore_index,
        temperature,
        softcap,
        0,
    )


def forward(call: TokenCall, want_entropy: bool, want_mean: bool, want_diagnostics: bool = False) -> Forward:
    labels = call.labels.contiguous()
    found = new_statistics(labels, want_entropy, call.reference is not None, want_mean)
    saved = new_saved(found[0])
    more = new_diagnostics(found[0]) if want_diagnostics else ()
    _cuda.token_stats_forward(
        _tokens(call, labels),
        _addresses(*found, saved, *(more or (None, None))),
        *_place(call.logits),
    )
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
    dense = [None if t is None else t.contiguous() for t in (saved, entropy, kl, *grads)]
    _cuda.token_stats_backward(
        _tokens(call, labels),
        _addresses(*dense),
        _address(out),
        out.stride(),
        *_place(call.logits),
    )


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
    saved = new_saved(found[0])
    _cuda.token_objective(
        _tokens(call, labels),
        program.encoded,
        _addresses(*dense),
        _addresses(*found, saved),
        _address(out),
        out.stride(),
        *_place(call.logits),
    )
    return found


# ------------------------------------------------------------------------------------------------- loss programs
_FLOAT, _DOUBLE, _INTEGER = 0, 1, 2  # kinds of results

PROGRAM_TOKENS = 1 << 17
"""Tokens beyond which torch's operations, which fill the device, take the place of a program, which fills one block.
(By estimate: no device has timed it yet.)"""


def loss_program(*encoded: Any) -> Any:
    """`Program.encoded()`, and what its results are, as `loss_terms` takes it; None where it does not fit."""
    return _cuda.loss_program(*encoded)


def _given(x: Any, count: int, device: torch.device) -> tuple[Tensor, tuple[int, bool, bool]] | float | None:
    """What a program is given, as `_cuda` takes it, with the tensor that it lies in; None for what it does not take."""
    if not isinstance(x, Tensor):
        return float(x)
    if x.device != device or x.numel() != count:
        return None
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    same = all(step == 0 for step in x.stride())
    x = x if same else x.contiguous()
    return x, (_address(x), x.dtype == torch.float64, same)


def loss_terms(
    statistics: tuple[Tensor | None, ...],
    labels: Tensor,
    ignore_index: int,
    program: Any,
    given: tuple[Any, ...],
    grouping: tuple[int, int],
    wanted: bool,
    found: list[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], Tensor] | None:
    """Runs a `loss_program` on dense float32 statistics of the labels' shape, in one launch: the formula's results, the
    loss in the dtype (float32 or float64), and derivatives [k, tokens] if wanted. None for what it does not take.

    Args:
        found: of each result, whether it is none (0), a number (1) or a count (2).
    """
    labels, (sequences, list_size) = labels.contiguous(), grouping
    fit: Any = _cuda.loss_sizes(program, labels.numel(), sequences, list_size)
    if fit is None or dtype not in (torch.float32, torch.float64):
        return None
    numbers, counts, counts_given, moved = fit
    inputs = [_given(x, count, labels.device) for x, count in zip(given, counts_given, strict=True)]
    if any(x is None for x in inputs):
        return None
    results: list[Tensor | None] = []
    kinds = []
    for place, (kind, count) in enumerate(zip(found, counts, strict=True)):
        of = torch.int64 if kind == 2 else torch.float32 if place else dtype
        shape = () if count == -2 else (count,)
        results.append(None if kind == 0 else torch.empty(shape, dtype=of, device=labels.device))
        kinds.append(_INTEGER if kind == 2 else _DOUBLE if of == torch.float64 else _FLOAT)
    derivatives = torch.empty((moved if wanted else 0, labels.numel()), dtype=torch.float32, device=labels.device)
    scratch = torch.empty(numbers, dtype=torch.float64, device=labels.device)
    _cuda.loss_terms(
        program,
        (labels.numel(), sequences, list_size),
        (_address(labels), labels.dtype == torch.int64, ignore_index),
        list(_addresses(*statistics)),
        tuple([x[1] if isinstance(x, tuple) else x for x in inputs]),
        [(_address(t), kind) for t, kind in zip(results, kinds, strict=True) if t is not None],
        _address(derivatives) if wanted else 0,
        _address(scratch),
        *_place(labels),
    )
    return results, derivatives


def divergence(
    call: DivergenceCall, g_divergence: Tensor | None, g_logps: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    raise RuntimeError(f"backend 'cuda' {serves(call.labels, 'divergence')}")


def scale(gradient: Tensor, by: Tensor) -> None:
    # By a kernel that looks at `by` on the device: to ask for its value here would stop the host.
    factor = by.to(torch.float32)
    _cuda.scale(_DTYPE_CODES[gradient.dtype], _address(gradient), gradient.numel(), _address(factor), *_place(gradient))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    length = rewards.shape[-1]
    call: Callable[..., None] = _cuda.gae_float64 if rewards.dtype == torch.float64 else _cuda.gae_float32
    call(
        *_addresses(rewards, values, mask, advantages, returns),
        rewards.numel() // length if length else 0,
        length,
        gamma,
        gamma * lam,
        *_place(rewards),
    )
    return advantages, returns
