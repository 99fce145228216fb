"""Sums over one row of logits in Triton, and the statistics that come of them.

The formulas and the names (u, v, s, w, t, k, total, pivot) are those of `token_stats.h`. A program (a block of T
threads) owns a row; teams of 32 threads own pieces of it, and walk over them in stripes [T, VEC]: one vector of VEC
elements, 16 bytes, for each thread.

* A row's numbers are the same bits wherever it starts. Element j of a piece goes to bin j mod 32 * VEC of its team. A
  thread holds VEC bins, and which ones follows from the row's start: where that is off a 16-byte boundary, the bins are
  rotated by up to VEC - 1 places. What meets in a bin, and in which order, does not change, as adding 0 changes
  nothing; and `total_of` adds up the bins in an order that no rotation changes.
* All elements have one pivot: of a row in registers its maximum, of a longer one the largest of its target and first
  elements. Where that proves to lie too far from the maximum, the row is read once more, relative to the maximum.

Triton reads the types in the signatures of kernels, so annotations must not be lazy here. Fused multiply-adds are
spelled out, so that no bit depends on the place at which the compiler meets a formula.
"""

import triton
import triton.language as tl

from .token_formulas_triton import lost, missed, pivot_at
from .token_layout_triton import (
    TEAM,
    body_pointers,
    has_edges,
    in_row,
    load_row,
    load_stripes,
    nothing,
    pieces,
    prepare,
    row_head,
    team_slots,
)

SAMPLE = tl.constexpr(64)  # first elements of a long row, of which the largest may be its pivot

# How far, in powers of two, the maximum may lie from the pivot. Plain sums only have to stay finite; entropy and KL are
# differences of numbers of the size of log(sum), so theirs must stay near the maximum to keep its digits.
FAR_PLAIN = tl.constexpr(32.0)
FAR = tl.constexpr(16.0)


# ---------------------------------------------------------------------------------------------------------------- sums
@triton.jit
def no_sums(T: tl.constexpr, VEC: tl.constexpr):
    """Sums of nothing: (s, w, total, t, k) of every bin."""
    none = tl.zeros([T, VEC], tl.float32)
    return none, none, none, none, none


@triton.jit
def terms(x, z, live, at, ref_at, zero, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr):
    """What prepared logits (and the reference's), -inf where not `live`, add to the five sums.

    `total` sums differences to `zero`, a number of the logits' size: the sum of logits around 1e4 would lose digits.
    """
    u = tl.fma(x, at[1], -at[2])
    p = tl.exp2(u)
    w = p
    d = p
    q = p
    k = p
    if ENTROPY:
        w = tl.where(p == 0, 0.0, p * u)  # 0 * -inf is 0 here
    if MEAN:
        d = tl.where(live, x - zero, 0.0)
    if KL:
        v = tl.fma(z, ref_at[1], -ref_at[2])
        q = tl.exp2(v)
        k = tl.where(p == 0, 0.0, p * (u - v))
    return p, w, d, q, k


@triton.jit
def add(a, b, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr):
    """The sum of two lots of five; what was not asked for is left alone."""
    s, w, total, t, k = a
    if ENTROPY:
        w += b[1]
    if MEAN:
        total += b[2]
    if KL:
        t += b[3]
        k += b[4]
    return s + b[0], w, total, t, k


@triton.jit
def realigned(bins, head, T: tl.constexpr, VEC: tl.constexpr):
    """Bins moved such that each thread has those of one vector of its piece, in rotated order. `head`: [T, 1]."""
    teams: tl.constexpr = T // TEAM
    before = (tl.arange(0, TEAM)[None, :, None] + (TEAM - 1)) % TEAM
    before = tl.broadcast_to(before, [teams, TEAM, VEC])
    moved = tl.reshape(tl.gather(tl.reshape(bins, [teams, TEAM, VEC]), before, 1), [T, VEC])
    return tl.where(tl.arange(0, VEC)[None, :] + head >= VEC, moved, bins)


