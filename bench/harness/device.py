"""The device that benchmarks run on: what it is, how its time is taken, and how its memory is counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from harness.interleave import Prepare, Run

_AHEAD = 10_000_000
"""Cycles, some 6 ms: longer than Python takes to queue any of the calls."""
ACCELERATORS = ("cuda", "xpu")  # torch calls AMD's devices cuda too


def automatic() -> str:
    """The accelerator that torch sees, else the CPU."""
    return next((kind for kind in ACCELERATORS if getattr(torch, kind).is_available()), "cpu")


def seconds_of(device: str) -> Callable[[Run, int], float] | None:
    """A function (run, calls) → seconds a call by the device's own events; None where the host's clock will do.

    The device is kept busy until the calls are queued, as it is in a training step: their own time is measured, not how
    fast Python launches. That is `host_seconds`.
    """
    if device not in ACCELERATORS:
        return None
    module = getattr(torch, device)

    def measure(run: Run, calls: int) -> float:
        start, stop = (module.Event(enable_timing=True) for _ in range(2))
        module.synchronize()  # what the preparation left behind is not timed
        if device == "cuda":
            torch.cuda._sleep(_AHEAD)
        start.record()
        for _ in range(calls):
            result = run()
        stop.record()
        module.synchronize()
        del result
        return start.elapsed_time(stop) / 1000 / calls

    return measure


def host_seconds(run: Run, device: str, calls: int = 10) -> float:
    """Seconds of the host that a call takes, the device being left behind: what Python and launches cost."""
    module = getattr(torch, device)
    for _ in range(5):
        run()
    module.synchronize()
    if device == "cuda":
        torch.cuda._sleep(10 * _AHEAD)
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    stop = time.perf_counter()
    module.synchronize()
    del result
    return (stop - start) / calls


def peak_of(prepare: Prepare, device: str, warmup: int = 2) -> int:
    """Bytes that the device's allocated memory rises by at most, over preparing and running once."""
    module = getattr(torch, device)
    for _ in range(warmup):
        prepare()()
        gc.collect()
    module.synchronize()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    result = prepare()()
    module.synchronize()
    peak = module.max_memory_allocated() - before
    del result
    return max(0, peak)


def description(device: str) -> dict[str, object]:
    """Name, memory and versions of the accelerator; {} for the CPU, which the environment describes."""
    if device not in ACCELERATORS:
        return {}
    module = getattr(torch, device)
    properties = module.get_device_properties(0)
    return {
        "name": properties.name,
        "bytes": properties.total_memory,
        "multiprocessors": getattr(properties, "multi_processor_count", None),
        "capability": module.get_device_capability(0) if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def warm_up(device: str, seconds: float = 0.5) -> None:
    """Brings an accelerator's clocks up before the first sample."""
    if device in ACCELERATORS:
        x = torch.ones(1 << 24, device=device)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            x.mul_(1.0)
            getattr(torch, device).synchronize()
