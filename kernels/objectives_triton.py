"""The one-launch token objective in Triton: a row's statistics, the slope of its loss and the gradient of its logits.

The formulas are those of `objectives.h`. A row that fits into the registers of its program is read once and its
gradient written once; a longer one is read a second time, mostly from the cache that it has just passed through.
"""

import triton
import triton.language as tl
from torch import Tensor

from .token_formulas_triton import coefficients, finish
from .token_gradient_triton import (
    write_edges,
    write_gradient,
    write_label_gradient,
    write_registers,
    write_zeros,
)
from .token_layout_triton import lanes_of, load_row, nothing, row_head, row_pointer, sum_tile, whole_row_tile
from .token_results import new_statistics
from .token_stats_triton import (
    Launch,
    finite,
    label_logit,
    launches,
    optional,
    row_kernel,
    scalars,
    store_statistics,
    within,
)
from .token_sums_triton import sum_registers
from .token_walk_triton import sum_row

SFT, REINFORCE, SURROGATE, CLIP, CISPO = (tl.constexpr(i) for i in range(5))
_, K1, K2, K3, EXACT = (tl.constexpr(i) for i in range(5))
MAX_LOG_RATIO = tl.constexpr(60.0)


# -------------------------------------------------------------------------------------------------------------- slopes
@triton.jit
def _expm1(y):
    """e^y - 1 without cancellation: a polynomial near 0, of relative error 2^-24."""
    near = 1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6 * (1.0 + y / 7 * (1.0 + y / 8))))))
    return tl.where(tl.abs(y) < 0.4, y * near, tl.exp(y) - 1.0)


@triton.jit
def policy_slope(logp, old_logp, advantage, low, high, dual_clip, KIND: tl.constexpr):
    """d policy term / d log pi."""
    d = logp - old_logp
    held = (d < -MAX_LOG_RATIO) | (d > MAX_LOG_RATIO)  # there the ratio no longer moves
    ratio = tl.where(d == d, tl.exp(tl.minimum(tl.maximum(d, -MAX_LOG_RATIO), MAX_LOG_RATIO)), d)
    cut = tl.minimum(tl.maximum(ratio, 1.0 - low), 1.0 + high)
    moved = tl.where(held, 0.0, -advantage * ratio)
    slope = nothing() - 1.0
    if KIND == REINFORCE:
        slope = -advantage
    elif KIND == SURROGATE:
        slope = moved
    elif KIND == CISPO:
        slope = -advantage * cut
    elif KIND == CLIP:
        plain = -advantage * ratio
        over = (advantage < 0) & (plain > -dual_clip * advantage)
        slope = tl.where((-advantage * cut > plain) | over, 0.0, moved)
    return slope


