"""Distillation of two heads of different size, forward and the student's gradients: ours, plain torch, the bare GEMMs.

    python bench/distill.py [--tokens 512] [--vocab 128256] [--hidden 576] [--teacher_hidden 1024] [--rounds 5]
                            [--divergence jsd forward_kl reverse_kl] [--threads N] [--memory]

All variants run interleaved, each once a round; a ratio is the median of the rounds' ratios. `bare GEMMs` are both
models' logits and the student's two gradients, formed and thrown away: what no variant can do without. With --memory
the peak beyond the inputs is measured as well, of each variant in a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness.interleave import interleave, ratio
from memory import ABOVE, peak_of
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa
from fastalign.losses import DistillationLoss
from fastalign.trainers.common import resident
from fastalign.trainers.common.allocator import map_large_blocks

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The student's hidden states and weight, the teacher's, and labels."""


def inputs(tokens: int, vocab: int, hidden: int, teacher_hidden: int) -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns).normal_(0, std, generator=draw)

    student = normal(tokens, hidden, 1.0), normal(vocab, hidden, hidden**-0.5)
    teacher = normal(tokens, teacher_hidden, 1.0), normal(vocab, teacher_hidden, teacher_hidden**-0.5)
    for t in student:
        t.requires_grad_()
    return *student, *teacher, torch.randint(vocab, (tokens,), generator=draw)


def ours(x: Inputs, divergence: str) -> Any:
    hidden, weight, their_hidden, their_weight, labels = x
    loss = DistillationLoss(divergence=divergence)((hidden, weight), labels, (their_hidden, their_weight)).loss
    return torch.autograd.grad(loss, [hidden, weight])


def eager(x: Inputs, divergence: str) -> Any:
    """The expressions of TRL's GKDTrainer."""
    hidden, weight, their_hidden, their_weight, _ = x
    logp = F.log_softmax(F.linear(hidden, weight), -1)
    with torch.no_grad():
        logq = F.log_softmax(F.linear(their_hidden, their_weight), -1)
    if divergence == "forward_kl":
        each = F.kl_div(logp, logq, reduction="none", log_target=True)
    elif divergence == "reverse_kl":
        each = F.kl_div(logq, logp, reduction="none", log_target=True)
    else:
        half = torch.tensor(0.5)
        mixture = torch.logsumexp(torch.stack([logp + torch.log1p(-half), logq + torch.log(half)]), 0)
        to_teacher = F.kl_div(mixture, logq, reduction="none", log_target=True)
        each = half * to_teacher + (1 - half) * F.kl_div(mixture, logp, reduction="none", log_target=True)
    return torch.autograd.grad(each.sum() / len(hidden), [hidden, weight])


@torch.no_grad()
def gemms(x: Inputs, divergence: str) -> None:
    hidden, weight, their_hidden, their_weight, _ = x
    logits = hidden @ weight.t()
    torch.mm(their_hidden, their_weight.t())
    torch.mm(logits, weight)
    torch.mm(logits.t(), hidden)


VARIANTS: dict[str, Callable[[Inputs, str], Any]] = {"fastalign": ours, "eager": eager, "bare GEMMs": gemms}


def peak(options: argparse.Namespace, name: str, divergence: str) -> int:
    """Bytes beyond the inputs, in a process of its own."""
    argv = [sys.executable, __file__, "--peak_of", name, "--divergence", divergence, "--threads", str(options.threads)]
    for key in ("tokens", "vocab", "hidden", "teacher_hidden"):
        argv += [f"--{key}", str(getattr(options, key))]
    return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 512, "vocab": 128_256, "hidden": 576, "teacher_hidden": 1024, "rounds": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--divergence", nargs="+", default=["jsd", "forward_kl", "reverse_kl"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak_of", choices=tuple(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    x = inputs(options.tokens, options.vocab, options.hidden, options.teacher_hidden)
    if options.peak_of:
        map_large_blocks(ABOVE)
        run = VARIANTS[options.peak_of]
        print(peak_of(functools.partial(functools.partial, run, x, options.divergence[0])))
        return
    print(f"{options.tokens} x {options.vocab}, {options.hidden} and {options.teacher_hidden} wide, float32,", end=" ")
    print(f"{options.threads} threads, {fa._backends.cpu_isa()}")
    for divergence in options.divergence:
        contenders = {name: functools.partial(functools.partial, run, x, divergence) for name, run in VARIANTS.items()}
        seconds = interleave(contenders, rounds=options.rounds)
        for name, samples in seconds.items():
            times = ratio(samples, seconds["fastalign"])["median"]
            line = f"{divergence:<11} {name:<11} {sorted(samples)[len(samples) // 2]:7.3f} s   {times:5.2f} x ours"
            if options.memory and resident.measurable():
                line += f"   {peak(options, name, divergence) / 2**20:8.0f} MiB beyond inputs"
            print(line, flush=True)


if __name__ == "__main__":
    main()
