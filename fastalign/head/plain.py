"""A head's statistics from logits that are held whole, by torch's own operations: under transforms of `torch.func` and
in forward mode, which see nothing of what kernels do."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..ops import statistics
from ..ops.results import TokenStats
from ..ops.transforms import pull
from ..ops.transforms import statistics as plain_statistics
from .checks import check_head, check_options, check_reference, check_rows
from .tiles import Problem

Weights = tuple[Tensor, Tensor, Tensor | None]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
    if rows is not None:
        hidden = hidden.flatten(0, -2)[rows]
    return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def transformed_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reference: Weights | None,
    rows: Tensor | None,
    *,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    entropy: bool,
    extras: Collection[str],
) -> TokenStats:
    """`head_token_stats`, whose arguments these are; differentiable in any mode and any number of times."""
    check_head("", hidden, weight, bias)
    shape = hidden.shape[:-1] if rows is None else check_rows(hidden, rows)
    cap = check_options(hidden, shape, labels, ignore_index, temperature, softcap, logit_scale, label_smoothing)
    ref_logits = None
    if reference is not None:
        check_reference(hidden, weight, *reference)
        ref_logits = _logits(*reference, rows).detach()
    return statistics.token_stats(
        _logits(hidden, weight, bias, rows),
        labels,
        ref_logits=ref_logits,
        ignore_index=ignore_index,
        temperature=temperature / logit_scale,  # s cap' tanh(u / cap') / T with cap' = cap / s: see `live_problem`
        softcap=cap / logit_scale if cap else None,
        label_smoothing=label_smoothing,
        entropy=entropy,
        kl=reference is not None,
        extras=extras,
    )


def pulled(problem: Problem, tensors: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients of the live tokens, weight and bias, None for what is not there, from those of the statistics."""
    reference = problem.reference
    ref_logits = None if reference is None else _logits(reference.hidden, reference.weight, reference.bias)
    options = (_NO_LABEL, problem.temperature, problem.softcap)

    def again(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return plain_statistics(_logits(hidden, weight, bias), problem.labels, ref_logits, options)[0]

    there = tuple(t for t in tensors if t is not None)
    return [*pull(again, there, grads), *[None] * (len(tensors) - len(there))]


_NO_LABEL = -100  # all rows are live
