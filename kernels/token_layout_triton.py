"""Where the elements of a row lie and how threads share them: the geometry under `token_rows_triton.py`."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e38)  # a pivot below all logits, with which differences stay finite
VANISHED = tl.constexpr(-200.0)  # 2^-200 is 0 in float32


@triton.jit
def nothing():
    """The scalar 0 of float32, in place of what was not asked for."""
    return tl.full((), 0.0, tl.float32)


@triton.jit
def thread_max(x):
    """[R, T, VEC] -> [T], within threads."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def thread_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def spread(x):
    """[T] -> [1, T, 1]."""
    return x[None, :, None]


# ------------------------------------------------------------------------------------------------------------ geometry
@triton.jit
def row_pointer(pointer, row, inner, outer_stride, inner_stride):
    """Start of a row; the leading dimensions of a tensor are two at most, of which the last has size `inner`."""
    outer = row * 0
    if row >= inner:  # not where rows are evenly spaced, which spares the division
        outer = row // inner
    return pointer + (outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride)


@triton.jit
def row_head(pointer, V, VEC: tl.constexpr):
    """Elements of a row before its first 16-byte boundary."""
    address = pointer.to(tl.int64, bitcast=True)
    bytes_each: tl.constexpr = 16 // VEC
    return tl.minimum(((-address) & 15).to(tl.int32) // bytes_each, V)


@triton.jit
def body_pointer(row, head, ALIGNED: tl.constexpr):
    """Start of a row's body, promised to lie on a 16-byte boundary where it does."""
    pointer = row + head
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def slots(R: tl.constexpr, T: tl.constexpr):
    """[R, T, 1]: which vector of a tile a thread takes."""
    return tl.arange(0, R)[:, None, None] * T + tl.arange(0, T)[None, :, None]


@triton.jit
def body_offsets(R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """[R, T, VEC]: elements of the first tile, counted from the start of the body."""
    return slots(R, T) * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def edge_offsets(head, V, T: tl.constexpr, VEC: tl.constexpr):
    """([1, T, 1] elements of the edges, counted from the start of the row; which of them exist)."""
    i = tl.arange(0, T)[None, :, None]
    tail = head + (V - head) // VEC * VEC
    at = tl.where(i < VEC, i, tail + i - VEC)
    return at, tl.where(i < VEC, i < head, at < V)


@triton.jit
def has_edges(head, V, VEC: tl.constexpr):
    return (head > 0) | ((V - head) % VEC > 0)
