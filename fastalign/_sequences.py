"""Sums of log-probabilities over the tokens of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._op_checks import as_softcap, check, shape_of


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are taken in: float64 where the device has it."""
    return x.dtype if x.device.type == "mps" else torch.float64


def sum_tokens(logps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of [B, ..., T] log-probabilities over all but the first dimension, [B], in `dtype` (None: that of logps).

    Added up in float64 where the device has it: at -1000 neighbouring float32 numbers are 6e-5 apart, so a float32 sum
    may carry that error several times, one that is rounded at the end half of it.
    """
    wide = wide_dtype(logps)
    if logps.dim() > 2:
        logps = logps.flatten(1)
    total = logps.sum(-1, dtype=wide) if logps.dim() > 1 else logps.to(wide)
    return total.to(logps.dtype if dtype is None or wide != torch.float64 else dtype)


class _Sums(torch.autograd.Function):
    """`sum_tokens` of the log-probabilities, cut into equal parts: one node in place of four or more."""

    @staticmethod
    def forward(ctx, logits, labels, parts, dtype, options, inplace):
        logps, *_, saved = ops.kernel_forward(logits, labels, None, *options, False, False)
        ctx.save_for_backward(logits, labels, saved)
        ctx.options, ctx.inplace = options, inplace
        return cut(sum_tokens(logps, dtype), parts)

    @staticmethod
    def backward(ctx, *grads):
        logits, labels, saved = ctx.saved_tensors
        of_rows = (torch.cat(grads) if len(grads) > 1 else grads[0]).to(saved.dtype)
        g_logps = of_rows.view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)
        grads = (g_logps, None, None, None, None)
        gradient = ops.gradient(logits, labels, None, saved, None, None, grads, ctx.options, ctx.inplace)
        return gradient, *[None] * 5


_sums_node = ops.node_of(_Sums)


def cut(rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Equal parts of the first dimension, one after the other, which it must divide."""
    if parts == 1:
        return (rows,)
    size = rows.shape[0] // parts
    return tuple(rows[i * size : (i + 1) * size] for i in range(parts))


_PLAIN = {"inplace_backward", "ignore_index", "temperature", "softcap"}


def sequence_sums(
    logits: Tensor, labels: Tensor, parts: int = 1, dtype: torch.dtype | None = None, **options
) -> tuple[Tensor, ...]:
    """`sum_tokens` of the labels' log-probabilities, cut into equal parts of the batch; options as in `token_stats`."""
    recorded = isinstance(logits, Tensor) and logits.requires_grad and ops.alone(logits, labels)
    if not recorded or not torch.is_grad_enabled() or labels.dim() < 1 or not options.keys() <= _PLAIN:
        return cut(sum_tokens(ops.token_logps(logits, labels, **options), dtype), parts)
    cap, inplace = as_softcap(options.get("softcap")), options.get("inplace_backward", False)
    kernel_options = (options.get("ignore_index", -100), options.get("temperature", 1.0), cap)
    check(logits, labels, None, *kernel_options[1:], inplace)
    return _sums_node(logits, labels, parts, dtype, kernel_options, inplace)


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
        ops.token_logps(logits, labels, **options)  # which may know something worse of them
        raise ValueError(f"logits must be [B, ..., V] with at least one batch dimension; got shape {shape_of(logits)}")
    (total,) = sequence_sums(logits, labels, 1, dtype, **options)
    if not average:
        return total
    live = (labels != options.get("ignore_index", -100)).to(total.dtype)
    count = live.flatten(1).sum(-1) if live.dim() > 1 else live
    return total / count.clamp(min=1)
