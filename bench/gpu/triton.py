"""The Triton kernels, compiled ahead of time and simulated: one `Row` for each architecture, dtype and vocabulary."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpu.row import DTYPES, ROWS, VOCABS, Row, limits
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastalign.kernels.triton import objectives_triton, token_stats_triton
from fastalign.ops.call import TokenCall
from fastalign.ops.token_programs import trace_token

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIMULATED = ("sm_80", "sm_90", "sm_100")
KINDS = ("forward", "backward", "objective")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
}
SFT = trace_token(lambda t: -t.logps)


# ------------------------------------------------------------------------------------------------------------- launches
def plan(kind: str, logits: torch.Tensor, labels: torch.Tensor, lanes: int = 32) -> tuple[Any, dict[str, Any]]:
    """(launch, tensors that it fills) of the basic form of a kernel: log-probs and lse, no entropy, KL or mean."""
    call = TokenCall(logits, labels, None, -100, 1.0, 0.0)
    out = torch.empty_like(logits)
    rows = torch.ones(labels.shape)
    if kind == "forward":
        launches, results = token_stats_triton.forward(call, False, False, lanes=lanes)
        return launches[0], {"logps": results[0], "saved": results[5]}
    if kind == "backward":
        saved = torch.zeros(*labels.shape, 4)
        saved[..., 0] = torch.logsumexp(logits.float(), -1)
        grads = (rows, None, None, None, None)
        launches = token_stats_triton.backward(call, saved, None, None, grads, out)
        return launches[0], {"out": out}
    launches, results = objectives_triton.objective(call, SFT, rows, (), False, out, lanes=lanes)
    return launches[0], {"logps": results[0], "out": out}


def signature(launch: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """(types by argument, constexprs) as Triton's compiler wants them."""
    types, constants = {}, {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            pointer = isinstance(value, torch.Tensor)
            types[parameter.name] = f"*{_TYPES[value.dtype]}" if pointer else parameter.annotation_type
    return types, constants


# ----------------------------------------------------------------------------------------------------------- compiling
class Compiled(NamedTuple):
    """What the compiler says of a kernel for one architecture."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    vector_bytes: int
    types: dict[str, str]
    asm: dict[str, Any]
    metadata: Any


_cache: dict[tuple, Compiled] = {}


def compiled(launch: Any, arch: str) -> Compiled:
    """Compiled once for every distinct kernel: vocabularies of one configuration share it."""
    types, constants = signature(launch)
    key = (launch.kernel.__name__, arch, tuple(types.items()), tuple(constants.items()), launch.num_warps)
    if key not in _cache:
        source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs={})
        made = triton.compile(source, target=TARGETS[arch], options={"num_warps": launch.num_warps})
        usage = _cubin_usage(made.asm["cubin"]) if "cubin" in made.asm else _amd_usage(made.asm["amdgcn"])
        assembly = made.asm.get("ptx") or made.asm["amdgcn"]
        writes = launch.arguments.get("out_ptr") is not None
        widest = [_widest(assembly, "load"), *([_widest(assembly, "store")] if writes else [])]
        _cache[key] = Compiled(*usage, made.metadata.shared, min(widest), types, made.asm, made.metadata)
    return _cache[key]


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread, from the machine code's own header."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch memory) a thread, from the metadata at the assembly's end."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]

    return number("vgpr_count"), number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")


_WIDTHS = {
    "load": r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)|(?:global|buffer)_load_dword(?:x(\d))?",
    "store": r"st\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)|(?:global|buffer)_store_dword(?:x(\d))?",
}


def _widest(assembly: str, direction: str) -> int:
    """Bytes of the widest global access a thread makes."""
    found = re.findall(_WIDTHS[direction], assembly)
    return max(int(n or 1) * int(bits) // 8 if bits else 4 * int(dwords or 1) for n, bits, dwords in found)


# ---------------------------------------------------------------------------------------------------------- simulating
@functools.cache
def _simulator() -> Any:
    return importlib.import_module("ptxsim") if importlib.util.find_spec("ptxsim") else None


def simulated(launch: Any, made: Compiled, **options: Any) -> Any:
    """The launch run in the simulator: its statistics; tensors hold what the kernel wrote."""
    kernel = _simulator().TritonKernel.__new__(_simulator().TritonKernel)
    types = {name: kind for name, kind in made.types.items() if kind != "constexpr"}
    kernel.compiled, kernel.num_warps, kernel.metadata = None, launch.num_warps, made.metadata
    kernel.arg_names, kernel.arg_types = list(types), list(types.values())
    kernel.kernel = _simulator().Kernel(made.asm["ptx"], made.metadata.name)
    return kernel.launch(launch.grid, *[launch.arguments[name] for name in types], **options)


def rows(
    simulate: bool,
    *,
    kinds: Sequence[str] = KINDS,
    archs: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = DTYPES,
    vocabs: Sequence[int] = VOCABS,
) -> Iterator[Row]:
    """One row for each kernel, architecture, dtype and vocabulary."""
    for dtype in dtypes:
        for vocab in vocabs:
            draw = torch.Generator().manual_seed(vocab)
            count = ROWS if simulate else 1
            logits = torch.randn(count, vocab, generator=draw).mul_(2).to(getattr(torch, dtype))
            labels = torch.randint(vocab, (count,), generator=draw)
            for kind in kinds:
                for arch in archs:
                    launch, _ = plan(kind, logits, labels, TARGETS[arch].warp_size)
                    yield _row(kind, launch, arch, dtype, vocab, simulate and arch in SIMULATED)


def _row(kind: str, launch: Any, arch: str, dtype: str, vocab: int, simulate: bool) -> Row:
    made = compiled(launch, arch)
    reads = writes = bound = margin = None
    if simulate and _simulator():
        stats = simulated(launch, made)
        reads = stats.read_passes("x_ptr")
        writes = stats.write_passes("out_ptr") if kind != "forward" else stats.write_passes("x_ptr")
        bound, margin = limits(stats)
    if kind == "objective" and not launch.arguments["FITS"]:
        kind = "objective_two_read"
    return Row(
        "triton",
        f"{launch.kernel.__name__}<R={launch.arguments['R']},T={launch.arguments['T']},VEC={launch.arguments['VEC']}>",
        kind,
        arch,
        dtype,
        vocab,
        made.registers,
        made.spill_bytes,
        made.shared_bytes,
        made.vector_bytes,
        reads,
        writes,
        bound,
        margin,
    )
