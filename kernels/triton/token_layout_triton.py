"""One row of logits in Triton: its elements, where they lie and how threads share them.

* Rows may start anywhere: the body of a row begins at its first 16-byte boundary, so that every load of the body is one
  aligned vector whatever V and the strides are; the up to VEC - 1 elements before the body and after the last whole
  vector, the edges, are read one by one. No element outside the row is ever read or written.
* Nothing but R, T, VEC and what is computed is known at compile time: a new V or batch size compiles nothing.
"""

import functools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def nothing():
    """The scalar 0 of float32, in place of what was not asked for."""
    return tl.full((), 0.0, tl.float32)


# ------------------------------------------------------------------------------------------------------------ elements
@triton.jit
def _tanh(y):
    """To 2 ulp: Cephes' polynomial (Moshier, tanhf) where 1 - 2 / (1 + e^2y) would cancel."""
    q = y * y
    near = tl.fma(q, -5.70498872745e-3, 2.06390887954e-2)
    near = tl.fma(near, q, -5.37397155531e-2)
    near = tl.fma(near, q, 1.33314422036e-1)
    near = tl.fma(near, q, -3.33332819422e-1)
    near = tl.fma(near * q, y, y)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(y) * (2 * LOG2E)))
    return tl.where(tl.abs(y) < 0.625, near, tl.where(y < 0, -far, far))


@triton.jit
def prepare(x, valid, cap, inv_cap, SOFTCAP: tl.constexpr):
    """The soft-capped but untempered logits in float32; `x` is -inf where not `valid`, and so is the result."""
    x = x.to(tl.float32)
    if SOFTCAP:
        x = tl.where(valid, cap * _tanh(x * inv_cap), float("-inf"))
    return x


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


# ------------------------------------------------------------------------------------------------------------ chunks
# What is summed must not depend on where a row starts. So each team of 32 threads takes a chunk of the row, the same
# elements wherever they lie. A chunk too has a body of aligned vectors, and edges. Its places are a ring: element j is
# at place j - head, and the `head` elements before the body are at the end.
TEAM = tl.constexpr(32)


