"""Token statistics in Triton, forward and backward: any GPU that Triton knows; semantics as in `token_stats_eager.py`.

The kernels put together what `token_sums_triton.py` and `token_gradient_triton.py` offer for one row. A launch is
described before it is made (`Launch`), so that the same description can be compiled ahead of time without a GPU.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..token_call import TokenCall
from ..token_results import new_diagnostics, new_saved, new_statistics
from .token_formulas_triton import SURE, coefficients, finish, log_sum_of_squares, make_sure
from .token_gradient_triton import label_gradient, write_gradient, write_label_gradient, write_zeros
from .token_layout_triton import (
    LOG2E,
    lanes_of,
    load_row,
    nothing,
    prepare,
    row_head,
    row_pointer,
    sum_tile,
    tile,
)
from .token_sums_triton import sum_others, sum_registers
from .token_walk_triton import sum_row

# Neither values nor alignments of arguments are compiled in: kernels find the 16-byte boundaries of rows by themselves.
_SCALARS = ("x_outer", "x_inner", "z_outer", "z_inner", "out_outer", "out_inner", "inner", "V", "ignore_index")
_POINTERS = tuple(
    f"{name}_ptr"
    for name in (
        *("x", "z", "out", "labels", "logps", "lse", "entropy", "kl", "mean", "saved", "log_sum_sq", "argmax"),
        *("g_logps", "g_lse", "g_entropy", "g_kl", "g_mean", "weight", *(f"input{i}" for i in range(8))),
    )
)


def row_kernel(function):
    """`triton.jit` that compiles for types alone."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[n for n in names if n in _SCALARS],
        do_not_specialize_on_alignment=[n for n in names if n in _POINTERS],
    )


@triton.jit
def optional(pointer, row):
    """A row's number, 0 where there is no such tensor."""
    value = nothing()
    if pointer is not None:
        value = tl.load(pointer + row)
    return value


@triton.jit
def store_optional(pointer, row, value):
    if pointer is not None:
        tl.store(pointer + row, value)


@triton.jit
def store_statistics(logps_ptr, lse_ptr, entropy_ptr, kl_ptr, mean_ptr, row, logps, lse, entropy, kl, mean):
    tl.store(logps_ptr + row, logps)
    tl.store(lse_ptr + row, lse)
    store_optional(entropy_ptr, row, entropy)
    store_optional(kl_ptr, row, kl)
    store_optional(mean_ptr, row, mean)


@triton.jit
def label_logit(x_row, label, V, cap, inv_cap, SOFTCAP: tl.constexpr):
    """The target's prepared logit; NaN for a label outside the vocabulary, which is not read."""
    real = (label >= 0) & (label < V)
    x = tl.load(x_row + tl.where(real, label, 0), real, other=float("nan"))
    return prepare(x, real, cap, inv_cap, SOFTCAP)


