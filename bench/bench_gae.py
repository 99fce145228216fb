"""Generalised advantage estimation, 512 sequences of 2,048 tokens: our kernel against a loop of tensor operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from harness import device as _device
from harness.case import Case
from harness.interleave import interleave, replay, summary
from harness.suite import Options, peer_ratios
from harness.variants import EAGER, OURS, Variant
from torch import Tensor

from fastalign import rl

ROWS, LENGTH = 512, 2048
GAMMA, LAM = 0.99, 0.95
Gae = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return rl.gae(rewards, values, mask, gamma=GAMMA, lam=LAM)[0]


def _loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What trainers do: one step of tensor operations a token, from the last to the first."""
    valid = mask.float()
    rewards, values = rewards * valid, values * valid
    last, found = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(last)
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        found.append(last)
    return torch.stack(found[::-1], dim=1) * valid


def inputs(case: Case, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask [rows, vocab]; padded on the right, where the loop needs no more care than it takes."""
    draw = torch.Generator().manual_seed(options.seed)
    rewards, values = (torch.randn(case.rows, case.vocab, generator=draw) for _ in range(2))
    lengths = torch.randint(1, case.vocab + 1, (case.rows, 1), generator=draw)
    mask = torch.arange(case.vocab) < lengths
    return rewards.to(options.device), values.to(options.device), mask.to(options.device)


class GaeSuite:
    """One case; rows and vocabulary of the record are sequences and their length."""

    name = "gae"
    variants: ClassVar[dict[str, Variant]] = {
        OURS: Variant(lambda: _ours, ours=True),
        EAGER: Variant(lambda: _loop),
    }

    def cases(self, options: Options) -> list[Case]:
        return [Case(self.name, "forward", ROWS, LENGTH, "float32")]

    def variants_of(self, case: Case, options: Options) -> dict[str, Variant]:
        return options.chosen(self.variants)

    def measure(self, case: Case, options: Options) -> dict[str, Any]:
        rewards, values, mask = inputs(case, options)
        runs = {name: partial(v.build(), rewards, values, mask) for name, v in self.variants_of(case, options).items()}
        results = {name: run() for name, run in runs.items()}
        seconds = interleave(
            {name: partial(_already, run) for name, run in runs.items()},
            rounds=options.rounds,
            warmup=options.warmup,
            seed=options.seed,
            measure=_device.seconds_of(options.device),
        )
        rows = {
            name: {"ours": self.variants[name].ours, "seconds": samples, **summary(samples)}
            for name, samples in seconds.items()
        }
        checks = {}
        if {OURS, EAGER} <= results.keys():
            checks["difference"] = float((results[OURS] - results[EAGER]).abs().max())
        return case.to_dict() | {"calls": 1, "variants": rows, "ratios": peer_ratios(rows), "checks": checks}


def _already(run: Gae) -> Gae:
    """Nothing to prepare."""
    return run


SUITE = GaeSuite()


def bench_gae(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
