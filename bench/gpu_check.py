"""Checks for whoever has an NVIDIA GPU: numbers, CUDA graphs, and NVIDIA's own memory and race checkers.

    python bench/gpu_check.py                    # everything that `--only` lists: numbers against float64, graphs, ...
    python bench/gpu_check.py --sanitize         # numbers, options and gae under compute-sanitizer's four tools
    python bench/gpu_check.py --backend triton   # another backend

compute-sanitizer comes with the CUDA toolkit. A tool that finds something prints it and fails the run. What is captured
in a graph must not wait for the device: a kernel that did would make the capture fail.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
from gpu.checks import CHECKS, DTYPES, compare
from torch import Tensor

import fastalign as fa
from fastalign import Objective, token_objective

DEVICE = "cuda"
SANITIZED = ("numbers", "options", "gae")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
VOCABS = (1, 7, 1000, 32000, 50257, 128256, 256000)


def both(x: Tensor, labels: Tensor, weight: Tensor) -> list[Tensor]:
    """Statistics, two-step gradient and one-launch gradient of rows of logits."""
    leaf = x.detach().clone().requires_grad_()
    stats = fa.token_stats(leaf, labels, entropy=True)
    (gradient,) = torch.autograd.grad((-stats.logps * weight).sum(), leaf)
    results = [stats.logps.detach(), stats.lse.detach(), gradient]
    if x.dtype != torch.float64:
        results.append(token_objective(x, labels, weight, Objective("sft"))[1])
    return results


def inputs(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    flat = torch.empty(rows * vocab + 1, device=DEVICE).normal_(0, 3, generator=generator).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator, device=DEVICE)
    labels[rows // 2] = -100
    return flat[1:].view(rows, vocab), labels, torch.rand(rows, generator=generator, device=DEVICE)


def check_numbers(backend: str) -> str:
    for dtype, vocab in itertools.product(DTYPES, VOCABS):
        x, labels, weight = inputs(5, vocab, dtype)
        with fa.use_backend("eager"):
            exact = both(x.double(), labels, weight.double())
            plain = both_by_eager(x, labels, weight)
        with fa.use_backend(backend):
            ours = both(x, labels, weight)
        compare(f"{dtype}, vocabulary {vocab}", [*exact, exact[-1]], [*plain, plain[-1]], ours)
    return f"right for {len(DTYPES) * len(VOCABS)} cases"


def both_by_eager(x: Tensor, labels: Tensor, weight: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    stats = fa.token_stats(leaf, labels)
    (gradient,) = torch.autograd.grad((-stats.logps * weight).sum(), leaf)
    return [stats.logps.detach(), stats.lse.detach(), gradient]


def check_graph(backend: str) -> str:
    """Captures one call, changes what its tensors hold, and replays it."""
    x, labels, weight = inputs(64, 50257, torch.bfloat16)
    with fa.use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first call outside, as torch asks for
            both(x, labels, weight)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both(x, labels, weight)
        for tensor, new in zip((x, labels, weight), inputs(64, 50257, torch.bfloat16, seed=1), strict=True):
            tensor.copy_(new)
        graph.replay()
        expected = both(x, labels, weight)
    if not all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True)):
        raise SystemExit("a replayed graph gave other numbers than a plain call")
    return "captured and replayed, the same to the last bit"


def sanitize(backend: str) -> None:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        raise SystemExit("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    for tool in TOOLS:
        command = [checker, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "--backend", backend]
        command += ["--only", *SANITIZED]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


def main() -> None:
    checks: dict[str, Callable[[str], str]] = {"numbers": check_numbers, "graph": check_graph}
    checks |= {name: partial(check, DEVICE) for name, check in CHECKS.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--only", choices=checks, nargs="+", help="these checks alone")
    parser.add_argument("--sanitize", action="store_true", help="run numbers and options under compute-sanitizer")
    options = parser.parse_args()
    reason = fa.backends()[options.backend]
    if reason != "available":
        raise SystemExit(f"backend {options.backend!r} is not available: {reason}")
    if options.sanitize:
        sanitize(options.backend)
        return
    failed: list[str] = []
    for name in options.only or checks:
        start = time.perf_counter()
        try:
            shown = checks[name](options.backend)
        except (SystemExit, Exception) as error:  # the others are worth knowing too
            failed.append(name)
            shown = f"FAILED: {error!r}"
            if not isinstance(error, SystemExit):
                traceback.print_exc()
        print(f"{options.backend} {name}: {shown} ({time.perf_counter() - start:.1f} s)", flush=True)
    if failed:
        raise SystemExit(f"{options.backend}: failed {', '.join(failed)}")


if __name__ == "__main__":
    main()
