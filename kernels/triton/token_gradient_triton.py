"""The gradient of one row of logits in Triton, from its coefficients; the formulas are those of `token_stats.h`.

Each element's is its own affair, so that here, other than in `token_sums_triton.py`, nothing depends on which thread
meets it. Fused multiply-adds are spelled out, so that no bit depends on where the compiler meets a formula.
"""

import triton
import triton.language as tl

from .token_formulas_triton import at_target
from .token_layout_triton import (
    TEAM,
    body_offsets,
    body_pointer,
    body_pointers,
    edge_elements,
    edge_offsets,
    has_edges,
    prepare,
    row_head,
    slots,
    team_slots,
)


@triton.jit
def gradient(
    x, z, delta, c, scale, inv_cap, SLOPE: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Gradient of prepared logits, 2^u (a + b u - g v) + kappa + delta, times the soft-cap's slope."""
    shift, ref_shift, a, b, g, kappa, _, _, _ = c
    u = (x - shift) * scale
    p = tl.exp2(u)
    if SLOPE:
        slope = tl.fma(u, b, a)
        if KL:
            slope = tl.fma((z - ref_shift) * scale, -g, slope)
        dx = tl.where(p == 0, 0.0, p * slope)
        if MEAN:
            dx += kappa
    elif MEAN:
        dx = tl.fma(p, a, kappa)
    else:
        dx = p * a
    if delta is not None:
        dx += delta
    if SOFTCAP:
        tanh = x * inv_cap
        dx *= tl.fma(-tanh, tanh, 1.0)
    return dx


@triton.jit
def label_gradient(
    x_label,
    z_label,
    c,
    scale,
    inv_cap,
    SLOPE: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The gradient of the target's element, with its delta. Found before the row's, beside which nothing but this one
    number is then at hand."""
    c, delta = at_target(c, x_label)
    return gradient(x_label, z_label, delta, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)


@triton.jit
def write_label_gradient(dx, out_row, label, V):
    """Writes the target's element once more: cheaper than to look for the target in every tile.

    The barrier orders this write behind that of the thread which wrote the element's tile.
    """
    tl.debug_barrier()
    real = (label >= 0) & (label < V)
    tl.store(out_row + tl.where(real, label, 0), dx.to(out_row.dtype.element_ty), real)


@triton.jit
def write_edges(
    x_edges,
    z_edges,
    out_row,
    head,
    c,
    V,
    scale,
    cap,
    inv_cap,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The gradient of the chunks' edges, one by one."""
    if has_edges(head, V, VEC):
        at, valid = edge_elements(head, V, R, T, VEC)
        x = prepare(x_edges, valid, cap, inv_cap, SOFTCAP)
        z = prepare(z_edges, valid, cap, inv_cap, SOFTCAP)
        dx = gradient(x, z, None, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
        tl.store(out_row + at, dx.to(out_row.dtype.element_ty), valid)


@triton.jit
def write_registers(
    xs,
    zs,
    out_row,
    head,
    c,
    V,
    scale,
    cap,
    inv_cap,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The gradient of the bodies of a row in registers, which `load_row` made `xs` and `zs` of."""
    outs, vectors = body_pointers(out_row, head, V, ALIGNED, T, VEC)
    element = out_row.dtype.element_ty
    slot = team_slots(T)
    for r in tl.static_range(len(xs)):
        valid = slot + r * TEAM < vectors
        x = prepare(xs[r], valid, cap, inv_cap, SOFTCAP)
        z = prepare(zs[r], valid, cap, inv_cap, SOFTCAP)
        dx = gradient(x, z, None, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
        tl.store(outs + r * TEAM * VEC, dx.to(element), valid)


@triton.jit
def write_gradient(
    x_row,
    z_row,
    out_row,
    c,
    V,
    scale,
    cap,
    inv_cap,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The gradient of a row from its coefficients `c` without the target's delta, in one read and one write.

    In place too: a thread writes where it has read and nowhere else.
    """
    low = float("-inf")
    head = row_head(x_row, V, VEC)
    edge_at, edge = edge_offsets(head, V, T, VEC)
    if has_edges(head, V, VEC):
        edge_x = prepare(tl.load(x_row + edge_at, edge, other=low), edge, cap, inv_cap, SOFTCAP)
        edge_z = edge_x
        if KL:
            edge_z = prepare(tl.load(z_row + edge_at, edge, other=low), edge, cap, inv_cap, SOFTCAP)
        edge_dx = gradient(edge_x, edge_z, None, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
        tl.store(out_row + edge_at, edge_dx.to(out_row.dtype.element_ty), edge)

    slot = slots(R, T)
    vectors = (V - head) // VEC
    at = body_offsets(R, T, VEC)
    xs = body_pointer(x_row, head, True) + at
    outs = body_pointer(out_row, head, ALIGNED) + at
    next_x = tl.load(xs, slot < vectors, other=low)
    if KL:
        zs = body_pointer(z_row, head, ALIGNED) + at
        next_z = tl.load(zs, slot < vectors, other=low)
    for start in range(0, R * T if ONE else vectors, R * T):
        valid = slot < vectors - start
        x = prepare(next_x, valid, cap, inv_cap, SOFTCAP)
        z = x
        if KL:
            z = prepare(next_z, valid, cap, inv_cap, SOFTCAP)
        if not ONE:
            xs += R * T * VEC
            next_x = tl.load(xs, slot < vectors - start - R * T, other=low)
            if KL:
                zs += R * T * VEC
                next_z = tl.load(zs, slot < vectors - start - R * T, other=low)
        dx = gradient(x, z, None, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
        tl.store(outs, dx.to(out_row.dtype.element_ty), valid)
        outs += R * T * VEC


@triton.jit
def write_zeros(out_row, V, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """The gradient of an ignored row, whose logits are not read."""
    head = row_head(out_row, V, VEC)
    at, valid = edge_offsets(head, V, T, VEC)
    tl.store(out_row + at, tl.zeros([1, T, 1], out_row.dtype.element_ty), valid)
    slot = slots(R, T)
    vectors = (V - head) // VEC
    outs = body_pointer(out_row, head, True) + body_offsets(R, T, VEC)
    zeros = tl.zeros([R, T, VEC], out_row.dtype.element_ty)
    for start in range(0, vectors, R * T):
        tl.store(outs, zeros, slot < vectors - start)
        outs += R * T * VEC
