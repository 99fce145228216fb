"""Log-probabilities with their gradient, once for each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Callable

from harness.case import Case, Problem
from harness.interleave import replay
from harness.suite import LogitsSuite, Options, Timed
from harness.variants import EAGER, OURS, Variant, by_logps, logits_variants
from torch import Tensor

import fastalign as fa
from fastalign import _backends


def _unchanged(logps: Tensor, ref_logps: Tensor) -> Tensor:
    return logps


def _variants() -> dict[str, Variant]:
    plain = logits_variants(by_logps(_unchanged), _unchanged)
    on_cpu = {name: Variant(plain[name].build, plain[name].ours, devices=("cpu",)) for name in (OURS, EAGER)}
    return {**{f"{OURS} {isa}": on_cpu[OURS] for isa in _backends.cpu_isas()}, EAGER: on_cpu[EAGER]}


def _within(isa: str, prepare: Callable[[], Timed]) -> Callable[[], Timed]:
    """The same with the instruction set chosen for what is prepared and for what is timed, backward included."""

    def prepared() -> Timed:
        def run():
            with fa.use_backend(None, isa=isa):
                return timed()

        with fa.use_backend(None, isa=isa):
            timed = prepare()
        return run

    return prepared


class IsaSuite(LogitsSuite):
    def contenders(self, case: Case, problem: Problem, options: Options) -> dict[str, Callable[[], Timed]]:
        found = super().contenders(case, problem, options)
        return {n: p if n == EAGER else _within(n.removeprefix(f"{OURS} "), p) for n, p in found.items()}


SUITE = IsaSuite("isa", ("both",), _variants(), _unchanged)


def bench_isa(case, variant, record_of, benchmark):
    replay(benchmark, record_of(case)["variants"][variant]["seconds"])
