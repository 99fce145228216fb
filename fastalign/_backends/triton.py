"""The backend of Triton kernels for float32, bfloat16 and float16 tensors on GPUs (NVIDIA, AMD, Intel).

With TRITON_INTERPRET=1 Triton runs kernels in Python, and then the backend serves CPU tensors, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.divergence_call import DivergenceCall
from ..kernels.token_call import TokenCall
from ..utils import environment
from ._interface import DTYPES, Forward, Statistics, TokenProgram, check_labels

DEVICES = ("cuda", "xpu")  # torch calls AMD's devices cuda too


@functools.cache
def _missing() -> str:
    installed = importlib.util.find_spec("triton") is not None
    return "" if installed else "the package triton is not installed; install it with `pip install triton`"


def _interpreted() -> bool:
    return environment.triton_interprets()


def unavailable() -> str:
    if _missing() or _interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
        return _missing()
    return "torch sees no CUDA, ROCm or XPU device (and TRITON_INTERPRET=1 is not set)"


def serves(tensor: Tensor, job: str) -> str:
    kind = tensor.device.type
    known = kind in DEVICES or (kind == "cpu" and _interpreted())
    if known and tensor.dtype in DTYPES[job] and not _missing():
        return ""
    if _missing():
        return f"is not available: {_missing()}"
    names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES[job])
    return f"serves {names} tensors on {' or '.join(DEVICES)}; got {tensor.dtype} on {tensor.device}"


@functools.cache
def _kernels() -> Any:
    """The kernels' modules, imported at the first call: Triton takes a second."""
    from ..kernels.triton import gae_triton, objectives_triton, token_stats_triton

    return token_stats_triton, objectives_triton, gae_triton


def _run(launches: Iterable[Any], device: torch.device) -> None:
    """On the device's current stream."""
    current = torch.get_device_module(device).device(device) if device.type in DEVICES else contextlib.nullcontext()
    with current:
        for launch in launches:
            launch.run()


def forward(call: TokenCall, want_entropy: bool, want_mean: bool, want_diagnostics: bool = False) -> Forward:
    check_labels(call.labels, call.ignore_index, call.logits.shape[-1])
    launches, results = _kernels()[0].forward(call, want_entropy, want_mean, want_diagnostics)
    _run(launches, call.logits.device)
    return results


def backward(
    call: TokenCall,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    out: Tensor,
) -> None:
    check_labels(call.labels, call.ignore_index, call.logits.shape[-1])
    launches = _kernels()[0].backward(call, saved, entropy, kl, grads, out)
    _run(launches, call.logits.device)


def objective(
    call: TokenCall,
    program: TokenProgram,
    weight: Tensor,
    inputs: tuple[Tensor, ...],
    want_entropy: bool,
    out: Tensor,
) -> Statistics:
    check_labels(call.labels, call.ignore_index, call.logits.shape[-1])
    launches, results = _kernels()[1].objective(call, program, weight, inputs, want_entropy, out)
    _run(launches, call.logits.device)
    return results


def divergence(
    call: DivergenceCall, g_divergence: Tensor | None, g_logps: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    from ..kernels.triton import divergence_triton

    launches, results = divergence_triton.divergence(call, g_divergence, g_logps, out)
    _run(launches, call.labels.device)
    return results


def scale(gradient: Tensor, by: Tensor) -> None:
    if not gradient.is_contiguous():
        gradient.mul_(by)
    else:
        _run([_kernels()[1].scale(gradient, by)], gradient.device)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    launches, results = _kernels()[2].gae(rewards, values, mask, gamma, lam)
    _run(launches, rewards.device)
    return results
