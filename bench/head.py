"""A loss from hidden states, forward and backward: the fused head, its peers and the bare GEMMs.

    python bench/head.py [--objective dpo|sft|pro|ppo_kl] [--tokens 512] [--vocab 128256] [--hidden 1024]
                         [--dtype bfloat16] [--pairs 2] [--rounds 5] [--device cpu|cuda] [--json OUT]

All variants run interleaved, each once a round. `bare GEMMs` are the policy's logits, the reference's where there is
one (dpo, ppo_kl), and the two gradients, formed and thrown away; `frozen` leaves the weight's gradient out. Peak memory
beyond the inputs is measured in a fresh process for each variant (on a GPU: by torch's allocator). Errors are those of
the gradients in the Euclidean norm, relative to float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import device as _device
from harness.case import Case
from harness.environment import environment
from harness.head_objectives import BETA, OBJECTIVES, Gradients, Inputs, Shape
from harness.interleave import interleave, ratio, summary
from harness.suite import Options, peer_ratios
from memory import ABOVE, peak_of
from report import duration
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa
from fastalign.trainers.common import resident
from fastalign.trainers.common.allocator import map_large_blocks

TILE = 64 << 20


def gemms(x: Inputs, frozen: bool) -> None:
    hidden, ref_hidden = x.hidden.flatten(0, 1), x.ref_hidden.flatten(0, 1)
    logits = hidden @ x.weight.t()
    if OBJECTIVES[x.shape.objective].reference:
        torch.mm(ref_hidden, x.ref_weight.t())
    torch.mm(logits, x.weight)
    if not frozen:
        torch.mm(logits.t(), hidden)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> Gradients:
    return torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])


def fused(x: Inputs, frozen: bool, labels: Tensor, **choice: Any) -> Gradients:
    leaves = x.leaves(frozen)
    reference = fa.Head(x.ref_hidden, x.ref_weight, **choice)
    loss = OBJECTIVES[x.shape.objective].fused(x, fa.Head(*leaves, **choice), labels, reference)
    return _gradients(loss, leaves)


def _linear_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager(x: Inputs, function: Callable[..., Tensor] | None = None) -> Gradients:
    leaves = x.leaves(False)
    objective = OBJECTIVES[x.shape.objective]
    return _gradients(objective.over(function or _linear_logps, x, *leaves), leaves)


def _wide_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As training loops do that want the right gradient: a softmax in 16 bits is off by percents of it."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def trl(x: Inputs) -> Gradients:
    from trl.kernels import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        flat = (hidden.flatten(0, 1), weight, None, labels.flatten(), 1.0, 32768, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*flat)[0].view(labels.shape)

    return eager(x, logps)


def _liger() -> Callable[[Inputs], Gradients]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, compiled=True)

    def run(x: Inputs) -> Gradients:
        leaves = x.leaves(False)
        return _gradients(module(leaves[1], leaves[0], x.labels, None, x.ref_hidden, x.ref_weight)[0], leaves)

    return run


def _compiled() -> Callable[[Inputs], Gradients]:
    function = torch.compile(_linear_logps, dynamic=False)
    return lambda x: eager(x, function)


def _cut() -> Callable[[Inputs], Gradients]:
    from cut_cross_entropy import linear_cross_entropy

    def run(x: Inputs) -> Gradients:
        leaves = x.leaves(False)
        # Its own kernels run on a GPU alone.
        implementation = "cce" if x.labels.is_cuda else "torch_compile"
        return _gradients(linear_cross_entropy(*leaves, x.labels, impl=implementation), leaves)

    return run


def _linear_cross_entropy(x: Inputs) -> Gradients:
    """Torch's with its default, the logits held whole: its chunks take ten times as long on a CPU (torch 2.13)."""
    leaves = x.leaves(False)
    return _gradients(F.linear_cross_entropy(leaves[0].flatten(0, 1), leaves[1], x.labels.flatten()), leaves)


