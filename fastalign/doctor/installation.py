"""Whether an installation is sound: `fastalign doctor` without keys.

    fastalign doctor

prints what is installed where, which kernels can run and why others cannot, how near the numbers of each are to
float64's, and how much faster they are than plain PyTorch: what a report of a bug should carry. It needs torch alone
and takes seconds. The exit status is 1 where numbers are not what they must be.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from .._backends import cuda
from ..reference import CASES, Case, Sizes, cast
from ..utils import environment, processors
from ..utils.version import __version__, version_of

PACKAGES = ("numpy", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "liger-kernel", "deepspeed")
LOSSES = ("sft:token", "dpo:sigmoid", "ppo_clip_entropy", "pro")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = (Sizes(batch=3, length=5, vocab=1003), Sizes(batch=2, length=3, vocab=130), Sizes())
MARGIN = 1e-6
"""What an error may be beyond that of the paper's formula in plain PyTorch of the same dtype, both relative."""

TIMED = Sizes(batch=4, length=16, vocab=32_000)
_SECONDS = 0.15  # for each of the two ways that are timed

Inputs = dict[str, Tensor]


# ----------------------------------------------------------------------------------------------------------- what it is
def described() -> Iterator[str]:
    """Versions, place and processors, a line each."""
    built = "" if not cuda.ARCHITECTURES else f", CUDA kernels for {', '.join(cuda.ARCHITECTURES)}"
    yield f"fastalign   {__version__} in {Path(__file__).parents[1]}{built}"
    runtime = torch.version.cuda or torch.version.hip
    runtime = f" (runtime {runtime})" if runtime else ""
    yield f"torch       {torch.__version__}{runtime}, {torch.get_num_threads()} threads"
    yield f"Python      {platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    yield f"system      {platform.platform()}"
    allowed = processors.allowed_processors()
    quota = "" if allowed is None else f", of which this process may use {allowed}"
    yield f"processor   {processors.cpu_model()}, {os.cpu_count()} threads{quota}"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        yield f"GPU {index}       {facts.name}, {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    found = {name: version_of(name) for name in PACKAGES}
    yield f"packages    {', '.join(f'{name} {version}' for name, version in found.items() if version) or 'none'}"
    absent = ", ".join(name for name, version in found.items() if not version)
    yield f"not there   {absent or '-'}"
    yield f"environment {' '.join(f'{name}={value}' for name, value in environment.told().items()) or 'nothing set'}"
    for name, state in _backends.backends().items():
        yield f"backend     {name}: {state}"
    yield f"vectors     {_backends.cpu_isa() or 'not built'} of {', '.join(_backends.cpu_isas()) or 'none'}"


# ---------------------------------------------------------------------------------------------------------- its numbers
def _results(function: Callable[..., Tensor], inputs: Inputs, leaves: tuple[str, ...]) -> list[Tensor]:
    given = {name: t.detach().clone().requires_grad_(name in leaves) for name, t in inputs.items()}
    loss = function(**given)
    return [loss.detach(), *torch.autograd.grad(loss, [given[name] for name in leaves])]


def _error(got: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Norm of the error over the norm of what is right, of the loss and of each gradient."""
    pairs = zip(got, exact, strict=True)
    return torch.stack([(a.double() - b).norm().cpu() / b.norm().cpu().clamp(min=1e-3) for a, b in pairs])


def errors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Root mean square of our errors over the batches, and of the formula's in plain PyTorch."""
    ours, plain = [], []
    for seed, sizes in enumerate(BATCHES * 2):
        inputs = cast(case.inputs(sizes, torch.Generator().manual_seed(seed)), dtype)
        inputs = {name: t.to(device) for name, t in inputs.items()}
        wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        exact = _results(case.reference, wide, case.leaves)
        ours.append(_error(_results(case.fused, inputs, case.leaves), exact))
        plain.append(_error(_results(case.reference, inputs, case.leaves), exact))
    return tuple(torch.stack(e).square().mean(0).sqrt() for e in (ours, plain))  # type: ignore[return-value]


def ways() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, device, arguments of `use_backend`) of all kernels that serve a device of this machine."""
    for isa in _backends.cpu_isas():
        yield f"cpu {isa}", "cpu", {"name": "cpu", "isa": isa}
    yield "eager", "cpu", {"name": "eager"}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        probe = torch.zeros(1, 2, device=accelerator)
        for name, backend in _backends.BACKENDS.items():
            if name != "cpu" and not backend.serves(probe, "tokens"):
                yield f"{name} on {accelerator.type}", accelerator.type, {"name": name}


def checked() -> Iterator[tuple[bool, str]]:
    """(are its numbers right, a line) of each way: the losses of LOSSES and their gradients against float64."""
    cases = {case.name: case for case in CASES}
    for way, device, choice in ways():
        worst, wrong = dict.fromkeys(DTYPES, 0.0), []
        with _backends.use_backend(**choice):
            for name, kind in itertools.product(LOSSES, DTYPES):
                ours, plain = errors(cases[name], DTYPES[kind], device)
                worst[kind] = max(worst[kind], float(ours.max()))
                if not bool((ours <= plain + MARGIN).all()):  # NaN is not
                    wrong.append(f"{name} in {kind}: errors {ours.tolist()}, of plain PyTorch {plain.tolist()}")
        said = ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items())
        yield not wrong, f"numbers     {way}: " + (f"WRONG: {'; '.join(wrong)}" if wrong else f"right ({said})")


# ------------------------------------------------------------------------------------------------------------ its speed
def _time(run: Callable[[], object], device: str) -> float:
    """The shortest of the runs that fit into the time, in seconds; the first is not counted."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    once()
    best, until = once(), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        best = min(best, once())
    return best


def timed() -> Iterator[str]:
    """DPO's loss with its gradient, by the kernels that are chosen here and by the paper's formula in PyTorch."""
    case = next(case for case in CASES if case.name == "dpo:sigmoid")
    given = case.inputs(TIMED, torch.Generator().manual_seed(0))
    rows, vocab = given["labels"].numel(), TIMED.vocab
    for device in dict.fromkeys(device for _, device, _ in ways()):
        for kind, dtype in DTYPES.items():
            inputs = {name: t.to(device) for name, t in cast(given, dtype).items()}
            run = functools.partial(_results, inputs=inputs, leaves=case.leaves)
            ours, plain = (_time(functools.partial(run, f), device) for f in (case.fused, case.reference))
            what = f"{_backends.choose(inputs['logits'])} on {device}, {rows} x {vocab} {kind}"
            yield f"speed       {what}: {1e3 * ours:.2f} ms, plain PyTorch {1e3 * plain:.2f} ms: {plain / ours:.1f}x"


def report() -> int:
    """Prints it all; 1 where numbers are wrong, else 0."""
    start, sound = time.perf_counter(), True
    for line in described():
        print(line)
    for right, line in checked():
        sound &= right
        print(line, flush=True)
    for line in timed():
        print(line, flush=True)
    verdict = "sound" if sound else "NOT SOUND: please report this"
    print(f"result      {verdict} (all of it took {time.perf_counter() - start:.1f} s)")
    return 0 if sound else 1