@triton.jit
def kl_slope(logp, ref_logp, KL_TERM: tl.constexpr, REVERSED: tl.constexpr):
    """d KL estimate / d log pi."""
    sign = nothing() + 1.0
    if REVERSED:
        sign = -sign
    d = sign * (logp - ref_logp)
    slope = nothing()
    if KL_TERM == K1:
        slope = sign
    elif KL_TERM == K2:
        slope = sign * d
    elif KL_TERM == K3:
        slope = -sign * _expm1(-d)
    return slope


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
    old_logps_ptr,
    advantages_ptr,
    ref_logps_ptr,
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
    low: tl.float32,
    high: tl.float32,
    dual_clip: tl.float32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    label_smoothing: tl.float32,
    z_loss: tl.float32,
    KIND: tl.constexpr,
    KL_TERM: tl.constexpr,
    REVERSED: tl.constexpr,
    SLOPE: tl.constexpr,
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
    target = within(label, V)
    if FITS:
        head = row_head(x_row, V, VEC)
        xs, x_edges = load_row(x_row, head, V, True, R, T, VEC)
        zs, z_edges = xs, x_edges
        if KL:
            zs, z_edges = load_row(z_row, head, V, ALIGNED, R, T, VEC)
        sums, at, ref_at = sum_registers(
            *(xs, zs, x_row, z_row, x_label, target, head, V, zero, scale, cap, inv_cap),
            *(T, VEC, SOFTCAP, ENTROPY, KL, MEAN),
        )
    else:
        sums, at, ref_at = sum_row(
            *(x_row, z_row, x_label, z_label, target, V, zero, scale, cap, inv_cap),
            *(R, T, VEC, ALIGNED, SOFTCAP, ENTROPY, KL, MEAN),
        )
    logps, entropy, kl, mean, m, r, ref_m, ref_r, rest = finish(sums, at, ref_at, x_label, z_label, zero, V, inv_t, KL)
    store_statistics(logps_ptr, lse_ptr, entropy_ptr, kl_ptr, mean_ptr, row, logps, m, entropy, kl, mean)

    weight = tl.load(weight_ptr + row)
    ref_logp = optional(ref_logps_ptr, row)
    slope = policy_slope(
        logps, optional(old_logps_ptr, row), optional(advantages_ptr, row), low, high, dual_clip, KIND
    ) + kl_coef * kl_slope(logps, ref_logp, KL_TERM, REVERSED)
    g_mean = weight * label_smoothing * slope
    g_kl = none
    if KL_TERM == EXACT:
        g_kl = weight * kl_coef
    c = coefficients(
        m,
        r,
        ref_m,
        ref_r,
        rest,
        entropy,
        kl,
        weight * (1.0 - label_smoothing) * slope,
        2.0 * weight * z_loss * m - g_mean,
        -weight * entropy_coef,
        g_kl,
        g_mean,
        V,
        temperature,
        inv_t,
    )
    LINEAR: tl.constexpr = KL_TERM == EXACT
    if FITS:
        write_edges(x_edges, z_edges, out_row, head, c, V, scale, cap, inv_cap, R, T, VEC, SOFTCAP, SLOPE, LINEAR, MEAN)
        write_registers(xs, zs, out_row, head, c, V, scale, cap, inv_cap, T, VEC, ALIGNED, SOFTCAP, SLOPE, LINEAR, MEAN)
    else:
        write_gradient(
            x_row, z_row, out_row, c, V, scale, cap, inv_cap, R, T, VEC, False, ALIGNED, SOFTCAP, SLOPE, LINEAR, MEAN
        )
    write_label_gradient(x_label, z_label, out_row, label, c, V, scale, inv_cap, SLOPE, LINEAR, MEAN, SOFTCAP)


# ------------------------------------------------------------------------------------------------------------ launches
def objective(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    codes: tuple,
    ignore_index: int,
    temperature: float,
    softcap: float,
    want_entropy: bool,
    out: Tensor,
    *,
    lanes: int | None = None,
) -> tuple[list[Launch], tuple]:
    """(launches, (logps, lse, entropy, kl, mean)); the gradient goes into `out`, which may be `logits` itself.

    Args:
        inputs: weight, old_logps, advantages, ref_logps; float32 of the labels' shape.
        codes: kind, low, high, dual_clip, KL term, kl_coef, kl_reversed, entropy_coef, label_smoothing, z_loss, kind
            and KL term as the numbers of `objectives.h`.
        lanes: threads of a warp; None: of the logits' device.
    """
    kind, low, high, dual_clip, kl_term, kl_coef, kl_reversed, entropy_coef, label_smoothing, z_loss = codes
    results = new_statistics(labels, want_entropy, ref_logits is not None, label_smoothing != 0)
    per_row = dict(zip(("weight", "old_logps", "advantages", "ref_logps"), inputs, strict=True))
    per_row = {name: None if t is None else t.contiguous() for name, t in {"labels": labels, **per_row}.items()}
    per_row |= dict(zip(("logps", "lse", "entropy", "kl", "mean"), results, strict=True))
    shape = (logits.shape[-1], logits.dtype, ref_logits is not None, lanes or lanes_of(logits.device))
    options = scalars(temperature, softcap, ignore_index) | {
        "low": low,
        "high": high,
        "dual_clip": dual_clip,
        "kl_coef": kl_coef,
        "entropy_coef": entropy_coef,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "KIND": kind,
        "KL_TERM": kl_term,
        "REVERSED": kl_reversed,
        "SLOPE": kl_term == EXACT.value or entropy_coef != 0,
    }
    planned = launches(
        objective_kernel,
        {"x": logits, "z": ref_logits, "out": out},
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
