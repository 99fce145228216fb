"""What a call of `token_stats` costs beside its kernel: one token, 32 logits, so that there is nothing to compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from harness.case import Case
from harness.interleave import interleave, replay, summary
from harness.suite import Options, peer_ratios
from harness.variants import EAGER, OURS, Variant, eager_logps
from torch import Tensor

import fastalign as fa
from fastalign import _backends

RAW = "kernel alone"
CALLS = 200
"""Calls between two readings of the clock: one call is too short for it."""


Run = Callable[[], object]


def _ours(logits: Tensor, labels: Tensor) -> Run:
    leaf = logits.clone().requires_grad_()
    return lambda: fa.token_stats(leaf, labels)


def _kernel(logits: Tensor, labels: Tensor) -> Run:
    """The compiled function by itself, its arguments ready: results allocated, addresses taken."""
    logps, lse, saved = (torch.empty(labels.shape + tail) for tail in ((), (), (4,)))
    call = _backends.TokenCall(logits, labels, None, -100, 1.0, 0.0)
    tokens = _backends.cpu.tokens(call, labels)
    addresses = (logps.data_ptr(), lse.data_ptr(), 0, 0, 0, saved.data_ptr(), 0, 0)
    return partial(_call, (logits, labels, logps, lse, saved), tokens, addresses)


def _call(held: tuple[Tensor, ...], *arguments: object) -> object:
    """`held` keeps the tensors alive, whose addresses the kernel uses."""
    return _backends.cpu._C.token_stats_forward(*arguments)


def _eager(logits: Tensor, labels: Tensor) -> Run:
    leaf = logits.clone().requires_grad_()
    return lambda: eager_logps(leaf, labels)


class OverheadSuite:
    """Forward with autograd's recording against the kernel alone, and eager torch's forward for comparison."""

    name = "overhead"
    variants: ClassVar[dict[str, Variant]] = {
        OURS: Variant(lambda: _ours, ours=True),
        RAW: Variant(lambda: _kernel, package="fastalign._C"),
        EAGER: Variant(lambda: _eager),
    }

    def cases(self, options: Options) -> list[Case]:
        """One, on the CPU: it is the host's time for a call that is looked at."""
        return [Case(self.name, "forward", 1, 32, "float32")] if options.device == "cpu" else []

    def variants_of(self, case: Case, options: Options) -> dict[str, Variant]:
        return options.chosen(self.variants)

    def measure(self, case: Case, options: Options) -> dict[str, Any]:
        logits = torch.randn(case.rows, case.vocab, generator=torch.Generator().manual_seed(options.seed))
        labels = torch.zeros(case.rows, dtype=torch.int64)
        installed = {name: v for name, v in self.variants_of(case, options).items() if v.missing is None}
        runs = {name: variant.build()(logits, labels) for name, variant in installed.items()}
        # A round takes a few milliseconds here, so many more of them cost nothing.
        seconds = interleave(
            {name: partial(_already, run) for name, run in runs.items()},
            rounds=10 * options.rounds,
            warmup=10 * options.warmup,
            calls=CALLS,
            seed=options.seed,
        )
        rows = {
            name: {"ours": self.variants[name].ours, "seconds": samples, **summary(samples)}
            for name, samples in seconds.items()
        }
        checks = {"overhead_seconds": _overhead(seconds)} if {OURS, RAW} <= seconds.keys() else {}
        return case.to_dict() | {"calls": CALLS, "variants": rows, "ratios": peer_ratios(rows), "checks": checks}


def _already(run: Run) -> Run:
    """Nothing to prepare."""
    return run


def _overhead(seconds: dict[str, list[float]]) -> float:
    """Median, over the rounds, of what our call takes beyond its kernel."""
    return summary([ours - raw for ours, raw in zip(seconds[OURS], seconds[RAW], strict=True)])["median"]


SUITE = OverheadSuite()


def bench_overhead(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
