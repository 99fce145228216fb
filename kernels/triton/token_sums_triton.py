"""Sums over one row of logits in Triton, and those of a row that fits into registers; `token_walk_triton.py` has the
longer ones.

The formulas and the names (u, v, s, w, t, k, total, shift) are those of `token_stats.h`. A program (a block of T
threads) owns a row; teams of 32 threads own chunks of it, and walk over them in stripes [T, VEC]: one vector of VEC
elements, 16 bytes, for each thread.

* A row's numbers are the same bits wherever it starts. Element j of a chunk goes to bin j mod 32 * VEC of its team. A
  thread holds VEC bins, and which ones follows from the row's start: where that is off a 16-byte boundary, the bins are
  rotated by up to VEC - 1 places. What meets in a bin, and in which order, does not change, as adding 0 changes
  nothing; and `total_of` adds up the bins in an order that no rotation changes.
* All elements have one shift: the maximum, or what is known of the row before all of it has been seen. Where that
  proves to lie too far from the maximum, the row is summed once more, relative to the maximum.

Triton reads the types in the signatures of kernels, so annotations must not be lazy here. Fused multiply-adds are
spelled out, so that no bit depends on the place at which the compiler meets a formula.
"""

import triton
import triton.language as tl

from .token_formulas_triton import lost, shift_at
from .token_layout_triton import (
    TEAM,
    chunks,
    in_row,
    nothing,
    places,
    prepare,
)


# ---------------------------------------------------------------------------------------------------------------- sums
@triton.jit
def no_sums(T: tl.constexpr, VEC: tl.constexpr):
    """Sums of nothing: (s, w, total, t, k, squares) of every bin."""
    none = tl.zeros([T, VEC], tl.float32)
    return none, none, none, none, none, none


