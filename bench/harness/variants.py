"""The same job done by different code: ours, and what people use instead.

A variant is a function `(logits, labels, ref_logps) -> result`. Here are the ways from logits [B, T, V] to the labels'
log-probabilities [B, T]; a suite puts its objective on top of each. Results are in the dtype that the code of each
variant returns: float32 from fastalign, that of the logits from the others.

Liger's and quack's cross-entropies on logits run on a GPU alone; Liger's other losses start from hidden states and the
output layer's weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastalign as fa

Logps = Callable[[Tensor, Tensor], Tensor]
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
JOBS = ("forward", "backward", "both")

OURS, OURS_IN_PLACE, EAGER, COMPILED = "fastalign", "fastalign in place", "eager", "torch.compile"
OURS_ONE_LAUNCH = "fastalign one launch in place"


@dataclass(frozen=True)
class Variant:
    """`build` returns the function under test (its form is the suite's); `package` must be installed for it."""

    build: Callable[[], Callable[..., Any]]
    ours: bool = False
    jobs: tuple[str, ...] = JOBS
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda", "xpu")

    @property
    def missing(self) -> str | None:
        """Name of the package that has to be installed first, if any."""
        absent = self.package is not None and importlib.util.find_spec(self.package) is None
        return self.package if absent else None


def eager_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cross_entropy_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def trl_logps() -> Logps:
    from trl.trainer.utils import selective_log_softmax  # imported late: it takes seconds

    return selective_log_softmax


def liger_logps() -> Logps:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def logps(logits: Tensor, labels: Tensor) -> Tensor:
        # Its forward writes the gradient over the logits: the benchmark refills them for every run.
        return -liger_cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)

    return logps


def quack_logps() -> Logps:
    from quack.cross_entropy import cross_entropy

    return lambda logits, labels: (
        -cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    )


def compiled(function: Function) -> Function:
    """One graph for one shape: dynamic shapes would only cost it time."""
    return torch.compile(function, fullgraph=True, dynamic=False)


Objective = Callable[[Tensor, Tensor], Tensor]


def by_logps(objective: Objective) -> dict[str, Variant]:
    """Ours, from the log-probabilities of [B, T] labels."""
    in_place = partial(fa.token_logps, inplace_backward=True)
    return {
        OURS: Variant(lambda: _on(fa.token_logps, objective), ours=True),
        OURS_IN_PLACE: Variant(lambda: _on(in_place, objective), ours=True, jobs=("backward", "both")),
    }


def by_module(build: Callable[[bool], Function]) -> dict[str, Variant]:
    """Ours, a loss module with its metrics; `build` is told whether the gradient is to be written over the logits."""
    return {
        OURS: Variant(lambda: build(False), ours=True),
        OURS_IN_PLACE: Variant(lambda: build(True), ours=True, jobs=("backward", "both")),
    }


def _on(logps: Logps, objective: Objective) -> Function:
    return lambda logits, labels, ref_logps: objective(logps(logits, labels), ref_logps)


def logits_variants(ours: dict[str, Variant], plain: Objective) -> dict[str, Variant]:
    """Every variant of a job that starts from logits.

    Args:
        ours: `by_logps` or `by_module`.
        plain: (logps [B, T], ref_logps [B]) -> result, in plain torch.
    """
    return {
        **ours,
        EAGER: Variant(lambda: _on(eager_logps, plain)),
        "F.cross_entropy": Variant(lambda: _on(cross_entropy_logps, plain)),
        COMPILED: Variant(lambda: compiled(_on(eager_logps, plain))),
        "TRL selective_log_softmax": Variant(lambda: _on(trl_logps(), plain), package="trl"),
        "Liger cross_entropy": Variant(
            lambda: _on(liger_logps(), plain), package="liger_kernel", devices=("cuda", "xpu")
        ),
        "quack cross_entropy": Variant(lambda: _on(quack_logps(), plain), package="quack", devices=("cuda",)),
    }
