"""Divergences between two models' distributions in Triton, and their gradient: one program a row, which walks over it
for both softmaxes, for the divergence, and for the gradient. Formulas and results as in `divergence_eager.py`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..divergence_call import DivergenceCall
from .token_layout_triton import LN2, LOG2E, prepare
from .token_stats_triton import Launch, nothing, optional, row_kernel

STUDENT, TEACHER, BOTH = (tl.constexpr(i) for i in range(3))  # what the mixture m is made of
_BLOCK, _WARPS = 4096, 8
FAR = tl.constexpr(120.0)  # of log2(q / p), beyond which log2(m / q) no longer changes


@triton.jit
def _logits(row, at, valid, cap, inv_cap, SOFTCAP: tl.constexpr):
    return prepare(tl.load(row + at, valid, other=float("-inf")), valid, cap, inv_cap, SOFTCAP)


@triton.jit
def _weighted(p, value):
    return tl.where(p == 0, 0.0, p * value)


@triton.jit
def _softmax(row, V, scale, cap, inv_cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """(shift, log2 of the sum of the exps relative to it) of a row."""
    shift = nothing() - float("inf")
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        shift = tl.maximum(shift, tl.max(_logits(row, at, at < V, cap, inv_cap, SOFTCAP), 0))
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.exp2((_logits(row, at, at < V, cap, inv_cap, SOFTCAP) - shift) * scale)
    return shift, tl.log2(tl.sum(total, 0))


@triton.jit
def _terms(lp, lq, forward, reverse, share, difference, MIXED: tl.constexpr):
    """(p, what an element adds to the divergence in powers of two, its p s)."""
    p, q = tl.exp2(lp), tl.exp2(lq)
    value = difference * (p - q) * LOG2E
    if MIXED == STUDENT:
        value += forward * _weighted(q, lq - lp)
        tilted = forward * (p - q)
    elif MIXED == TEACHER:
        own = reverse * _weighted(p, lp - lq)
        value += own
        tilted = own * LN2
    else:
        t = tl.minimum(lq - lp, FAR)
        r = tl.exp2(t)
        m = share * r + (1 - share)  # over p
        lm = tl.log2(m)
        own = -reverse * _weighted(p, lm)
        value += forward * _weighted(q, t - lm) + own
        tilted = own * LN2 - difference * _weighted(p, r / m)
    return p, value, tilted


@row_kernel
def divergence_kernel(
    x_ptr,
    x_inner: tl.int64,
    z_ptr,
    z_inner: tl.int64,
    out_ptr,
    out_inner: tl.int64,
    labels_ptr,
    x_scale_ptr,
    z_scale_ptr,
    divergence_ptr,
    logps_ptr,
    g_divergence_ptr,
    g_logps_ptr,
    V: tl.int32,
    x_cap: tl.float32,
    x_inv_cap: tl.float32,
    z_cap: tl.float32,
    z_inv_cap: tl.float32,
    forward: tl.float32,
    reverse: tl.float32,
    share: tl.float32,
    difference: tl.float32,
    MIXED: tl.constexpr,
    X_SOFTCAP: tl.constexpr,
    Z_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    out = x_ptr
    if out_ptr is not None:
        out = out_ptr + row * out_inner
    if label < 0:
        tl.store(divergence_ptr + row, 0.0)
        tl.store(logps_ptr + row, 0.0)
        if out_ptr is not None:
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(out + at, tl.zeros([BLOCK], out_ptr.dtype.element_ty), at < V)
        return
    x, z = x_ptr + row * x_inner, z_ptr + row * z_inner
    x_natural = tl.load(x_scale_ptr + row)
    x_scale, z_scale = x_natural * LOG2E, tl.load(z_scale_ptr + row) * LOG2E
    x_pivot, x_sum = _softmax(x, V, x_scale, x_cap, x_inv_cap, X_SOFTCAP, BLOCK)
    z_pivot, z_sum = _softmax(z, V, z_scale, z_cap, z_inv_cap, Z_SOFTCAP, BLOCK)
    values, tilts = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lp = (_logits(x, at, at < V, x_cap, x_inv_cap, X_SOFTCAP) - x_pivot) * x_scale - x_sum
        lq = (_logits(z, at, at < V, z_cap, z_inv_cap, Z_SOFTCAP) - z_pivot) * z_scale - z_sum
        _, value, tilted = _terms(lp, lq, forward, reverse, share, difference, MIXED)
        values += value
        tilts += tilted
    own = _logits(x, label, label < V, x_cap, x_inv_cap, X_SOFTCAP)
    tl.store(divergence_ptr + row, tl.sum(values, 0) * LN2)
    tl.store(logps_ptr + row, ((own - x_pivot) * x_scale - x_sum) * LN2)
    if out_ptr is not None:
        tilt = tl.sum(tilts, 0)
        g_d, g_l = optional(g_divergence_ptr, row), optional(g_logps_ptr, row)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            raw = _logits(x, at, at < V, x_cap, x_inv_cap, X_SOFTCAP)
            lp = (raw - x_pivot) * x_scale - x_sum
            lq = (_logits(z, at, at < V, z_cap, z_inv_cap, Z_SOFTCAP) - z_pivot) * z_scale - z_sum
            p, _, tilted = _terms(lp, lq, forward, reverse, share, difference, MIXED)
            dx = g_d * (tilted - p * tilt) + g_l * (tl.where(at == label, 1.0, 0.0) - p)
            if X_SOFTCAP:
                bent = raw * x_inv_cap
                dx = dx * (1 - bent * bent)
            dx = tl.where((g_d == 0) & (g_l == 0), 0.0, dx * x_natural)
            tl.store(out + at, dx.to(out_ptr.dtype.element_ty), at < V)


def divergence(
    call: DivergenceCall, g_divergence: Tensor | None, g_logps: Tensor | None, out: Tensor | None
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """(launches, results that they fill); arguments and results as in `divergence_eager.divergence`."""
    student, teacher, labels, mixture = call
    found = torch.empty((2, *labels.shape), dtype=torch.float32, device=labels.device)
    share = mixture.share
    known: dict[str, Any] = {"V": student.logits.shape[1], **mixture._asdict(), "difference": mixture.difference}
    known["BLOCK"] = _BLOCK
    known["MIXED"] = (STUDENT if share == 0 else TEACHER if share == 1 else BOTH).value
    for name, side in (("x", student), ("z", teacher)):
        known |= {f"{name}_ptr": side.logits, f"{name}_inner": side.logits.stride(0), f"{name}_scale_ptr": side.scale}
        known |= {f"{name}_cap": side.softcap, f"{name}_inv_cap": 1 / side.softcap if side.softcap else 0.0}
        known[f"{name.upper()}_SOFTCAP"] = side.softcap != 0
    known |= {"out_ptr": out, "out_inner": 0 if out is None else out.stride(0), "labels_ptr": labels}
    known |= {"divergence_ptr": found[0], "logps_ptr": found[1]}
    known |= {"g_divergence_ptr": g_divergence, "g_logps_ptr": g_logps}
    arguments = {name: known[name] for name in divergence_kernel.arg_names}
    return [Launch(divergence_kernel, labels.shape[0], arguments, _WARPS)], (found[0], found[1])