@triton.jit
def terms(
    x, z, valid, at, ref_at, zero, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr
):
    """What prepared logits (and the reference's), -inf where not `valid`, add to the six sums.

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
        d = tl.where(valid, x - zero, 0.0)
    if KL:
        v = tl.fma(z, ref_at[1], -ref_at[2])
        q = tl.exp2(v)
        k = tl.where(p == 0, 0.0, p * (u - v))
    return p, w, d, q, k, p * p


@triton.jit
def add(a, b, ENTROPY: tl.constexpr, KL: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr):
    """The sum of two lots of six; what was not asked for is left alone."""
    s, w, total, t, k, squares = a
    if ENTROPY:
        w += b[1]
    if MEAN:
        total += b[2]
    if KL:
        t += b[3]
        k += b[4]
    if SQUARES:
        squares += b[5]
    return s + b[0], w, total, t, k, squares


@triton.jit
def realigned(bins, head, T: tl.constexpr, VEC: tl.constexpr):
    """Bins moved such that each thread has those of one vector of its chunk, in rotated order. `head`: [T, 1]."""
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
    sums,
    head,
    V,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """The six sums of the whole row, scalars."""
    s, w, total, t, k, squares = sums
    if head > 0:
        _, length, _ = chunks(V, T, VEC)
        own_head = tl.minimum(head, length)
        s = realigned(s, own_head, T, VEC)
        if ENTROPY:
            w = realigned(w, own_head, T, VEC)
        if MEAN:
            total = realigned(total, own_head, T, VEC)
        if KL:
            t = realigned(t, own_head, T, VEC)
            k = realigned(k, own_head, T, VEC)
        if SQUARES:
            squares = realigned(squares, own_head, T, VEC)
    row_w = nothing()
    row_total = nothing()
    row_t = nothing()
    row_k = nothing()
    row_squares = nothing()
    if ENTROPY:
        row_w = total_of(w, T, VEC)
    if MEAN:
        row_total = total_of(total, T, VEC)
    if KL:
        row_t = total_of(t, T, VEC)
        row_k = total_of(k, T, VEC)
    if SQUARES:
        row_squares = total_of(squares, T, VEC)
    return total_of(s, T, VEC), row_w, row_total, row_t, row_k, row_squares


@triton.jit
def sum_others(x_row, label, x_label, V, scale, cap, inv_cap, T: tl.constexpr, SOFTCAP: tl.constexpr):
    """The sum of a row's exps, relative to its target, but for the target's own. The row has just been read: it comes
    from a cache."""
    at = tl.arange(0, T)
    xs = x_row + at
    hole = label.to(tl.int32)
    s = tl.zeros([T], tl.float32)
    for start in range(0, V, T):
        valid = (at < V - start) & (at != hole - start)
        x = prepare(tl.load(xs, valid, other=float("-inf")), valid, cap, inv_cap, SOFTCAP)
        s += tl.exp2((x - x_label) * scale)
        xs += T
    return tl.sum(s, 0)


# ---------------------------------------------------------------------------------------------------------- whole rows
@triton.jit
def raw_largest(stripes):
    """The maximum of a row in registers."""
    top = tl.max(stripes[0], 1)
    for r in tl.static_range(1, len(stripes)):
        top = tl.maximum(top, tl.max(stripes[r], 1))
    return tl.max(top, 0)


@triton.jit
def largest(stripes, cap, inv_cap, SOFTCAP: tl.constexpr):
    """The same, prepared; soft-capping keeps the order."""
    return prepare(raw_largest(stripes), True, cap, inv_cap, SOFTCAP)


@triton.jit
def first_largest(stripes, head, V, T: tl.constexpr, VEC: tl.constexpr):
    """The first element of a row in registers that is as large as any."""
    R: tl.constexpr = len(stripes)
    ring: tl.constexpr = R * TEAM * VEC
    top = raw_largest(stripes)
    begin, length, _ = chunks(V, T, VEC)
    own_head = tl.minimum(head, length)
    first = tl.zeros([T], tl.int32) + V
    for r in tl.static_range(R):
        element = places(r, T, VEC) + own_head
        element = begin + tl.where(element >= ring, element - ring, element)
        here = (stripes[r] == top) & in_row(r, head, V, R, T, VEC)
        first = tl.minimum(first, tl.min(tl.where(here, element, V), 1))
    return tl.min(first, 0)


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
    SQUARES: tl.constexpr,
):
    """Stripe r and the one half the row further on."""
    R: tl.constexpr = len(xs)
    valid = in_row(r, head, V, R, T, VEC)
    x = prepare(xs[r], valid, cap, inv_cap, SOFTCAP)
    z = prepare(zs[r], valid, cap, inv_cap, SOFTCAP)
    a = terms(x, z, valid, at, ref_at, zero, ENTROPY, KL, MEAN, SQUARES)
    valid = in_row(r + R // 2, head, V, R, T, VEC)
    x = prepare(xs[r + R // 2], valid, cap, inv_cap, SOFTCAP)
    z = prepare(zs[r + R // 2], valid, cap, inv_cap, SOFTCAP)
    return add(a, terms(x, z, valid, at, ref_at, zero, ENTROPY, KL, MEAN, SQUARES), ENTROPY, KL, MEAN, SQUARES)


@triton.jit
def sum_stripes(
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
    SQUARES: tl.constexpr,
):
    """The six sums of a row in registers, 2, 4 or 8 stripes `xs` and `zs`.

    Stripes are added in halves too (see `total_of`): then a row's place rotates all of its elements, and no sum.
    """
    here = (xs, zs, head, V, at, ref_at, zero, cap, inv_cap)
    sums = sum_pair(0, *here, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES)
    if len(xs) == 8:
        sums = add(sums, sum_pair(2, *here, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES), ENTROPY, KL, MEAN, SQUARES)
    if len(xs) > 2:
        odd = sum_pair(1, *here, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES)
        if len(xs) == 8:
            odd = add(odd, sum_pair(3, *here, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES), ENTROPY, KL, MEAN, SQUARES)
        sums = add(sums, odd, ENTROPY, KL, MEAN, SQUARES)
    return totals(sums, head, V, T, VEC, ENTROPY, KL, MEAN, SQUARES)


@triton.jit
def sum_registers(
    xs,
    zs,
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
    SQUARES: tl.constexpr,
):
    """(the six sums, shift, the reference's shift, the first largest element if SQUARES) of a row in registers.

    Of a short row, the shift of a plain sum is `zero`, the target: the sum is then one over the target's probability,
    and rarely too large. Only there is the maximum looked for, for which all elements would have to meet beforehand. (A
    longer row would need more registers for its second sum than leave room for a second program.)
    """
    BY_TARGET: tl.constexpr = len(xs) <= 4 and not (ENTROPY or KL)
    top = zero if BY_TARGET else largest(xs, cap, inv_cap, SOFTCAP)
    at = shift_at(top, scale)
    ref_at = at
    if KL:
        ref_at = shift_at(largest(zs, cap, inv_cap, SOFTCAP), scale)
    row = (xs, zs, head, V)
    sums = sum_stripes(*row, at, ref_at, zero, cap, inv_cap, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES)
    if BY_TARGET:
        if lost(sums[0]):
            at = shift_at(largest(xs, cap, inv_cap, SOFTCAP), scale)
            sums = sum_stripes(*row, at, at, zero, cap, inv_cap, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES)
        ref_at = at
    best = head
    if SQUARES:
        best = first_largest(xs, head, V, T, VEC)
    return sums, at, ref_at, best
