"""Kernel launches of a loss from logits, forward and backward, on CUDA: ours as the launch code makes them, and
torch's.

    python bench/launches.py [--json OUT]

No device is needed: a recorder takes the driver's place, a simulator of PTX (`ptxsim`) runs what is launched, and
torch's operations are counted by its profiler on CPU tensors, where they are the same ones. Needs nvcc and a C++
compiler. What `loss.backward()` fills for its start is left out, as are operations that launch nothing: views, and
memory that is taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu.cuda_simulator import Simulator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastalign import losses

PAIRS, LENGTH, VOCAB = 3, 4, 17
_NOTHING = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "resolve_neg", "select", "unbind", "view"}
_START = "ones_like"


class Row(NamedTuple):
    case: str
    ours: int
    torch: int
    limit: int


def _case(module: Any, **given: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, labels: module(logits, labels, **given).loss


def cases() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]]:
    """Name → (loss with all its metrics, most launches)."""
    g = torch.Generator().manual_seed(0)
    half, rows = torch.randn(PAIRS, generator=g) - 10, 2 * PAIRS
    old = torch.randn(rows, LENGTH, generator=g) - 3
    policy = {"old_logps": old, "advantages": torch.randn(rows, generator=g)}
    pair = {"ref_chosen_logps": half, "ref_rejected_logps": half - 1}
    rewards = torch.randn(2, PAIRS, generator=g)
    grpo = losses.PPOLoss(normalization="grpo", kl_coef=0.1, kl_estimator="k3")
    return {
        "SFT": (_case(losses.SFTLoss()), 4),
        "DPO": (_case(losses.DPOLoss(), **pair), 4),
        "PRO": (_case(losses.PROLoss(sft_weight=0.1), rewards=rewards), 4),
        "PPO": (_case(losses.PPOLoss(), **policy), 4),
        "PPO with entropy": (_case(losses.PPOLoss(entropy_coef=0.01), **policy), 4),
        "GRPO": (_case(grpo, **policy, ref_logps=old), 4),
    }


def launches(simulator: Simulator, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[int, list[str]]:
    """How many of ours, and torch's operations by their names."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2 * PAIRS, LENGTH, VOCAB, generator=g).requires_grad_()
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=g)

    def step() -> None:
        torch.autograd.grad(loss(logits, labels), logits)

    with simulator() as made, simulator.raising():
        torch.use_deterministic_algorithms(False)  # it fills what is only taken
        step()  # what is traced once
        before = len(made)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
    outer = [e.name for e in found.events() if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    names = [name.removeprefix("aten::") for name in outer if name.startswith("aten::")]
    names.remove(_START)
    # Conversions to the dtype that is there are none.
    return len(made) - before, [name for name in names if name not in _NOTHING and name != "to"]


def rows() -> list[Row]:
    """ValueError where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ValueError("counting launches needs nvcc on PATH")
    simulator = Simulator(nvcc, "sm_90a")
    found = []
    for name, (loss, limit) in cases().items():
        ours, others = launches(simulator, loss)
        found.append(Row(name, ours, len(others), limit))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT")
    given = parser.parse_args(argv)
    found = rows()
    for row in found:
        over = "  too many" if row.ours + row.torch > row.limit else ""
        print(f"{row.case:<20} {row.ours} of ours, {row.torch} of torch's, at most {row.limit}{over}")
    if given.json:
        given.json.write_text(json.dumps([row._asdict() for row in found], indent=1) + "\n", encoding="utf-8")
    return int(any(row.ours + row.torch > row.limit for row in found))


if __name__ == "__main__":
    sys.exit(main())
