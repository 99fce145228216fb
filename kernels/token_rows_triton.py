"""One row of logits in Triton: tiles, sums and slopes, shared by the kernels of token statistics and objectives.

The formulas and the names (u, v, s, w, t, k, total, pivot) are those of `token_stats.h`. A program (a block of threads)
owns a row and walks over it in tiles [R, T, VEC]: each of T threads takes R vectors of VEC elements, 16 bytes each.

* Rows may start anywhere: the body of a row begins at its first 16-byte boundary, so that every load of the body is one
  aligned vector whatever V and the strides are; the up to VEC - 1 elements before the body and after the last whole
  vector, the edges, form a tile [1, T, 1] of their own. No element outside the row is ever read or written. Where rows
  start on such boundaries (V a multiple of VEC, dense), a row's numbers are the same bits whatever its place in the
  batch; elsewhere the order of its sums, and so the last bits, follow its address modulo 16.
* Every thread has its own pivot, the maximum of what it has seen: tiles are reduced inside threads only, with one
  rescaling for R * VEC elements and no barrier. Threads are merged once, at the end of the row.
* Nothing but R, T, VEC and what is computed is known at compile time: a new V or batch size compiles nothing.

Triton reads the types in the signatures of kernels, so annotations must not be lazy here.
"""

import triton
import triton.language as tl

from .token_layout_triton import (
    LOWEST,
    VANISHED,
    body_offsets,
    body_pointer,
    edge_offsets,
    has_edges,
    nothing,
    row_head,
    slots,
    spread,
    thread_max,
    thread_sum,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------------------------------ elements
@triton.jit
def _tanh(y):
    """To 2 ulp: Cephes' polynomial (Moshier, tanhf) where 1 - 2 / (1 + e^2y) would cancel."""
    q = y * y
    near = -5.70498872745e-3 * q + 2.06390887954e-2
    near = near * q - 5.37397155531e-2
    near = near * q + 1.33314422036e-1
    near = near * q - 3.33332819422e-1
    near = near * q * y + y
    far = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(y) * (2 * LOG2E)))
    return tl.where(tl.abs(y) < 0.625, near, tl.where(y < 0, -far, far))


@triton.jit
def prepare(x, live, cap, inv_cap, SOFTCAP: tl.constexpr):
    """The soft-capped but untempered logits in float32; `x` is -inf where not `live`, and so is the result."""
    x = x.to(tl.float32)
    if SOFTCAP:
        x = tl.where(live, cap * _tanh(x * inv_cap), float("-inf"))
    return x


# ---------------------------------------------------------------------------------------------------------------- sums
@triton.jit
def no_sums(T: tl.constexpr):
    """Sums of nothing: (pivot, s, w, total, ref_pivot, t, k) of every thread."""
    none = tl.zeros([T], tl.float32)
    return none + LOWEST, none, none, none, none + LOWEST, none, none


@triton.jit
def add_tile(sums, x, z, live, zero, scale, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr):
    """Adds a tile of prepared logits (and the reference's), -inf where not `live`.

    `total` sums differences to `zero`, a number of the logits' size: the sum of logits around 1e4 would lose digits.
    """
    pivot, s, w, total, ref_pivot, t, k = sums
    top = tl.maximum(pivot, thread_max(x))
    du = tl.maximum((pivot - top) * scale, VANISHED)
    f = tl.exp2(du)
    u = (x - spread(top)) * scale
    p = tl.exp2(u)
    if ENTROPY:
        # Clamped, so that 0 * -inf is 0; a NaN comes in through p.
        w = (w + du * s) * f + thread_sum(p * tl.maximum(u, VANISHED))
    if KL:
        ref_top = tl.maximum(ref_pivot, thread_max(z))
        dv = tl.maximum((ref_pivot - ref_top) * scale, VANISHED)
        v = (z - spread(ref_top)) * scale
        k = (k + (du - dv) * s) * f + thread_sum(tl.where(p == 0, 0.0, p * (u - v)))
        t = t * tl.exp2(dv) + thread_sum(tl.exp2(v))
        ref_pivot = ref_top
    if MEAN:
        total += thread_sum(tl.where(live, x - zero, 0.0))
    return top, s * f + thread_sum(p), w, total, ref_pivot, t, k