@triton.jit
def chunks(V, T: tl.constexpr, VEC: tl.constexpr):
    """([T, 1] first element and number of elements of each thread's chunk; the number of a whole chunk)."""
    if T == TEAM:
        none = tl.zeros([T, 1], tl.int32)
        return none, none + V, V
    span = tl.cdiv(tl.cdiv(V, VEC), T // TEAM) * VEC
    begin = tl.arange(0, T)[:, None] // TEAM * span
    return begin, tl.minimum(tl.maximum(V - begin, 0), span), span


@triton.jit
def team_slots(T: tl.constexpr):
    """[T, 1]: which vector of a stripe a thread takes."""
    return tl.arange(0, T)[:, None] % TEAM


@triton.jit
def places(r: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """[T, VEC]: places of stripe r in the chunks."""
    return (team_slots(T) + r * TEAM) * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def body_pointers(row, head, V, ALIGNED: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """[T, VEC] pointers to the first stripe, and [T, 1] how many vectors the bodies have."""
    begin, length, _ = chunks(V, T, VEC)
    pointers = body_pointer(row, head, ALIGNED) + begin + places(0, T, VEC)
    return pointers, tl.maximum(length - head, 0) // VEC


@triton.jit
def load_stripes(pointers, vectors, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """R tensors [T, VEC] from `pointers` on; -inf beyond the first `vectors` vectors of a chunk."""
    slot = team_slots(T)
    stripes = ()
    for r in tl.static_range(R):
        stripe = tl.load(pointers + r * TEAM * VEC, slot + r * TEAM < vectors, other=float("-inf"))
        stripes = stripes + (stripe,)  # type: ignore[assignment]  # noqa: RUF005 (Triton cannot unpack)
    return stripes


# ---------------------------------------------------------------------------------------------- whole rows in registers
@triton.jit
def in_row(r: tl.constexpr, head, V, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """[T, VEC]: which places of stripe r, of R that hold the chunks, have an element."""
    _, length, _ = chunks(V, T, VEC)
    own_head = tl.minimum(head, length)
    place = places(r, T, VEC)
    return (place < length - own_head) | (place + own_head >= R * TEAM * VEC)


@triton.jit
def has_edge(r: tl.constexpr, head, V, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """Whether an edge of a chunk may lie in stripe r. All chunks but the last are whole, as R stripes would not be
    taken for a row that leaves half of them empty."""
    _, _, span = chunks(V, T, VEC)
    last = tl.maximum(V - (T // TEAM - 1) * span - head, 0) // VEC
    tails = last // TEAM == r
    if T > TEAM:
        tails = tails | ((span - head) // VEC // TEAM == r)
    return has_edges(head, V, VEC) & (tails | (r == R - 1))


@triton.jit
def edge_elements(head, V, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """([T, 1] elements of the edges, counted from the start of the row; which exist): one for each of some threads.

    Of a team's threads, the second VEC have the elements before the body, the last of them at their end, and the third
    VEC those after it; the fourth VEC have none. Where both belong to the last of the team's R * TEAM vectors of
    places, the second VEC have both, as that vector does. So a vector of places finds its elements in one run.
    """
    begin, length, _ = chunks(V, T, VEC)
    own_head = tl.minimum(head, length)
    rest = tl.maximum(length - head, 0)
    slot = team_slots(T)
    before = slot - 2 * VEC + own_head
    is_before = (slot < 2 * VEC) & (before >= 0)
    after = slot - tl.where(rest // VEC == R * TEAM - 1, VEC, 2 * VEC)
    is_after = (after >= 0) & (after < rest % VEC)
    return begin + tl.where(is_before, before, length - rest % VEC + after), is_before | is_after


@triton.jit
def with_edges(stripe, edges, r: tl.constexpr, head, V, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """Stripe r with the elements of `edge_elements` in their places."""
    _, length, _ = chunks(V, T, VEC)
    vectors = tl.maximum(length - head, 0) // VEC
    slot = team_slots(T)
    first = tl.where(slot + r * TEAM == vectors, 2 * VEC, 3 * VEC)
    if r == R - 1:
        first = tl.where(slot == TEAM - 1, VEC, first)
    teams: tl.constexpr = T // TEAM
    source = tl.reshape(first | tl.arange(0, VEC)[None, :], [teams, TEAM, VEC])
    spread = tl.reshape(tl.broadcast_to(edges, [T, VEC]), [teams, TEAM, VEC])
    found = tl.reshape(tl.gather(spread, source, 1), [T, VEC])
    return tl.where(slot + r * TEAM < vectors, stripe, found)


@triton.jit
def load_row(row, head, V, ALIGNED: tl.constexpr, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr):
    """(R stripes that hold a row, what `edge_elements` names), in float32; -inf where there is no element."""
    pointers, vectors = body_pointers(row, head, V, ALIGNED, T, VEC)
    stripes = load_stripes(pointers, vectors, R, T, VEC)
    edges = tl.full([T, 1], float("-inf"), tl.float32)
    if has_edges(head, V, VEC):
        element, valid = edge_elements(head, V, R, T, VEC)
        edges = tl.load(row + element, valid, other=float("-inf")).to(tl.float32)
    whole = ()
    for r in tl.static_range(R):
        stripe = stripes[r].to(tl.float32)
        if has_edge(r, head, V, R, T, VEC):
            stripe = with_edges(stripe, edges, r, head, V, R, T, VEC)
        whole = whole + (stripe,)  # type: ignore[assignment]  # noqa: RUF005 (Triton cannot unpack)
    return whole, edges


# ------------------------------------------------------------------------------------------------------ configurations
def tile(vocab: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """(R, T, VEC and ONE, number of warps) of the kernels that walk over rows; one of five choices for each dtype."""
    vec = 16 // dtype.itemsize
    vectors = triton.cdiv(vocab, vec)
    warps = 1 if vectors <= 256 else 4 if vectors <= 2048 else 8
    return {"R": 4, "T": 32 * warps, "VEC": vec, "ONE": vectors <= 128 * warps}, warps


MAX_ELEMENTS = 32768
"""Of a row in registers; a quarter where the reference's row and the sums over it are held too. 65,536 half-precision
logits would fit into a multiprocessor's registers as such, but the compiler keeps what it has unpacked, and spills."""


@functools.cache
def lanes_of(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs, elsewhere 32."""
    if device.type != "cuda" or torch.version.hip is None:
        return 32
    return torch.cuda.get_device_properties(device).warp_size


def _for_lanes(r: int, warps: int, lanes: int) -> tuple[dict[str, int], int]:
    """(R and T, number of warps) of a kernel that gives each thread a place in a stripe, from those for warps of 32
    threads: wider warps take wider and fewer stripes, up to the 1,024 threads that a program may have."""
    threads = min(warps * lanes, 1024)
    return {"R": r * warps * 32 // threads, "T": threads}, threads // lanes


def whole_row_tile(vocab: int, dtype: torch.dtype, two: bool, lanes: int) -> tuple[dict[str, int], int] | None:
    """(R, T, VEC and FITS, number of warps) such that R stripes hold a row, in registers; None for longer rows.

    `two`: the reference's row as well. One choice for each power of two.
    """
    vec = 16 // dtype.itemsize
    vectors = max(128, triton.next_power_of_2(triton.cdiv(vocab, vec)))
    if vectors * vec > MAX_ELEMENTS // (4 if two else 1):
        return None
    r = 4 if vectors <= 512 or (two and vec == 8) else 8
    shape, warps = _for_lanes(r, vectors // r // 32, lanes)
    return {**shape, "VEC": vec, "FITS": True}, warps


def sum_tile(vocab: int, dtype: torch.dtype, two: bool, lanes: int) -> tuple[dict[str, int], int]:
    """The same for a kernel that sums rows: those of up to 8 warps in registers, longer ones in a walk over them."""
    whole = whole_row_tile(vocab, dtype, two, lanes)
    if whole is not None and whole[1] <= 8:
        return whole
    tiled, warps = tile(vocab, dtype)
    shape, warps = _for_lanes(tiled["R"], warps, lanes)
    return {**shape, "VEC": tiled["VEC"], "FITS": False}, warps
