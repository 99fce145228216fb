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
from .inputs import HeadCall
from .tiles import Problem


def _logits(
    dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    if rows is not None:
        hidden = hidden.flatten(0, -2)[rows]
    return torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def transformed_stats(call: HeadCall, diagnostics: Collection[str]) -> TokenStats:
    """`head_token_stats`; differentiable in any mode and any number of times."""
    return statistics.token_stats(
        _logits(call.logits_dtype, call.hidden, call.weight, call.bias, call.rows),
        call.labels,
        ref_logits=None if call.reference is None else _logits(call.logits_dtype, *call.reference, call.rows).detach(),
        ignore_index=call.ignore_index,
        temperature=call.temperature,
        softcap=call.softcap or None,
        label_smoothing=call.label_smoothing,
        entropy=call.entropy,
        kl=call.reference is not None,
        diagnostics=diagnostics,
    )


def pulled(problem: Problem, tensors: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients of the valid tokens, weight and bias, None for what is not there, from those of the statistics."""
    reference, dtype = problem.reference, problem.dtype
    ref_logits = None if reference is None else _logits(dtype, reference.hidden, reference.weight, reference.bias)

    def again(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return plain_statistics(problem.call(_logits(dtype, hidden, weight, bias), problem.labels, ref_logits))[0]

    there = tuple(t for t in tensors if t is not None)
    return [*pull(again, there, grads), *[None] * (len(tensors) - len(there))]
