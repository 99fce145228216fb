"""Peak memory of every variant of a case, measured in this process, which has nothing else to do.

    python _memory.py '{"suite": ..., "job": ..., ...}' '{"rows": ..., ...}'

prints {variant: bytes}. Each variant runs twice to warm up (compilation, thread stacks, tables). On the CPU the
kernel's high-water mark of resident memory (VmHWM) is then reset through /proc/self/clear_refs, the variant runs a
last time, preparation and forward pass included, and what the mark rose to beyond the resident memory before it is
the peak beyond the logits: results, gradients, saved tensors and temporaries. The logits themselves were there before.
Needs Linux; elsewhere it prints {}. The kernel counts resident pages in batches: the figure is good to some 0.3 MB.
On an accelerator the same is asked of torch's allocator (`_device.peak_of`), which counts exactly.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import _device
import torch
from _case import Case
from _interleave import Prepare
from _suite import Options

_CLEAR = Path("/proc/self/clear_refs")


_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def _map_large_blocks() -> None:
    """Makes glibc map every block above 128 KiB, and so give it back when freed.

    Left to itself it raises the threshold as blocks are freed, and would serve the measured run from memory that the
    warm-up left behind, unseen. Other C libraries have no such habit and no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_of(prepare: Prepare, warmup: int = 2) -> int:
    """Bytes that resident memory rises by at most, over preparing and running once."""
    for _ in range(warmup):
        prepare()()
        gc.collect()
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    result = prepare()()
    peak = _status("VmHWM") - before
    del result
    return max(0, peak)


def main(case_json: str, options_json: str) -> None:
    case, options = Case(**json.loads(case_json)), Options(**json.loads(options_json))
    accelerated = options.device in _device.ACCELERATORS
    if not accelerated and not _CLEAR.exists():
        print("{}")
        return
    if not accelerated:
        _map_large_blocks()
    torch.set_num_threads(options.threads)
    suite = importlib.import_module(f"bench_{case.suite}").SUITE
    contenders = suite.contenders(case, suite.problem(case, options), options)
    peak = partial(_device.peak_of, device=options.device) if accelerated else peak_of
    print(json.dumps({name: peak(prepare) for name, prepare in contenders.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