@triton.jit
def total_of(bins, T: tl.constexpr, VEC: tl.constexpr):
    """The sum over all (realigned) bins. Those of a vector are added in halves: bin i to bin i + VEC / 2, and so on;
    whatever rotation the bins are in, the same ones meet."""
    if VEC == 8:
        bins = tl.sum(tl.reshape(bins, [T, 2, 4]), 1)
    bins = tl.sum(tl.reshape(bins, [T, 2, 2]), 1)
    return tl.sum(tl.sum(bins, 1), 0)


@triton.jit
def totals(
    sums, head, V, T: tl.constexpr, VEC: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr
):
    """The five sums of the whole row, scalars."""
    s, w, total, t, k = sums
    if head > 0:
        _, length, _ = pieces(V, T, VEC)
        own_head = tl.minimum(head, length)
        s = realigned(s, own_head, T, VEC)
        if ENTROPY:
            w = realigned(w, own_head, T, VEC)
        if MEAN:
            total = realigned(total, own_head, T, VEC)
        if KL:
            t = realigned(t, own_head, T, VEC)
            k = realigned(k, own_head, T, VEC)
    row_w = nothing()
    row_total = nothing()
    row_t = nothing()
    row_k = nothing()
    if ENTROPY:
        row_w = total_of(w, T, VEC)
    if MEAN:
        row_total = total_of(total, T, VEC)
    if KL:
        row_t = total_of(t, T, VEC)
        row_k = total_of(k, T, VEC)
    return total_of(s, T, VEC), row_w, row_total, row_t, row_k


# ---------------------------------------------------------------------------------------------------------- whole rows
@triton.jit
def largest(stripes, cap, inv_cap, SOFTCAP: tl.constexpr):
    """The prepared maximum of a row in registers; soft-capping keeps the order."""
    top = tl.max(stripes[0], 1)
    for r in tl.static_range(1, len(stripes)):
        top = tl.maximum(top, tl.max(stripes[r], 1))
    return prepare(tl.max(top, 0), True, cap, inv_cap, SOFTCAP)