OURS, BARE, BARE_FROZEN = "fastalign", "bare GEMMs", "bare GEMMs, frozen head"
WIDE = "eager, softmax in float32"
TRL, LIGER, CUT = "TRL ChunkedLogProbFunction", "Liger FusedLinearDPOLoss", "cut-cross-entropy"
TORCH = "F.linear_cross_entropy"
VARIANTS: dict[str, Callable[[], Callable[[Inputs], Any]]] = {
    BARE: lambda: lambda x: gemms(x, False),
    BARE_FROZEN: lambda: lambda x: gemms(x, True),
    OURS: lambda: lambda x: fused(x, False, x.labels),
    "fastalign, half prompt": lambda: lambda x: fused(x, False, x.half),
    "fastalign, recompute in 64 MiB": lambda: lambda x: fused(x, False, x.labels, chunk_bytes=TILE, plan="recompute"),
    "fastalign, by parts of 256 MiB": lambda: (
        lambda x: fused(x, False, x.labels, chunk_bytes=4 * TILE, plan="objective")
    ),
    "fastalign, frozen head": lambda: lambda x: fused(x, True, x.labels),
    "fastalign, frozen head in 64 MiB": lambda: lambda x: fused(x, True, x.labels, chunk_bytes=TILE),
    "eager": lambda: eager,
    WIDE: lambda: lambda x: eager(x, _wide_logps),
    "torch.compile": _compiled,
    TRL: lambda: trl,
    LIGER: _liger,
    CUT: _cut,
    TORCH: lambda: _linear_cross_entropy,
}
COMPARABLE = (BARE, OURS, "eager", "torch.compile", TRL, LIGER, CUT, TORCH)
"""Those that do the same work, all of it, with the default plan."""
_PACKAGES = {TRL: "trl", LIGER: "liger_kernel", CUT: "cut_cross_entropy"}
_FITS: dict[str, Callable[[str], str]] = {
    WIDE: lambda objective: "" if OBJECTIVES[objective].logps_alone else "is given log-probabilities alone",
    TRL: lambda objective: "" if OBJECTIVES[objective].logps_alone else "gives no exact KL",
    "torch.compile": lambda objective: "" if OBJECTIVES[objective].logps_alone else "is given log-probabilities alone",
    LIGER: lambda objective: "" if objective == "dpo" else "is a DPO loss",
    CUT: lambda objective: "" if objective == "sft" else "is a mean cross-entropy",
    TORCH: lambda objective: _torchs(objective),
}


def _torchs(objective: str) -> str:
    if not hasattr(F, "linear_cross_entropy"):
        return "needs torch 2.13 or later"
    return "" if objective == "sft" else "is a mean cross-entropy"


def unavailable(objective: str) -> dict[str, str]:
    """Variant → why it takes no part."""
    found = {}
    for name in VARIANTS:
        package = _PACKAGES.get(name)
        absent = package is not None and importlib.util.find_spec(package) is None
        reason = f"{package} is not installed" if absent else _FITS.get(name, lambda _: "")(objective)
        if reason:
            found[name] = reason
    return found


def available(wanted: tuple[str, ...], objective: str) -> list[str]:
    unknown = set(wanted) - set(VARIANTS)
    if unknown:
        raise ValueError(f"variants must be among {'; '.join(VARIANTS)}; got {', '.join(sorted(unknown))}")
    absent = unavailable(objective)
    return [n for n in VARIANTS if n not in absent and (not wanted or n in wanted)]


def exact_gradients(x: Inputs) -> Gradients:
    """(of hidden, of weight) in float64, a slice of the vocabulary's gradient at a time: the whole would not fit."""
    hidden, weight = x.hidden.double().flatten(0, 1), x.weight.double()
    labels, shape = x.labels.flatten(), x.labels.shape
    logits = hidden @ weight.t()
    lse = logits.logsumexp(-1)
    logps = (logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - lse).view(shape).requires_grad_()
    ref_logps = None
    if OBJECTIVES[x.shape.objective].reference:
        reference = x.ref_hidden.double().flatten(0, 1) @ x.ref_weight.double().t()
        ref_logps = reference.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).view(shape)
        del reference
    scale = torch.autograd.grad(OBJECTIVES[x.shape.objective].of_logps(x, logps, ref_logps), logps)[0].flatten()
    logits.sub_(lse.unsqueeze(-1)).exp_().mul_(-scale.unsqueeze(-1))
    logits.scatter_add_(-1, labels.unsqueeze(-1), scale.unsqueeze(-1))
    return (logits @ weight).view_as(x.hidden), logits.t() @ hidden


def errors(x: Inputs, functions: dict[str, Callable[[Inputs], Any]]) -> dict[str, dict[str, float]]:
    """Variant → relative errors of the gradients it returns, of those that compute the exact problem's."""
    exact = exact_gradients(x)
    found = {}
    for name, function in functions.items():
        got = function(x)
        if got is None or "half" in name:  # other work, or none that is kept
            continue
        pairs = zip(("hidden", "weight"), got, exact, strict=False)
        found[name] = {key: float((a.double() - b).norm() / b.norm()) for key, a, b in pairs}
    return found