@triton.jit
def merge_threads(sums, scale, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr):
    """The same seven sums of the whole row, scalars."""
    pivot, s, w, total, ref_pivot, t, k = sums
    top = tl.max(pivot, 0)
    du = tl.maximum((pivot - top) * scale, VANISHED)
    f = tl.exp2(du)
    row_w = nothing()
    row_total = nothing()
    row_t = nothing()
    row_k = nothing()
    ref_top = nothing()
    if ENTROPY:
        row_w = tl.sum((w + du * s) * f, 0)
    if MEAN:
        row_total = tl.sum(total, 0)
    if KL:
        ref_top = tl.max(ref_pivot, 0)
        dv = tl.maximum((ref_pivot - ref_top) * scale, VANISHED)
        row_k = tl.sum((k + (du - dv) * s) * f, 0)
        row_t = tl.sum(t * tl.exp2(dv), 0)
    return top, tl.sum(s * f, 0), row_w, row_total, ref_top, row_t, row_k


# ---------------------------------------------------------------------------------------------------------- statistics
@triton.jit
def _log(s):
    """ln s as (whole powers of two, rest): the hardware's log2 is good to 2^-22 of its result, near 1 only that is
    little enough. Subnormal, infinite and NaN s come out as they are."""
    bits = s.to(tl.int32, bitcast=True)
    whole = tl.where((s >= 1.0e-30) & (s <= 3.0e38), ((bits - 0x3F400000) >> 23), 0)
    rest = (bits - (whole << 23)).to(tl.float32, bitcast=True)
    return whole.to(tl.float64) * LN2, tl.log2(rest).to(tl.float64) * LN2


@triton.jit
def log_sum(pivot, s, inv_t):
    """(m, r, ln s): m + r is the logarithm of a row's sum of exponentials, m that rounded to float32."""
    whole, rest = _log(s)
    log_s = whole + rest
    lse = pivot.to(tl.float64) * inv_t + log_s
    m = lse.to(tl.float32)
    # A row of nothing but -inf has m = -inf, of which nothing can be the rest.
    r = tl.where(m == float("-inf"), 0.0, (lse - m.to(tl.float64)).to(tl.float32))
    return m, r, log_s


@triton.jit
def finish(sums, label, zero, V, inv_t, KL: tl.constexpr):
    """Statistics of a row: (logps, entropy, kl, mean, m, r, ref_m, ref_r); see `finish` in token_stats.h."""
    pivot, s, w, total, ref_pivot, t, k = sums
    m, r, log_s = log_sum(pivot, s, inv_t)
    logps = ((label.to(tl.float64) - pivot.to(tl.float64)) * inv_t - log_s).to(tl.float32)
    entropy = (log_s - (w / s).to(tl.float64) * LN2).to(tl.float32)
    mean = ((total.to(tl.float64) / V + zero.to(tl.float64)) * inv_t).to(tl.float32)
    ref_m = nothing()
    ref_r = nothing()
    kl = nothing()
    if KL:
        ref_m, ref_r, ref_log_s = log_sum(ref_pivot, t, inv_t)
        kl = ((k / s).to(tl.float64) * LN2 - log_s + ref_log_s).to(tl.float32)
    return logps, entropy, kl, mean, m, r, ref_m, ref_r


# ------------------------------------------------------------------------------------------------------------ gradient
@triton.jit
def coefficients(m, r, ref_m, ref_r, entropy, kl, g_logps, g_lse, g_entropy, g_kl, g_mean, V, temperature, inv_t):
    """(pivot, ref_pivot, a, b, g, kappa, delta) of a row; see `coefficients` in token_stats.h."""
    pivot = (m.to(tl.float64) * temperature).to(tl.float32)
    ref_pivot = (ref_m.to(tl.float64) * temperature).to(tl.float32)
    shift = (pivot.to(tl.float64) * inv_t - m.to(tl.float64)).to(tl.float32)  # from rounding the pivots
    ref_shift = (ref_pivot.to(tl.float64) * inv_t - ref_m.to(tl.float64)).to(tl.float32)
    p_scale = (tl.exp2((shift - r) * LOG2E).to(tl.float64) * inv_t).to(tl.float32)
    beta = g_kl - g_entropy
    alpha = g_lse - g_logps + g_entropy * (r - entropy) + g_kl * (ref_r - r - kl) + beta * shift - g_kl * ref_shift
    return (
        pivot,
        ref_pivot,
        alpha * p_scale,
        beta * LN2 * p_scale,
        g_kl * LN2 * p_scale,
        (g_mean.to(tl.float64) * inv_t / V).to(tl.float32),
        (g_logps.to(tl.float64) * inv_t).to(tl.float32),
    )


