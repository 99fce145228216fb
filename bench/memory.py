"""Peak memory of every variant of a case, measured in this process, which has nothing else to do.

    python memory.py '{"suite": ..., "job": ..., ...}' '{"rows": ..., ...}'

prints {variant: bytes}. Each variant runs twice to warm up (compilation, thread stacks, tables). On the CPU the
kernel's high-water mark of resident memory (VmHWM) is then reset through /proc/self/clear_refs, the variant runs a
last time, preparation and forward pass included, and what the mark rose to beyond the resident memory before it is
the peak beyond the logits: results, gradients, saved tensors and temporaries. The logits themselves were there before.
Needs Linux; elsewhere it prints {}.
On an accelerator torch's allocator is asked instead (`_device.peak_of`), in the process that measures time.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys

import torch
from harness.case import Case
from harness.interleave import Prepare
from harness.suite import Options

from fastalign.trainers.common import resident
from fastalign.trainers.common.allocator import map_large_blocks

ABOVE = 128 << 10
"""Larger blocks are mapped: the measured run would else be served from what the warm-up left behind, unseen."""


def peak_of(prepare: Prepare, warmup: int = 2) -> int:
    """Bytes that resident memory rises by at most, over preparing and running once."""
    for _ in range(warmup):
        prepare()()
        gc.collect()
    resident.reset_peak()
    before = resident.resident()
    result = prepare()()
    peak = resident.peak() - before
    del result
    return max(0, peak)


def main(case_json: str, options_json: str) -> None:
    case, options = Case(**json.loads(case_json)), Options(**json.loads(options_json))
    if not resident.measurable():
        print("{}")
        return
    map_large_blocks(ABOVE)
    torch.set_num_threads(options.threads)
    suite = importlib.import_module(f"bench_{case.suite}").SUITE
    contenders = suite.contenders(case, suite.problem(case, options), options)
    print(json.dumps({name: peak_of(prepare) for name, prepare in contenders.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
