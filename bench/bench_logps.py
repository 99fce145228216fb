"""Log-probabilities of the labels from logits: forward, backward of a given gradient, and both."""

from __future__ import annotations

from harness.interleave import replay
from harness.suite import LogitsSuite
from harness.variants import JOBS, by_logps, logits_variants
from torch import Tensor


def _unchanged(logps: Tensor, ref_logps: Tensor) -> Tensor:
    return logps


SUITE = LogitsSuite("logps", JOBS, logits_variants(by_logps(_unchanged), _unchanged), _unchanged)


def bench_logps(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