@triton.jit
def gradient(
    x, z, delta, c, scale, inv_cap, SLOPE: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Gradient of prepared logits, 2^u (a + b u - g v) + kappa + delta, times the soft-cap's slope."""
    pivot, ref_pivot, a, b, g, kappa, _ = c
    u = (x - pivot) * scale
    p = tl.exp2(u)
    if SLOPE:
        slope = a + b * u
        if KL:
            slope -= g * ((z - ref_pivot) * scale)
        dx = tl.where(p == 0, 0.0, p * slope)
    else:
        dx = p * a
    if MEAN:
        dx += kappa
    if delta is not None:
        dx += delta
    if SOFTCAP:
        tanh = x * inv_cap
        dx *= 1.0 - tanh * tanh
    return dx


@triton.jit
def write_label_gradient(
    x_label,
    z_label,
    out_row,
    label,
    c,
    V,
    scale,
    inv_cap,
    SLOPE: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The target's element once more, with its delta: cheaper than to look for the target in every tile.

    The barrier orders this write behind that of the thread which wrote the element's tile.
    """
    tl.debug_barrier()
    dx = gradient(x_label, z_label, c[6], c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
    real = (label >= 0) & (label < V)
    tl.store(out_row + tl.where(real, label, 0), dx.to(out_row.dtype.element_ty), real)


# ---------------------------------------------------------------------------------------------------------- whole rows
@triton.jit
def sum_row(
    x_row,
    z_row,
    V,
    zero,
    scale,
    cap,
    inv_cap,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The seven sums of a row, in one read. The next tile is on its way while a tile is added; ONE: there is one."""
    low = float("-inf")
    head = row_head(x_row, V, VEC)
    edge_at, edge = edge_offsets(head, V, T, VEC)
    sums = no_sums(T)
    if has_edges(head, V, VEC):
        edge_x = prepare(tl.load(x_row + edge_at, edge, other=low), edge, cap, inv_cap, SOFTCAP)
        edge_z = edge_x
        if KL:
            edge_z = prepare(tl.load(z_row + edge_at, edge, other=low), edge, cap, inv_cap, SOFTCAP)
        sums = add_tile(sums, edge_x, edge_z, edge, zero, scale, ENTROPY, KL, MEAN)

    slot = slots(R, T)
    vectors = (V - head) // VEC
    xs = body_pointer(x_row, head, True) + body_offsets(R, T, VEC)
    next_x = tl.load(xs, slot < vectors, other=low)
    if KL:
        zs = body_pointer(z_row, head, ALIGNED) + body_offsets(R, T, VEC)
        next_z = tl.load(zs, slot < vectors, other=low)
    for start in range(0, R * T if ONE else vectors, R * T):
        live = slot < vectors - start
        x = prepare(next_x, live, cap, inv_cap, SOFTCAP)
        z = x
        if KL:
            z = prepare(next_z, live, cap, inv_cap, SOFTCAP)
        if not ONE:
            xs += R * T * VEC
            next_x = tl.load(xs, slot < vectors - start - R * T, other=low)
            if KL:
                zs += R * T * VEC
                next_z = tl.load(zs, slot < vectors - start - R * T, other=low)
        sums = add_tile(sums, x, z, live, zero, scale, ENTROPY, KL, MEAN)
    return merge_threads(sums, scale, ENTROPY, KL, MEAN)


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
        live = slot < vectors - start
        x = prepare(next_x, live, cap, inv_cap, SOFTCAP)
        z = x
        if KL:
            z = prepare(next_z, live, cap, inv_cap, SOFTCAP)
        if not ONE:
            xs += R * T * VEC
            next_x = tl.load(xs, slot < vectors - start - R * T, other=low)
            if KL:
                zs += R * T * VEC
                next_z = tl.load(zs, slot < vectors - start - R * T, other=low)
        dx = gradient(x, z, None, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
        tl.store(outs, dx.to(out_row.dtype.element_ty), live)
        outs += R * T * VEC


@triton.jit
def write_zeros(out_row, V, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """The gradient of an ignored row, whose logits are not read."""
    head = row_head(out_row, V, VEC)
    at, live = edge_offsets(head, V, T, VEC)
    tl.store(out_row + at, tl.zeros([1, T, 1], out_row.dtype.element_ty), live)
    slot = slots(R, T)
    vectors = (V - head) // VEC
    outs = body_pointer(out_row, head, True) + body_offsets(R, T, VEC)
    zeros = tl.zeros([R, T, VEC], out_row.dtype.element_ty)
    for start in range(0, vectors, R * T):
        tl.store(outs, zeros, slot < vectors - start)
        outs += R * T * VEC
