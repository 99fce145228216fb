"""The jobs that `sweep.py` measures over sizes: who does them, and on which inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import bench_dpo
import bench_gae
import bench_logps
import bench_ppo
import torch
from harness.case import Case, Problem, sequences
from harness.suite import LogitsSuite, Options
from harness.variants import COMPILED, EAGER, OURS, Function, Variant, compiled, eager_logps, trl_logps
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa

Run = Callable[[], object]
Contenders = dict[str, Callable[[], Run]]
TRL = "TRL selective_log_softmax"
UNROLLED = 64
"""Tokens to which the loop over time is given to a compiler, which unrolls it."""


@dataclass(frozen=True)
class Point(Case):
    """A case of the sweep."""

    threads: int = 2
    list_length: int = 0
    hidden: int = 0

    def to_dict(self) -> dict[str, object]:
        whole = super().to_dict()
        return {name: value for name, value in whole.items() if value or name not in ("list_length", "hidden")}


def _flat(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """A cross-entropy of [N, V] and [N] as a variant."""
    return lambda logits, labels, ref_logps: function(logits.flatten(0, -2), labels.flatten())


def _of_logps(logps: Callable[[Tensor, Tensor], Tensor], objective: Callable[[Tensor], Tensor]) -> Function:
    return lambda logits, labels, ref_logps: objective(logps(logits, labels))


def _sft() -> Function:
    module = fa.losses.SFTLoss()
    return lambda logits, labels, ref_logps: module(logits, labels).loss


def _nll(logps: Tensor) -> Tensor:
    return -logps.mean()


def _peers(objective: Callable[[Tensor], Tensor], compile_too: bool = True) -> dict[str, Variant]:
    plain = _of_logps(eager_logps, objective)
    found = {
        EAGER: Variant(lambda: plain),
        TRL: Variant(lambda: _of_logps(trl_logps(), objective), package="trl"),
    }
    return found | ({COMPILED: Variant(lambda: compiled(plain))} if compile_too else {})


_CROSS_ENTROPY = {
    "F.cross_entropy": Variant(lambda: _flat(F.cross_entropy)),
    COMPILED: Variant(lambda: compiled(_flat(F.cross_entropy))),
}


def _plackett_luce(size: int, logps: Tensor) -> Tensor:
    """Song et al. 2023, eq. 5, of lists of the given size, best first."""
    scores = logps.mean(-1).view(-1, size)
    tails = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (tails - scores).sum(-1).mean()


def _pro(size: int) -> dict[str, Variant]:
    def ours() -> Function:
        module = fa.losses.PROLoss()
        return lambda logits, labels, ref_logps: module(logits, labels, list_size=size).loss

    return {OURS: Variant(ours, ours=True), **_peers(partial(_plackett_luce, size))}


def variants_of(point: Point) -> Mapping[str, Variant]:
    """Who does the point's job on the CPU."""
    if point.suite == "gae":
        return _gae(point)
    if point.suite == "pro":
        return _pro(point.list_length)
    return _FIXED[point.suite]


def _without_in_place(suite: LogitsSuite) -> dict[str, Variant]:
    return {name: v for name, v in suite.variants.items() if v.ours <= (name == OURS) and "cpu" in v.devices}


_FIXED: dict[str, Mapping[str, Variant]] = {
    "logps": _without_in_place(bench_logps.SUITE),
    # torch.compile gets the cross-entropy, which it does faster than the mean of log-probabilities
    "sft": {OURS: Variant(_sft, ours=True), **_CROSS_ENTROPY, **_peers(_nll, compile_too=False)},
    "cross_entropy": {OURS: Variant(lambda: _flat(fa.cross_entropy), ours=True), **_CROSS_ENTROPY},
    "dpo": _without_in_place(bench_dpo.SUITE),
    "ppo": _without_in_place(bench_ppo.SUITE),
}


def _gae(point: Point) -> dict[str, Variant]:
    found = dict(bench_gae.GaeSuite.variants)
    if point.vocab <= UNROLLED:
        found[COMPILED] = Variant(lambda: torch.compile(bench_gae._loop, fullgraph=True, dynamic=False))
    return found


# -------------------------------------------------------------------------------------------------------------- inputs
def _batch(point: Point) -> int:
    """Sequences that the tokens are cut into."""
    if point.list_length:
        return point.list_length * max(1, 64 // point.list_length)
    return sequences(point.rows) if point.rows % 2 == 0 else 1


def contenders(point: Point, options: Options) -> tuple[Problem | None, Contenders]:
    """(what the jobs on logits work on, name → preparation)."""
    if point.suite == "gae":
        inputs = bench_gae.inputs(point, options)
        runs = {name: partial(v.build(), *inputs) for name, v in variants_of(point).items()}
        return None, {name: partial(_already, run) for name, run in runs.items()}
    suite: Any = LogitsSuite(point.suite, (point.job,), dict(variants_of(point)), lambda logps, ref_logps: logps)
    problem = Problem(point, options.seed, "cpu", _batch(point))
    if point.suite == "ppo":
        problem.ref_logps = bench_ppo.inputs(problem)
    return problem, suite.contenders(point, problem, options)


def _already(run: Run) -> Run:
    """Nothing to prepare."""
    return run