@triton.jit
def sum_pair(
    r: tl.constexpr,
    xs,
    zs,
    head,
    V,
    at,
    ref_at,
    zero,
    cap,
    inv_cap,
    T: tl.constexpr,
    VEC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Stripe r and the one half the row further on."""
    R: tl.constexpr = len(xs)
    live = in_row(r, head, V, R, T, VEC)
    x = prepare(xs[r], live, cap, inv_cap, SOFTCAP)
    z = prepare(zs[r], live, cap, inv_cap, SOFTCAP)
    a = terms(x, z, live, at, ref_at, zero, ENTROPY, KL, MEAN)
    live = in_row(r + R // 2, head, V, R, T, VEC)
    x = prepare(xs[r + R // 2], live, cap, inv_cap, SOFTCAP)
    z = prepare(zs[r + R // 2], live, cap, inv_cap, SOFTCAP)
    return add(a, terms(x, z, live, at, ref_at, zero, ENTROPY, KL, MEAN), ENTROPY, KL, MEAN)


@triton.jit
def sum_stripes(
    row,
    T: tl.constexpr,
    VEC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The five sums of a row in registers: 2, 4 or 8 stripes and their edges.

    Stripes are added in halves too (see `total_of`): then a row's place rotates all of its elements, and no sum.
    """
    R: tl.constexpr = len(row[0])
    sums = sum_pair(0, *row, T, VEC, SOFTCAP, ENTROPY, KL, MEAN)
    if R == 8:
        sums = add(sums, sum_pair(2, *row, T, VEC, SOFTCAP, ENTROPY, KL, MEAN), ENTROPY, KL, MEAN)
    if R > 2:
        odd = sum_pair(1, *row, T, VEC, SOFTCAP, ENTROPY, KL, MEAN)
        if R == 8:
            odd = add(odd, sum_pair(3, *row, T, VEC, SOFTCAP, ENTROPY, KL, MEAN), ENTROPY, KL, MEAN)
        sums = add(sums, odd, ENTROPY, KL, MEAN)
    return totals(sums, row[2], row[3], T, VEC, ENTROPY, KL, MEAN)


@triton.jit
def sum_registers(
    xs,
    zs,
    x_row,
    x_label,
    head,
    V,
    zero,
    scale,
    cap,
    inv_cap,
    T: tl.constexpr,
    VEC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """(the five sums, pivot, the reference's pivot) of a row in registers.

    Relative to the target, a plain sum is one over its probability, and seldom too large: the maximum, for which all
    threads would have to meet, is looked for in the other rows alone.
    """
    if ENTROPY or KL:
        at = pivot_at(largest(xs, cap, inv_cap, SOFTCAP), scale)
        ref_at = at
        if KL:
            ref_at = pivot_at(largest(zs, cap, inv_cap, SOFTCAP), scale)
        sums = sum_stripes((xs, zs, head, V, at, ref_at, zero, cap, inv_cap), T, VEC, SOFTCAP, ENTROPY, KL, MEAN)
    else:
        at = pivot_at(x_label, scale)
        sums = sum_stripes((xs, zs, head, V, at, at, zero, cap, inv_cap), T, VEC, SOFTCAP, ENTROPY, KL, MEAN)
        if lost(sums[0], FAR_PLAIN):
            xs, _ = load_row(x_row, head, V, True, len(xs), T, VEC)
            at = pivot_at(largest(xs, cap, inv_cap, SOFTCAP), scale)
            sums = sum_stripes((xs, zs, head, V, at, at, zero, cap, inv_cap), T, VEC, SOFTCAP, ENTROPY, KL, MEAN)
        ref_at = at
    return sums, at, ref_at, xs


# ---------------------------------------------------------------------------------------------------------- longer rows
@triton.jit
def add_edge(
    sums,
    tops,
    head,
    V,
    x_row,
    z_row,
    at,
    ref_at,
    zero,
    cap,
    inv_cap,
    AFTER: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Adds the elements before the pieces' bodies, or after them: (sums, raw maxima of x and z)."""
    begin, length, _ = pieces(V, T, VEC)
    own_head = tl.minimum(head, length)
    vectors = (length - own_head) // VEC
    lane = tl.arange(0, VEC)[None, :]
    if AFTER:
        at_edge = own_head + vectors * VEC + lane
        live = (team_slots(T) == vectors % TEAM) & (at_edge < length)
    else:
        at_edge = own_head - VEC + lane
        live = (team_slots(T) == TEAM - 1) & (at_edge >= 0)
    raw_x = tl.load(x_row + (begin + at_edge), live, other=float("-inf"))
    raw_z = raw_x
    if KL:
        raw_z = tl.load(z_row + (begin + at_edge), live, other=float("-inf"))
    x = prepare(raw_x, live, cap, inv_cap, SOFTCAP)
    z = prepare(raw_z, live, cap, inv_cap, SOFTCAP)
    sums = add(sums, terms(x, z, live, at, ref_at, zero, ENTROPY, KL, MEAN), ENTROPY, KL, MEAN)
    return sums, higher(tops, raw_x, raw_z, KL)


@triton.jit
def higher(tops, raw_x, raw_z, KL: tl.constexpr):
    """[T] maxima of raw logits and the reference's, raised by a stripe."""
    top, ref_top = tops
    top = tl.maximum(top, tl.max(raw_x.to(tl.float32), 1))
    if KL:
        ref_top = tl.maximum(ref_top, tl.max(raw_z.to(tl.float32), 1))
    return top, ref_top


@triton.jit
def sample_top(row, V, x_label, cap, inv_cap, T: tl.constexpr, SOFTCAP: tl.constexpr):
    """The largest of a row's first elements and its target, prepared."""
    i = tl.arange(0, T)
    x = tl.load(row + i, i < tl.minimum(V, SAMPLE), other=float("-inf"))
    return tl.maximum(prepare(tl.max(x.to(tl.float32), 0), True, cap, inv_cap, SOFTCAP), x_label)


@triton.jit
def walk(
    x_row,
    z_row,
    V,
    at,
    ref_at,
    zero,
    cap,
    inv_cap,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """(the sums of the bins, the raw maximum, the reference's) of a row of any length, in one read. The next R stripes
    are on their way while R stripes are added."""
    head = row_head(x_row, V, VEC)
    edges = has_edges(head, V, VEC)
    _, _, span = pieces(V, T, VEC)
    sums = no_sums(T, VEC)
    low = tl.full([T], float("-inf"), tl.float32)
    tops = (low, low)
    xs, vectors = body_pointers(x_row, head, V, True, T, VEC)
    next_x = load_stripes(xs, vectors, R, T, VEC)
    if KL:
        zs, _ = body_pointers(z_row, head, V, ALIGNED, T, VEC)
        next_z = load_stripes(zs, vectors, R, T, VEC)
    if edges:
        sums, tops = add_edge(
            *(sums, tops, head, V, x_row, z_row, at, ref_at, zero, cap, inv_cap),
            *(False, T, VEC, SOFTCAP, ENTROPY, KL, MEAN),
        )
    slot = team_slots(T)
    for start in range(0, (span - head) // VEC, R * TEAM):
        raw_x = next_x
        raw_z = raw_x
        xs += R * TEAM * VEC
        next_x = load_stripes(xs, vectors - start - R * TEAM, R, T, VEC)
        if KL:
            raw_z = next_z
            zs += R * TEAM * VEC
            next_z = load_stripes(zs, vectors - start - R * TEAM, R, T, VEC)
        for r in tl.static_range(R):
            live = slot + r * TEAM < vectors - start
            x = prepare(raw_x[r], live, cap, inv_cap, SOFTCAP)
            z = prepare(raw_z[r], live, cap, inv_cap, SOFTCAP)
            tops = higher(tops, raw_x[r], raw_z[r], KL)
            sums = add(sums, terms(x, z, live, at, ref_at, zero, ENTROPY, KL, MEAN), ENTROPY, KL, MEAN)
    if edges:
        sums, tops = add_edge(
            *(sums, tops, head, V, x_row, z_row, at, ref_at, zero, cap, inv_cap),
            *(True, T, VEC, SOFTCAP, ENTROPY, KL, MEAN),
        )
    return sums, tl.max(tops[0], 0), tl.max(tops[1], 0)


@triton.jit
def sum_row(
    x_row,
    z_row,
    x_label,
    z_label,
    V,
    zero,
    scale,
    cap,
    inv_cap,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
):
    """(the five sums, pivot, the reference's pivot) of a row of any length, in one read unless the pivot was missed."""
    at = pivot_at(sample_top(x_row, V, x_label, cap, inv_cap, T, SOFTCAP), scale)
    ref_at = at
    if KL:
        ref_at = pivot_at(sample_top(z_row, V, z_label, cap, inv_cap, T, SOFTCAP), scale)
    FAR_OFF: tl.constexpr = FAR if ENTROPY or KL else FAR_PLAIN
    sums = no_sums(T, VEC)
    again = V > 0
    length = V
    while again:
        sums, top, ref_top = walk(
            *(x_row, z_row, length, at, ref_at, zero, cap, inv_cap),
            *(R, T, VEC, ALIGNED, SOFTCAP, ENTROPY, KL, MEAN),
        )
        top = prepare(top, True, cap, inv_cap, SOFTCAP)
        again = missed(at, top, FAR_OFF)
        if KL:
            ref_top = prepare(ref_top, True, cap, inv_cap, SOFTCAP)
            again = again | missed(ref_at, ref_top, FAR_OFF)
        if again:
            length = tl.where(top == top, V, 0)  # V, but unknown to the compiler, which would keep too much at hand
            at = pivot_at(top, scale)
            if KL:
                ref_at = pivot_at(ref_top, scale)
    return totals(sums, row_head(x_row, V, VEC), V, T, VEC, ENTROPY, KL, MEAN), at, ref_at