@triton.jit
def finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@row_kernel
def forward_kernel(
    x_ptr,
    x_outer: tl.int64,
    x_inner: tl.int64,
    z_ptr,
    z_outer: tl.int64,
    z_inner: tl.int64,
    labels_ptr,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    kl_ptr,
    mean_ptr,
    saved_ptr,
    log_sum_sq_ptr,
    argmax_ptr,
    inner: tl.int32,
    V: tl.int32,
    ignore_index: tl.int64,
    scale: tl.float32,
    temperature: tl.float64,
    inv_t: tl.float64,
    cap: tl.float32,
    inv_cap: tl.float32,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    FITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    none = nothing()
    if label == ignore_index:
        store_statistics(logps_ptr, lse_ptr, entropy_ptr, kl_ptr, mean_ptr, row, none, none, none, none, none)
        tl.store(saved_ptr + row.to(tl.int64) * 4 + tl.arange(0, 4), tl.zeros([4], tl.float32))
        if log_sum_sq_ptr is not None:
            tl.store(log_sum_sq_ptr + row, none)
            tl.store(argmax_ptr + row, tl.full((), -1, tl.int64))
        return
    x_row = row_pointer(x_ptr, row, inner, x_outer, x_inner)
    z_row = x_row
    if z_ptr is not None:
        z_row = row_pointer(z_ptr, row, inner, z_outer, z_inner)
    KL: tl.constexpr = z_ptr is not None
    ENTROPY: tl.constexpr = entropy_ptr is not None
    MEAN: tl.constexpr = mean_ptr is not None
    SQUARES: tl.constexpr = log_sum_sq_ptr is not None
    x_label = label_logit(x_row, label, V, cap, inv_cap, SOFTCAP)
    zero = finite(x_label)
    if FITS:
        head = row_head(x_row, V, VEC)
        xs, _ = load_row(x_row, head, V, True, R, T, VEC)
        zs = xs
        if KL:
            zs, _ = load_row(z_row, head, V, ALIGNED, R, T, VEC)
        sums, at, ref_at, best = sum_registers(
            *(xs, zs, head, V, zero, scale, cap, inv_cap), *(T, VEC, SOFTCAP, ENTROPY, KL, MEAN, SQUARES)
        )
    else:
        z_label = x_label
        if KL:
            z_label = label_logit(z_row, label, V, cap, inv_cap, SOFTCAP)
        sums, at, ref_at, best = sum_row(
            *(x_row, z_row, x_label, z_label, V, zero, scale, cap, inv_cap),
            *(R, T, VEC, ALIGNED, SOFTCAP, ENTROPY, KL, MEAN, SQUARES),
        )
    logps, lse, entropy, kl, mean, m, r, ref_m, ref_r = finish(
        sums, at, ref_at, x_label, zero, V, temperature, inv_t, KL
    )
    if SQUARES:
        tl.store(log_sum_sq_ptr + row, log_sum_of_squares(sums))
        tl.store(argmax_ptr + row, tl.where(tl.abs(lse) < float("inf"), best, -1).to(tl.int64))
    # `row`, by two ways, and `V`, which the compiler does not see through: it would keep what it has made of them at
    # hand while the row is summed.
    there = tl.where(V >= 0, row, 0)
    if logps > SURE:
        again = tl.where(x_label == x_label, row, 0)
        length = tl.where(x_label == x_label, V, 0)
        hole = tl.load(labels_ptr + again).to(tl.int64)
        x_again = row_pointer(x_ptr, again, inner, x_outer, x_inner)
        others = sum_others(x_again, hole, x_label, length, scale, cap, inv_cap, 2 * T, SOFTCAP)
        logps, lse, m, r = make_sure(others, x_label, inv_t)
    store_statistics(logps_ptr, lse_ptr, entropy_ptr, kl_ptr, mean_ptr, row, logps, lse, entropy, kl, mean)
    saved = saved_ptr + there.to(tl.int64) * 4
    tl.store(saved, m)
    tl.store(saved + 1, r)
    tl.store(saved + 2, ref_m)
    tl.store(saved + 3, ref_r)


@row_kernel
def backward_kernel(
    x_ptr,
    x_outer: tl.int64,
    x_inner: tl.int64,
    z_ptr,
    z_outer: tl.int64,
    z_inner: tl.int64,
    out_ptr,
    out_outer: tl.int64,
    out_inner: tl.int64,
    labels_ptr,
    saved_ptr,
    entropy_ptr,
    kl_ptr,
    g_logps_ptr,
    g_lse_ptr,
    g_entropy_ptr,
    g_kl_ptr,
    g_mean_ptr,
    inner: tl.int32,
    V: tl.int32,
    ignore_index: tl.int64,
    scale: tl.float32,
    inv_t: tl.float64,
    cap: tl.float32,
    inv_cap: tl.float32,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    out_row = row_pointer(out_ptr, row, inner, out_outer, out_inner)
    if label == ignore_index:
        write_zeros(out_row, V, R, T, VEC)
        return
    x_row = row_pointer(x_ptr, row, inner, x_outer, x_inner)
    z_row = x_row
    KL: tl.constexpr = g_kl_ptr is not None
    if KL:
        z_row = row_pointer(z_ptr, row, inner, z_outer, z_inner)
    g_kl = optional(g_kl_ptr, row)
    if KL:  # noqa: SIM102 (known when it is compiled)
        if g_kl == 0:  # any finite number where x is one: the reference may be -inf there
            z_row = x_row
    saved = saved_ptr + row.to(tl.int64) * 4
    c = coefficients(
        tl.load(saved),
        tl.load(saved + 1),
        tl.load(saved + 2),
        tl.load(saved + 3),
        optional(entropy_ptr, row),
        optional(kl_ptr, row),
        optional(g_logps_ptr, row),
        optional(g_lse_ptr, row),
        optional(g_entropy_ptr, row),
        g_kl,
        optional(g_mean_ptr, row),
        V,
        inv_t,
    )
    SLOPE: tl.constexpr = KL or g_entropy_ptr is not None
    MEAN: tl.constexpr = g_mean_ptr is not None
    x_label = label_logit(x_row, label, V, cap, inv_cap, SOFTCAP)
    z_label = x_label
    if KL:
        z_label = label_logit(z_row, label, V, cap, inv_cap, SOFTCAP)
    if g_logps_ptr is not None:
        at_label = label_gradient(x_label, z_label, c, scale, inv_cap, SLOPE, KL, MEAN, SOFTCAP)
    tl.debug_barrier()  # in place, another warp may write over the target's logit before this one has read it
    write_gradient(x_row, z_row, out_row, c, V, scale, cap, inv_cap, R, T, VEC, ONE, ALIGNED, SOFTCAP, SLOPE, KL, MEAN)
    if g_logps_ptr is not None:
        label = tl.load(labels_ptr + row).to(tl.int64)  # once more: it is not kept at hand while the row is written
        write_label_gradient(at_label, out_row, label, V)


# ------------------------------------------------------------------------------------------------------------ launches
class Launch(NamedTuple):
    """A kernel and all that it is called with: `arguments` in the order of its signature, constexprs among them."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int

    def run(self) -> None:
        if self.grid:
            self.kernel[(self.grid,)](**self.arguments, num_warps=self.num_warps)


def _merged(tensors: dict[str, Tensor]) -> list[tuple[int, dict[str, int]]]:
    """(size, strides by name) of the leading dimensions of tensors of one shape, merged where they are dense."""
    dims: list[tuple[int, dict[str, int]]] = []
    for i, size in enumerate(next(iter(tensors.values())).shape[:-1]):
        strides = {name: t.stride(i) for name, t in tensors.items()}
        if size == 1:
            continue
        if dims and all(dims[-1][1][name] == size * s for name, s in strides.items()):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    return dims


def _geometry(tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Arguments that say where the rows of `x` (and `z` and `out`, where given) are: strides, `inner`, `V`, ALIGNED.

    None where the leading dimensions are more than two after merging.
    """
    dims = _merged(tensors)
    if len(dims) > 2:
        return None
    (_, outer), (inner, last) = [(1, dict.fromkeys(tensors, 0))] * (2 - len(dims)) + dims
    x = tensors["x"]
    starts = [
        [n * t.itemsize % 16 for n in (outer[name], last[name])] + [t.data_ptr() % 16] for name, t in tensors.items()
    ]
    arguments: dict[str, Any] = {"inner": inner, "V": x.shape[-1], "ALIGNED": all(s == starts[0] for s in starts)}
    for name in tensors:
        arguments |= {f"{name}_outer": outer[name], f"{name}_inner": last[name]}
    return arguments


def launches(
    kernel, logits: dict[str, Tensor | None], per_row: dict[str, Tensor | None], options: dict[str, Any], configuration
) -> Iterator[Launch]:
    """The launches that cover all rows: one, or one for each index of a leading dimension too many.

    Args:
        kernel: made by `row_kernel`.
        logits: tensors [..., V] named "x", "z", "out"; None where there is none.
        per_row: dense tensors of the leading dimensions (`saved`: with four more), by argument name without "_ptr".
        options: further arguments; those that the kernel does not know are left out.
        configuration: (constexprs, number of warps).
    """
    present = {name: t for name, t in logits.items() if t is not None}
    geometry = _geometry(present)
    if geometry is None:
        for i in range(present["x"].shape[0]):
            part, rows = ({n: None if t is None else t[i] for n, t in g.items()} for g in (logits, per_row))
            yield from launches(kernel, part, rows, options, configuration)
        return
    constexprs, warps = configuration
    known = {f"{name}_ptr": t for name, t in {**logits, **per_row}.items()} | geometry | options | constexprs
    arguments = {name: known.get(name, 0) for name in kernel.arg_names}
    yield Launch(kernel, math.prod(present["x"].shape[:-1]), arguments, warps)


def scalars(call: TokenCall) -> dict[str, Any]:
    """What the kernels need to know of the options of a call, by argument name."""
    ignore_index, temperature, softcap = call.options
    return {
        "ignore_index": ignore_index,
        "scale": LOG2E.value / temperature,
        "temperature": temperature,
        "inv_t": 1 / temperature,
        "cap": softcap,
        "inv_cap": 1 / softcap if softcap else 0.0,
        "SOFTCAP": softcap != 0,
    }


def forward(
    call: TokenCall,
    want_entropy: bool,
    want_mean: bool,
    want_diagnostics: bool = False,
    *,
    lanes: int | None = None,
) -> tuple[list[Launch], tuple]:
    """(launches, results that they fill); arguments and results as in `token_stats_eager.forward`.

    `lanes`: threads of a warp; None: of the logits' device.
    """
    logits, labels, reference = call[:3]
    names = ("logps", "lse", "entropy", "kl", "mean", "saved", "log_sum_sq", "argmax")
    found = new_statistics(labels, want_entropy, reference is not None, want_mean)
    more = new_diagnostics(found[0]) if want_diagnostics else ()
    results = (*found, new_saved(found[0]), *more)
    planned = launches(
        forward_kernel,
        {"x": logits, "z": reference},
        {"labels": labels.contiguous(), **dict(zip(names, (*results, None, None)[:8], strict=True))},
        scalars(call),
        sum_tile(logits.shape[-1], logits.dtype, reference is not None, lanes or lanes_of(logits.device)),
    )
    return list(planned), results


def backward(
    call: TokenCall,
    saved: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    grads: tuple[Tensor | None, ...],
    out: Tensor,
) -> list[Launch]:
    """The launches that write the gradient of the logits into `out`, which may be `call.logits` itself."""
    logits, labels, reference = call[:3]
    names = ("g_logps", "g_lse", "g_entropy", "g_kl", "g_mean")
    per_row = {"labels": labels, "saved": saved, "entropy": entropy, "kl": kl, **dict(zip(names, grads, strict=True))}
    planned = launches(
        backward_kernel,
        {"x": logits, "z": reference if per_row["g_kl"] is not None else None, "out": out},
        {name: None if t is None else t.contiguous() for name, t in per_row.items()},
        scalars(call),
        tile(logits.shape[-1], logits.dtype),
    )
    return list(planned)
