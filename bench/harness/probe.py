"""How fast this machine reads and copies memory: the yardsticks of the benchmarks, timed in the same rounds as them.

The compiled module holds a plain SIMD read loop and a copy loop with the same threads as the kernels. Where it is not
built, and on other devices, torch's own sum and copy stand in; `SOURCE` says which, and results record it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import _backends


def _torch_read(tensor: Tensor) -> Tensor:
    # Summed as float32 whatever the dtype: conversions would be timed otherwise. The sum itself means nothing.
    flat = tensor.detach().reshape(-1)
    return flat[: flat.numel() // 2 * 2].view(torch.float32).sum()


def _torch_copy(dst: Tensor, src: Tensor) -> None:
    dst.copy_(src)


SOURCE = "compiled" if _backends.backends()["cpu"] == "available" else "torch"


def probe_read(tensor: Tensor) -> object:
    """Reads every byte of a tensor once and returns a checksum."""
    compiled = SOURCE == "compiled" and tensor.device.type == "cpu"
    return _backends.probe_read(tensor) if compiled else _torch_read(tensor)


def probe_copy(to: Tensor, source: Tensor) -> None:
    """Copies a tensor's bytes into another of the same size."""
    compiled = SOURCE == "compiled" and source.device.type == "cpu"
    (_backends.probe_copy if compiled else _torch_copy)(to, source)
