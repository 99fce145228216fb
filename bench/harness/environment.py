"""Where and with what results were taken: machine, versions, commit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from harness import device as _device
from harness.probe import SOURCE
from harness.suite import Options

from fastalign import _backends
from fastalign.study.machine import machine

_PACKAGES = ("fastalign", "torch", "trl", "numpy", "pytest-benchmark", "triton", "liger-kernel", "quack-kernels")


def environment(options: Options) -> dict[str, Any]:
    """The results file's `environment`."""
    return {
        **machine(_PACKAGES),
        "isa": _backends.cpu_isa(),
        "backend": _backends.choose(torch.empty(0, device=options.device)),
        "device": options.device,
        "accelerator": _device.description(options.device),
        "threads": options.threads,
        "probe": SOURCE if options.device == "cpu" else "torch",
        "options": asdict(options),
    }
