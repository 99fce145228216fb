"""The CUDA backend's rows of `gpu_static.py`: what the assembler said when the package was built, and, where nvcc and a
PTX simulator are at hand, what the kernels read, write and are bound by."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from gpu.cuda_simulator import SHARED_BYTES, Launch, Simulator
from gpu.row import DTYPES, ROWS, VOCABS, Row, limits

from fastalign._backends import cuda
from fastalign.losses.kl import KL_ESTIMATORS
from fastalign.losses.policy_objectives import KINDS as POLICIES
from fastalign.losses.policy_objectives import Terms
from fastalign.ops.call import TokenCall
from fastalign.ops.token_programs import trace_token

LONGEST = 256000
_MANGLED = {"float32": "If", "bfloat16": "INS_8BFloat16E", "float16": "INS_4HalfE"}
KINDS = {"forward": "forward_kernel", "backward": "backward_kernel", "objective": "objective_kernel"}
_SHORT_VOCAB = 4096


def rows_of(vocab: int) -> int:
    """Rows to simulate: where eight share a block, as many blocks as elsewhere."""
    return 8 * ROWS if vocab <= _SHORT_VOCAB else ROWS


def kernel_of(kind: str, dtype: str, vocab: int) -> tuple[str, str]:
    """(name, what its mangled name ends in) of the plain variant that serves a vocabulary."""
    row_bytes = vocab * getattr(torch, dtype).itemsize
    if cuda._cuda and row_bytes <= cuda._cuda.short_bytes:
        return f"short_{KINDS[kind]}", f"Lb{int(row_bytes <= cuda._cuda.one_tile_bytes)}E"
    return KINDS[kind], ""


def usage(arch: str, kind: str, dtype: str, vocab: int) -> dict[str, int]:
    """Registers, spilled bytes and static shared memory of the plain variant of a kernel, from the build."""
    table = json.loads(cuda._cuda.usage)[arch] if cuda._cuda else {}
    kernel, last = kernel_of(kind, dtype, vocab)
    pattern = rf"\d{kernel}{re.escape(_MANGLED[dtype])}Lb0ELNS_4ModeE0E{last}"
    return next((entry for name, entry in table.items() if re.search(pattern, name)), {})


def _clip(t: Any) -> Any:
    """PPO's loss of a token, with a KL."""
    terms = Terms(t.logps, t.logps - t.old, t.advantages, t.mask, 0.2, 0.2, None)
    return POLICIES["clip"](terms).loss + 0.05 * KL_ESTIMATORS["k3"](t.logps - t.ref)


def _calls(vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """Kind → a function of no arguments that launches it, on tensors of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = rows_of(vocab)
    logits = torch.empty(rows, vocab).normal_(0, 4, generator=generator).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    out, row = torch.empty_like(logits), torch.ones(rows)
    results: list[Any] = []
    call = TokenCall(logits, labels, None, -100, 1.0, 0.0)

    def forward() -> None:
        results[:] = cuda.forward(call, False, False)

    def backward() -> None:
        cuda.backward(call, results[5], None, None, (row, None, None, None, None), out)

    def objective() -> None:
        program = trace_token(_clip, ("old", "advantages", "ref"))
        given = {"old": -row, "advantages": row, "ref": -row}
        inputs = tuple(given[name] for name in program.inputs)
        cuda.objective(call, program, row, inputs, False, out)

    return {"forward": forward, "backward": backward, "objective": objective}


def _row(kind: str, arch: str, dtype: str, vocab: int, launches: list[Launch]) -> Row:
    """Where the objective took two launches, their traffic is added up and the tighter margin stands."""
    two = len(launches) > 1
    known = usage(arch, "backward" if two else kind, dtype, vocab)
    shared = known.get("shared_bytes")
    reads = writes = bound = margin = None
    if launches:
        logits = rows_of(vocab) * vocab * getattr(torch, dtype).itemsize
        sized = [b for launch in launches for b in launch.stats.raw["buffers"] if b["size"] == logits]
        reads, writes = (sum(b[key] for b in sized) / logits for key in ("read_bytes", "write_bytes"))
        bound, margin = min((limits(launch.stats) for launch in launches), key=lambda found: found[1])
        shared = None if shared is None else shared + max(launch.shared for launch in launches)
    name = "objective_two_read" if two else kind
    registers, spills = known.get("registers"), known.get("spill_bytes")
    kernel = "forward_kernel + backward_kernel" if two else kernel_of(kind, dtype, vocab)[0]
    return Row("cuda", kernel, name, arch, dtype, vocab, registers, spills, shared, 16, reads, writes, bound, margin)


def rows(simulate: bool) -> Iterator[Row]:
    nvcc = shutil.which("nvcc")
    for arch in SHARED_BYTES:
        simulator = Simulator(nvcc, arch) if simulate and nvcc else None
        for dtype in DTYPES:
            for vocab in (*VOCABS, LONGEST):
                calls = _calls(vocab, getattr(torch, dtype)) if simulator else dict.fromkeys(KINDS)
                for kind, call in calls.items():
                    launches: list[Launch] = []
                    if simulator:
                        with simulator() as launches, simulator.raising():
                            call()
                    yield _row(kind, arch, dtype, vocab, launches)