def peaks(shape: Shape, names: list[str], threads: int) -> dict[str, int]:
    """Variant → bytes beyond the inputs, each measured in a process of its own (Linux only)."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--peak", name, "--threads", str(threads)]
        command += ["--shape", json.dumps(asdict(shape))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {name!r} failed:\n{done.stderr}")
        found[name] = int(done.stdout.splitlines()[-1])
    return found


def _peak(shape: Shape, name: str) -> None:
    map_large_blocks(ABOVE)
    x, function = Inputs(shape), VARIANTS[name]()
    print(peak_of(lambda: lambda: function(x), warmup=1))


def device_peaks(shape: Shape, names: list[str], device: str) -> dict[str, int]:
    """The same on an accelerator, whose allocator counts exactly: all in this process."""
    x = Inputs(shape, device=device)
    functions = {name: VARIANTS[name]() for name in names}
    return {name: _device.peak_of(lambda f=f: lambda: f(x), device, warmup=1) for name, f in functions.items()}


def measure(
    shape: Shape, names: list[str], rounds: int, seed: int, with_errors: bool, device: str = "cpu"
) -> dict[str, Any]:
    """The case's record, without peak memory. The bare GEMMs are its probe, and so its limit."""
    x = Inputs(shape, seed, device)
    functions = {name: VARIANTS[name]() for name in names}
    wrong = errors(x, functions) if with_errors else {}
    contenders = {name: (lambda f=function: lambda: f(x)) for name, function in functions.items()}
    _device.warm_up(device)
    clock = _device.seconds_of(device)
    seconds = interleave(contenders, rounds=rounds, warmup=1, seed=seed, measure=clock)
    bare = {name: seconds.pop(name) for name in (BARE, BARE_FROZEN) if name in seconds}
    rows: dict[str, dict[str, Any]] = {}
    for name, samples in seconds.items():
        rows[name] = {"ours": name.startswith(OURS), "seconds": samples, **summary(samples)}
        rows[name]["error"] = wrong.get(name, {})
        limit = bare.get(BARE_FROZEN if "frozen" in name else BARE)
        if limit is not None:
            rows[name]["of_limit"] = ratio(limit, samples)["median"]
    compared = {name: row for name, row in rows.items() if name in COMPARABLE}
    probes = {name: {"seconds": t, "rate": _flops(shape, name) / summary(t)["median"]} for name, t in bare.items()}
    probes = {name: probe | {"unit": "GFLOP/s"} for name, probe in probes.items()}
    return _describe(shape) | {
        "calls": 1,
        "probes": probes,
        "variants": rows,
        "ratios": peer_ratios(compared),
        "checks": {},
    }


def _describe(shape: Shape) -> dict[str, Any]:
    case = Case("head", "both", shape.tokens, shape.vocab, shape.dtype)
    more = {"hidden": shape.hidden, "objective": shape.objective, "pairs": shape.pairs}
    return asdict(case) | more | {"logits_bytes": case.logits_bytes}


def _flops(shape: Shape, bare: str) -> float:
    """Of the GEMMs that are timed: a product and a sum for each of tokens x vocabulary x hidden."""
    count = 2 + OBJECTIVES[shape.objective].reference + (bare == BARE)
    return 2.0 * count * shape.tokens * shape.vocab * shape.hidden


def table(record: dict[str, Any]) -> str:
    lines = [
        "| variant | median (p10 to p90) | over bare GEMMs | peak | error of dhidden, dweight |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["variants"].items():
        times = f"{duration(row['median'])} ({duration(row['p10'])} to {duration(row['p90'])})"
        over = f"{1 / row['of_limit']:.2f}x" if "of_limit" in row else "-"
        memory = f"{row['peak_bytes'] / 2**20:,.0f} MiB" if row.get("peak_bytes") is not None else "-"
        error = ", ".join(f"{row['error'][k]:.1e}" for k in ("hidden", "weight") if k in row["error"]) or "-"
        lines.append(f"| {name} | {times} | {over} | {memory} | {error} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="dpo")
    for name, kind in (("tokens", int), ("vocab", int), ("hidden", int), ("dtype", str), ("pairs", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Shape, name))
    parser.add_argument("--device", choices=("cpu", "cuda", "xpu"), default=_device.automatic())
    parser.add_argument("--variants", default="", help="names, separated by ;")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("tokens", "vocab", "hidden", "pairs", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be above 0; got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    if args.peak:
        _peak(Shape(**json.loads(args.shape)), args.peak)
        return 0
    shape = Shape(args.tokens, args.vocab, args.hidden, args.dtype, args.pairs, args.objective)
    names = available(tuple(n.strip() for n in args.variants.split(";") if n.strip()), shape.objective)
    with_errors = not args.no_errors and OBJECTIVES[shape.objective].logps_alone
    record = measure(shape, names, args.rounds, args.seed, with_errors, args.device)
    if not args.no_memory and (args.device != "cpu" or resident.measurable()):
        variants = list(record["variants"])
        on_cpu = args.device == "cpu"
        found = peaks(shape, variants, args.threads) if on_cpu else device_peaks(shape, variants, args.device)
        for name, peak in found.items():
            record["variants"][name]["peak_bytes"] = peak
    sizes = f"{shape.tokens} tokens, V = {shape.vocab:,}, H = {shape.hidden}, {shape.dtype}"
    print(f"{shape.objective}, {sizes}, {args.rounds} rounds\n")
    print(table(record))
    for name, reason in unavailable(shape.objective).items():
        print(f"{name}: {reason}")
    if args.json:
        about = environment(Options(threads=args.threads, rounds=args.rounds, seed=args.seed, device=args.device))
        about["unavailable"] = unavailable(shape.objective)
        Path(args.json).write_text(json.dumps({"schema": 1, "environment": about, "cases": [record]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
