"""The one-launch token objective in Triton: a row's statistics, the slopes of its loss and the gradient of its logits.

The loss is a program of scalar steps (see `loss_program_triton.py`). A row that fits into registers is read once and
its gradient written once; a longer one is read a second time, mostly from the cache that it has just passed through.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..token_call import TokenCall
from ..token_results import new_statistics
from .loss_program_triton import depends, slope, values
from .token_formulas_triton import SURE, coefficients, finish, make_sure
from .token_gradient_triton import (
    label_gradient,
    write_edges,
    write_gradient,
    write_label_gradient,
    write_registers,
    write_zeros,
)
from .token_layout_triton import lanes_of, load_row, nothing, row_head, row_pointer, sum_tile, whole_row_tile
from .token_stats_triton import (
    Launch,
    finite,
    label_logit,
    launches,
    optional,
    row_kernel,
    scalars,
    store_statistics,
)
from .token_sums_triton import sum_others, sum_registers
from .token_walk_triton import sum_row


# ------------------------------------------------------------------------------------------------------------- kernels
@row_kernel
def objective_kernel(
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
    weight_ptr,
    input0_ptr,
    input1_ptr,
    input2_ptr,
    input3_ptr,
    input4_ptr,
    input5_ptr,
    input6_ptr,
    input7_ptr,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    kl_ptr,
    mean_ptr,
    inner: tl.int32,
    V: tl.int32,
    ignore_index: tl.int64,
    scale: tl.float32,
    temperature: tl.float64,
    inv_t: tl.float64,
    cap: tl.float32,
    inv_cap: tl.float32,
    constant0: tl.float32,
    constant1: tl.float32,
    constant2: tl.float32,
    constant3: tl.float32,
    constant4: tl.float32,
    constant5: tl.float32,
    constant6: tl.float32,
    constant7: tl.float32,
    constant8: tl.float32,
    constant9: tl.float32,
    constant10: tl.float32,
    constant11: tl.float32,
    constant12: tl.float32,
    constant13: tl.float32,
    constant14: tl.float32,
    constant15: tl.float32,
    INPUTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
    LOSS: tl.constexpr,
    DEPENDS: tl.constexpr,
    MOVES: tl.constexpr,
    FITS: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    out_row = row_pointer(out_ptr, row, inner, out_outer, out_inner)
    none = nothing()
    if label == ignore_index:
        store_statistics(logps_ptr, lse_ptr, entropy_ptr, kl_ptr, mean_ptr, row, none, none, none, none, none)
        write_zeros(out_row, V, R, T, VEC)
        return
    KL: tl.constexpr = z_ptr is not None
    ENTROPY: tl.constexpr = entropy_ptr is not None
    MEAN: tl.constexpr = mean_ptr is not None
    x_row = row_pointer(x_ptr, row, inner, x_outer, x_inner)
    z_row = x_row
    if KL:
        z_row = row_pointer(z_ptr, row, inner, z_outer, z_inner)

    x_label = label_logit(x_row, label, V, cap, inv_cap, SOFTCAP)
    z_label = x_label
    if KL:
        z_label = label_logit(z_row, label, V, cap, inv_cap, SOFTCAP)
    zero = finite(x_label)
    if FITS:
        head = row_head(x_row, V, VEC)
        xs, x_edges = load_row(x_row, head, V, True, R, T, VEC)
        zs, z_edges = xs, x_edges
        if KL:
            zs, z_edges = load_row(z_row, head, V, ALIGNED, R, T, VEC)
        sums, at, ref_at, _ = sum_registers(
            xs, zs, head, V, zero, scale, cap, inv_cap, T, VEC, SOFTCAP, ENTROPY, KL, MEAN, False
        )
    else:
        sums, at, ref_at, _ = sum_row(
            *(x_row, z_row, x_label, z_label, V, zero, scale, cap, inv_cap),
            *(R, T, VEC, ALIGNED, SOFTCAP, ENTROPY, KL, MEAN, False),
        )
    logps, lse, entropy, kl, mean, m, r, ref_m, ref_r = finish(
        sums, at, ref_at, x_label, zero, V, temperature, inv_t, KL
    )
    if logps > SURE:
        again = tl.where(x_label == x_label, row, 0)  # as in the forward
        hole = tl.load(labels_ptr + again).to(tl.int64)
        others = sum_others(x_row, hole, x_label, V, scale, cap, inv_cap, T, SOFTCAP)
        logps, lse, m, r = make_sure(others, x_label, inv_t)
    store_statistics(logps_ptr, lse_ptr, entropy_ptr, kl_ptr, mean_ptr, row, logps, lse, entropy, kl, mean)

    weight = tl.load(weight_ptr + row)
    inputs = (
        optional(input0_ptr, row),
        optional(input1_ptr, row),
        optional(input2_ptr, row),
        optional(input3_ptr, row),
        optional(input4_ptr, row),
        optional(input5_ptr, row),
        optional(input6_ptr, row),
        optional(input7_ptr, row),
    )
    constants = (
        constant0,
        constant1,
        constant2,
        constant3,
        constant4,
        constant5,
        constant6,
        constant7,
        constant8,
        constant9,
        constant10,
        constant11,
        constant12,
        constant13,
        constant14,
        constant15,
    )
    FIRST: tl.constexpr = 5 + INPUTS + CONSTANTS
    numbers = values((logps, lse, entropy, kl, mean), inputs, constants, INPUTS, CONSTANTS, STEPS, COUNT)
    c = coefficients(
        m,
        r,
        ref_m,
        ref_r,
        entropy,
        kl,
        weight * slope(numbers, 0, FIRST, STEPS, COUNT, LOSS, DEPENDS),
        weight * slope(numbers, 1, FIRST, STEPS, COUNT, LOSS, DEPENDS),
        weight * slope(numbers, 2, FIRST, STEPS, COUNT, LOSS, DEPENDS),
        weight * slope(numbers, 3, FIRST, STEPS, COUNT, LOSS, DEPENDS),
        weight * slope(numbers, 4, FIRST, STEPS, COUNT, LOSS, DEPENDS),
        V,
        inv_t,
    )
    SLOPE: tl.constexpr = MOVES[2] or MOVES[3]
    LINEAR: tl.constexpr = MOVES[3]
    at_label = label_gradient(x_label, z_label, c, scale, inv_cap, SLOPE, LINEAR, MEAN, SOFTCAP)
    if FITS:
        write_edges(x_edges, z_edges, out_row, head, c, V, scale, cap, inv_cap, R, T, VEC, SOFTCAP, SLOPE, LINEAR, MEAN)
        write_registers(xs, zs, out_row, head, c, V, scale, cap, inv_cap, T, VEC, ALIGNED, SOFTCAP, SLOPE, LINEAR, MEAN)
    else:
        write_gradient(
            x_row, z_row, out_row, c, V, scale, cap, inv_cap, R, T, VEC, False, ALIGNED, SOFTCAP, SLOPE, LINEAR, MEAN
        )
    write_label_gradient(at_label, out_row, label, V)


# ------------------------------------------------------------------------------------------------------------ launches
def objective(
    call: TokenCall,
    program: Any,
    weight: Tensor,
    inputs: tuple[Tensor, ...],
    want_entropy: bool,
    out: Tensor,
    *,
    lanes: int | None = None,
) -> tuple[list[Launch], tuple]:
    """(launches, (logps, lse, entropy, kl, mean)); the gradient goes into `out`, which may be `call.logits` itself.

    Args:
        program: a `TokenProgram`. Its steps are compiled in; its constants are not.
        weight, inputs: what each token's loss counts for, and what the program is given; float32 of the labels' shape.
        lanes: threads of a warp; None: of the logits' device.
    """
    logits, labels, reference = call[:3]
    results = new_statistics(labels, want_entropy, reference is not None, program.uses[4])
    per_row = {"weight": weight, **dict.fromkeys(f"input{i}" for i in range(8))}
    per_row |= {f"input{i}": t for i, t in enumerate(inputs)}
    per_row = {name: None if t is None else t.contiguous() for name, t in {"labels": labels, **per_row}.items()}
    per_row |= dict(zip(("logps", "lse", "entropy", "kl", "mean"), results, strict=True))
    shape = (logits.shape[-1], logits.dtype, reference is not None, lanes or lanes_of(logits.device))
    options = scalars(call) | {
        **{f"constant{i}": value for i, value in enumerate(program.constants + (0.0,) * (16 - len(program.constants)))},
        "INPUTS": len(inputs),
        "CONSTANTS": len(program.constants),
        "STEPS": program.steps,
        "COUNT": len(program.steps),
        "LOSS": program.loss,
        "DEPENDS": depends(program),
        "MOVES": program.moves,
    }
    planned = launches(
        objective_kernel,
        {"x": logits, "z": reference, "out": out},
        per_row,
        options,
        whole_row_tile(*shape) or sum_tile(*shape),
    )
    return list(planned), results


# --------------------------------------------------------------------------------------------- the gradient's own scale
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["by_ptr"])
def scale_kernel(x_ptr, by_ptr, n: tl.int64, BLOCK: tl.constexpr):
    by = tl.load(by_ptr)
    if by == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n)
    tl.store(x_ptr + at, (x.to(tl.float32) * by.to(tl.float32)).to(x_ptr.dtype.element_ty), at < n)


def scale(x: Tensor, by: Tensor) -> Launch:
    """Multiplies a dense tensor by a scalar tensor in place; where that is 1, nothing of x is read or written."""
    block = 4096
    arguments = {"x_ptr": x, "by_ptr": by, "n": x.numel(), "BLOCK": block}
    return Launch(scale_kernel, triton.cdiv(x.numel(), block), arguments, 4)
