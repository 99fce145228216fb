"""Sums over one row of logits of any length in Triton, which its program walks over; see `token_sums_triton.py`.

The shift of all elements is the largest of the row's target and first elements. Where that proves to lie too far from
the maximum, the row is read once more, relative to the maximum.
"""

import triton
import triton.language as tl

from .token_formulas_triton import FAR, FAR_PLAIN, missed, shift_at
from .token_layout_triton import (
    TEAM,
    body_pointers,
    chunks,
    has_edges,
    load_stripes,
    prepare,
    row_head,
    team_slots,
)
from .token_sums_triton import add, no_sums, terms, totals

SAMPLE = tl.constexpr(64)  # first elements of a row, of which the largest may be its shift


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
    SQUARES: tl.constexpr,
):
    """Adds the elements before the chunks' bodies, or after them: (sums, what `higher` keeps)."""
    begin, length, _ = chunks(V, T, VEC)
    own_head = tl.minimum(head, length)
    vectors = (length - own_head) // VEC
    lane = tl.arange(0, VEC)[None, :]
    if AFTER:
        at_edge = own_head + vectors * VEC + lane
        valid = (team_slots(T) == vectors % TEAM) & (at_edge < length)
    else:
        at_edge = own_head - VEC + lane
        valid = (team_slots(T) == TEAM - 1) & (at_edge >= 0)
    raw_x = tl.load(x_row + (begin + at_edge), valid, other=float("-inf"))
    raw_z = raw_x
    if KL:
        raw_z = tl.load(z_row + (begin + at_edge), valid, other=float("-inf"))
    x = prepare(raw_x, valid, cap, inv_cap, SOFTCAP)
    z = prepare(raw_z, valid, cap, inv_cap, SOFTCAP)
    sums = add(sums, terms(x, z, valid, at, ref_at, zero, ENTROPY, KL, MEAN, SQUARES), ENTROPY, KL, MEAN, SQUARES)
    return sums, higher(tops, raw_x, raw_z, tl.max(begin + at_edge, 1) - (VEC - 1), KL, SQUARES)


@triton.jit
def higher(tops, raw_x, raw_z, first, KL: tl.constexpr, SQUARES: tl.constexpr):
    """[T] maxima of raw logits and the reference's, raised by a stripe, and the first element, `first` [T], of the
    vector that had the former."""
    top, ref_top, at = tops
    here = tl.max(raw_x.to(tl.float32), 1)
    if SQUARES:
        at = tl.where(here > top, first, at)
    top = tl.maximum(top, here)
    if KL:
        ref_top = tl.maximum(ref_top, tl.max(raw_z.to(tl.float32), 1))
    return top, ref_top, at


@triton.jit
def first_of(x_row, tops, V, VEC: tl.constexpr):
    """The row's first element that is as large as any: in one of the vectors at hand, which are read once more."""
    top, _, at = tops
    most = tl.max(top, 0)
    element = at[:, None] + tl.arange(0, VEC)[None, :]
    there = (top == most)[:, None] & (element >= 0) & (element < V)
    x = tl.load(x_row + element, there, other=float("-inf")).to(tl.float32)
    return tl.min(tl.min(tl.where(there & (x == most), element, V), 1), 0)


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
    SQUARES: tl.constexpr,
):
    """(the sums of the bins, the raw maximum, the reference's, the first largest element if SQUARES) of a row of any
    length, in one read. The next R stripes are on their way while R stripes are added."""
    head = row_head(x_row, V, VEC)
    edges = has_edges(head, V, VEC)
    _, _, span = chunks(V, T, VEC)
    sums = no_sums(T, VEC)
    low = tl.full([T], float("-inf"), tl.float32)
    tops = (low, low, tl.zeros([T], tl.int32))
    xs, vectors = body_pointers(x_row, head, V, True, T, VEC)
    next_x = load_stripes(xs, vectors, R, T, VEC)
    if KL:
        zs, _ = body_pointers(z_row, head, V, ALIGNED, T, VEC)
        next_z = load_stripes(zs, vectors, R, T, VEC)
    if edges:
        sums, tops = add_edge(
            *(sums, tops, head, V, x_row, z_row, at, ref_at, zero, cap, inv_cap),
            *(False, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES),
        )
    slot = team_slots(T)
    begin, length, _ = chunks(V, T, VEC)
    body = tl.max(begin + tl.minimum(head, length) + slot * VEC, 1)
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
            valid = slot + r * TEAM < vectors - start
            x = prepare(raw_x[r], valid, cap, inv_cap, SOFTCAP)
            z = prepare(raw_z[r], valid, cap, inv_cap, SOFTCAP)
            tops = higher(tops, raw_x[r], raw_z[r], body + (start + r * TEAM) * VEC, KL, SQUARES)
            sums = add(
                sums, terms(x, z, valid, at, ref_at, zero, ENTROPY, KL, MEAN, SQUARES), ENTROPY, KL, MEAN, SQUARES
            )
    if edges:
        sums, tops = add_edge(
            *(sums, tops, head, V, x_row, z_row, at, ref_at, zero, cap, inv_cap),
            *(True, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES),
        )
    best = head
    if SQUARES:
        best = first_of(x_row, tops, V, VEC)
    return sums, tl.max(tops[0], 0), tl.max(tops[1], 0), best


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
    SQUARES: tl.constexpr,
):
    """(the six sums, shift, the reference's shift, the first largest element if SQUARES) of a row of any length, in one
    read unless the shift was missed."""
    at = shift_at(sample_top(x_row, V, x_label, cap, inv_cap, T, SOFTCAP), scale)
    ref_at = at
    if KL:
        ref_at = shift_at(sample_top(z_row, V, z_label, cap, inv_cap, T, SOFTCAP), scale)
    FAR_OFF: tl.constexpr = FAR if ENTROPY or KL else FAR_PLAIN
    sums = no_sums(T, VEC)
    again = V > 0
    length = V
    best = V
    while again:
        sums, top, ref_top, best = walk(
            *(x_row, z_row, length, at, ref_at, zero, cap, inv_cap),
            *(R, T, VEC, ALIGNED, SOFTCAP, ENTROPY, KL, MEAN, SQUARES),
        )
        top = prepare(top, True, cap, inv_cap, SOFTCAP)
        again = missed(at, top, FAR_OFF)
        if KL:
            ref_top = prepare(ref_top, True, cap, inv_cap, SOFTCAP)
            again = again | missed(ref_at, ref_top, FAR_OFF)
        if again:
            length = tl.where(top == top, V, 0)  # V, but unknown to the compiler, which would keep too much at hand
            at = shift_at(top, scale)
            if KL:
                ref_at = shift_at(ref_top, scale)
    return totals(sums, row_head(x_row, V, VEC), V, T, VEC, ENTROPY, KL, MEAN, SQUARES), at, ref_at, best
