"""Sums of log-probabilities over the tokens of sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import statistics
from .call import shape_of, token_call
from .fused_loss import FusedLoss, Grouping
from .programs import Symbol, single


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are taken in: float64 where the device has it."""
    return x.dtype if x.device.type == "mps" else torch.float64


def sum_tokens(logps: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of [B, ..., T] log-probabilities over all but the first dimension, [B], in `dtype` (None: that of logps).

    Added up in float64 where the device has it: at -1000 neighbouring float32 numbers are 6e-5 apart, so a float32 sum
    may carry that error several times, one that is rounded at the end half of it.
    """
    if isinstance(logps, Symbol):
        return single(logps.sum(-1)) if dtype is torch.float32 else logps.sum(-1)
    wide = wide_dtype(logps)
    if logps.dim() > 2:
        logps = logps.flatten(1)
    total = logps.sum(-1, dtype=wide) if logps.dim() > 1 else logps.to(wide)
    return total.to(logps.dtype if dtype is None or wide != torch.float64 else dtype)


def cut(rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Equal parts of the first dimension, one after the other, which it must divide."""
    return (rows,) if parts == 1 else rows.chunk(parts)


def _fused(average: bool) -> FusedLoss:
    def formula(t: Any) -> tuple[Any]:
        total = t.logps.sum(-1)
        return (total / t.mask.sum(-1).clamp(min=1) if average else total,)

    return FusedLoss(formula)


_FUSED = {average: _fused(average) for average in (False, True)}
_OPTIONS = {"inplace_backward", "ignore_index", "temperature", "softcap"}


def _of_program(
    logits: Any, labels: Any, average: bool, dtype: torch.dtype | None, options: dict[str, Any]
) -> Tensor | None:
    """[B] sums or means where a program serves, else None: the general path does it or says what is wrong."""
    if not isinstance(labels, Tensor) or labels.dim() < 1 or not options.keys() <= _OPTIONS:
        return None
    more = dict(options)
    inplace = more.pop("inplace_backward", False)
    call, grouping = token_call(logits, labels, **more), Grouping(labels.shape[0])
    found = _FUSED[average].of_logits(call, (), grouping, inplace, dtype or torch.float32)
    return None if found is None else found[0]


def sequence_sums(
    logits: Tensor, labels: Tensor, parts: int = 1, dtype: torch.dtype | None = None, **options
) -> tuple[Tensor, ...]:
    """`sum_tokens` of the labels' log-probabilities, cut into equal parts of the batch; options as in `token_stats`."""
    total = _of_program(logits, labels, False, dtype, options)
    if total is None:
        total = sum_tokens(statistics.token_logps(logits, labels, **options), dtype)
    return cut(total, parts)


def sequence_logps(
    logits: Tensor, labels: Tensor, *, average: bool = False, dtype: torch.dtype | None = None, **options
) -> Tensor:
    """Log-probability of each sequence, [B]: the sum over its real tokens, or with `average` their mean (0 if none).

    Args:
        logits: [B, ..., V] (usually [B, T, V]).
        labels: [B, ...]; tokens equal to `ignore_index` (prompt, padding) do not count.
        average: divide by the number of real tokens.
        dtype: of the result: float32 (None: the default, float64 for float64 logits) or float64, which keeps the last
            digits of long sums for the difference of two of them.
        options: as in `token_stats`.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"dtype must be None, torch.float32 or torch.float64; got {dtype}")
    if isinstance(labels, Tensor) and labels.dim() < 1:
        statistics.token_logps(logits, labels, **options)  # which may know something worse of them
        raise ValueError(f"logits must be [B, ..., V] with at least one batch dimension; got shape {shape_of(logits)}")
    found = _of_program(logits, labels, average, dtype, options)
    if found is not None:
        return found
    total = sum_tokens(statistics.token_logps(logits, labels, **options), dtype)
    if not average:
        return total
    valid = (labels.long() != options.get("ignore_index", -100)).to(total.dtype)
    count = valid.flatten(1).sum(-1) if valid.dim() > 1 else valid
    return total / count.clamp(min=1)
