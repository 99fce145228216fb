"""Of one row: what its sums are relative to, and its statistics and its gradient's coefficients from them; the formulas
are those of `token_stats.h`."""

import triton
import triton.language as tl

from .token_layout_triton import LN2, LOG2E, nothing

# --------------------------------------------------------------------------------------------------------------- shifts
# How far, in powers of two, the maximum may lie from the shift. Plain sums only have to stay finite; entropy and KL are
# differences of numbers of the size of log(sum), so theirs must stay near the maximum to keep its digits.
FAR_PLAIN = tl.constexpr(32.0)
FAR = tl.constexpr(16.0)


@triton.jit
def shift_at(top, scale):
    """(shift, scale, shift * scale) such that 2^(x * scale - shift * scale) is at most about 1 for x up to `top`.

    The scale is the given one, but far out (rows of masked logits), where the product would be off by more powers of
    two than a float32 has. There elements that differ at all are so far apart that a scale of 1 will do, by which
    nothing is rounded and nothing overflows.
    """
    shift = tl.where(top == float("-inf"), 0.0, top)
    one = scale * 0.0 + 1.0  # computed: as a constant it costs the forward two registers that sm_80 does not have
    scale = tl.where(tl.abs(shift) * scale < 1073741824.0, scale, one)
    return shift, scale, shift * scale


@triton.jit
def missed(at, top, FAR_OFF: tl.constexpr):
    """Whether a row's sums must be taken anew, from a shift at its maximum `top`."""
    shift, scale, _ = at
    return (tl.abs(top - shift) * scale > FAR_OFF) & (top > float("-inf"))


@triton.jit
def lost(s):
    """The same of a row whose maximum is not known, by its plain sum s; NaN is lost too."""
    return ~((tl.exp2(-FAR_PLAIN) <= s) & (s <= tl.exp2(FAR_PLAIN)))


# ---------------------------------------------------------------------------------------------------------- statistics
@triton.jit
def _log(s):
    """ln s of a sum, which is 0, a normal number, infinite or NaN, to 2^-25 and near 1 to a unit in the last place of
    float32. The polynomial, fitted to (ln(1 + f) - f) / f^2, is all there is to it: that of `tl.log2` comes with
    a reduction of its own and a branch."""
    bits = s.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (whole << 23)).to(tl.float32, bitcast=True) - 1.0  # in [-1/3, 1/3)
    p = tl.fma(f, -0.13043397665, 0.14012320340)
    p = tl.fma(p, f, -0.12142354995)
    p = tl.fma(p, f, 0.13999426365)
    p = tl.fma(p, f, -0.16684526205)
    p = tl.fma(p, f, 0.20010872185)
    p = tl.fma(p, f, -0.24999640882)
    p = tl.fma(p, f, 0.33333206177)
    p = tl.fma(p, f, -0.5)
    rest = tl.fma(f * f, p, f)
    rest = tl.where(s > 0, tl.where(s < float("inf"), rest, s), s - float("inf"))
    return whole.to(tl.float64) * LN2 + rest.to(tl.float64)


@triton.jit
def log_sum(at, log_s, temperature, inv_t):
    """(m, r, ln of the sum relative to the shift): m / T + r is the logarithm of a row's sum of exponentials, m T times
    that, rounded to float32. `log_s` is relative to shift * scale as rounded, which differs from the shift's own."""
    shift, scale, product = at
    log_s -= tl.fma(shift, scale, -product).to(tl.float64) * LN2
    m = (shift.to(tl.float64) + log_s * temperature).to(tl.float32)
    # A row of nothing but -inf has m = -inf, of which nothing can be the rest.
    r = ((shift.to(tl.float64) - m.to(tl.float64)) * inv_t + log_s).to(tl.float32)
    return m, tl.where(m == float("-inf"), 0.0, r), log_s


@triton.jit
def finish(sums, at, ref_at, label, zero, V, temperature, inv_t, KL: tl.constexpr):
    """Statistics of a row: (logps, lse, entropy, kl, mean, m, r, ref_m, ref_r); see `finish` in token_stats.h."""
    s, w, total, t, k, _ = sums
    plain = _log(s)
    m, r, log_s = log_sum(at, plain, temperature, inv_t)
    lse = (at[0].to(tl.float64) * inv_t + log_s).to(tl.float32)
    logps = ((label.to(tl.float64) - at[0].to(tl.float64)) * inv_t - log_s).to(tl.float32)
    entropy = (plain - (w / s).to(tl.float64) * LN2).to(tl.float32)
    mean = ((total.to(tl.float64) / V + zero.to(tl.float64)) * inv_t).to(tl.float32)
    ref_m = nothing()
    ref_r = nothing()
    kl = nothing()
    if KL:
        ref_plain = _log(t)
        ref_m, ref_r, _ = log_sum(ref_at, ref_plain, temperature, inv_t)
        kl = ((k / s).to(tl.float64) * LN2 - plain + ref_plain).to(tl.float32)
    return logps, lse, entropy, kl, mean, m, r, ref_m, ref_r


@triton.jit
def log_sum_of_squares(sums):
    """log sum_j p_j^2 of a row."""
    return (_log(sums[5]) - 2 * _log(sums[0])).to(tl.float32)


SURE = tl.constexpr(-0.0078125)  # see `is_sure` in token_stats.h


@triton.jit
def make_sure(others, label, inv_t):
    """(logps, lse, m, r) of a sure row; see `make_sure` in token_stats.h. `others` is 2^-6 at most."""
    rest = tl.fma(others * others, tl.fma(others, tl.fma(others, -0.25, 0.333333333), -0.5), others)
    return 0.0 - rest, (label.to(tl.float64) * inv_t + rest.to(tl.float64)).to(tl.float32), label, rest


@triton.jit
def _one_less_power(r):
    """1 - e^-r to a relative error below 3e-6."""
    small = r * tl.fma(r, tl.fma(r, tl.fma(r, -0.0416666667, 0.166666667), -0.5), 1.0)
    return tl.where(tl.abs(r) < 0.03125, small, 1.0 - tl.exp2(-r * LOG2E))


# ------------------------------------------------------------------------------------------------------------ gradient
@triton.jit
def coefficients(m, r, ref_m, ref_r, entropy, kl, g_logps, g_lse, g_entropy, g_kl, g_mean, V, inv_t):
    """(shift, ref_shift, a, b, g, kappa, delta, own, r) of a row; see `coefficients` in token_stats.h."""
    # Of nothing but -inf the exps are 0 relative to any number, and infinite times that is no probability.
    shift = tl.where(m == float("-inf"), 0.0, m)
    ref_shift = tl.where(ref_m == float("-inf"), 0.0, ref_m)
    p_scale = (tl.exp2((shift - m - r) * LOG2E).to(tl.float64) * inv_t).to(tl.float32)
    beta = g_kl - g_entropy
    # What nobody differentiates may be infinite or NaN.
    of_entropy = tl.where(g_entropy == 0, 0.0, g_entropy * (r - entropy))
    of_kl = tl.where(g_kl == 0, 0.0, g_kl * (ref_r - r - kl))
    own = g_lse + of_entropy + of_kl
    alpha = own - g_logps
    return (
        shift,
        ref_shift,
        tl.where(alpha == 0, 0.0, alpha * p_scale),
        tl.where(beta == 0, 0.0, beta * LN2 * p_scale),
        tl.where(g_kl == 0, 0.0, g_kl * LN2 * p_scale),
        (g_mean.to(tl.float64) * inv_t / V).to(tl.float32),
        (g_logps.to(tl.float64) * inv_t).to(tl.float32),
        tl.where(own == 0, 0.0, own * p_scale),
        r,
    )


@triton.jit
def at_target(c, label):
    """(coefficients, delta) of the target; see `at_target` in token_stats.h."""
    shift, ref_shift, a, b, g, kappa, delta, own, r = c
    known = label == shift
    a = tl.where(known, own, a)
    return (shift, ref_shift, a, b, g, kappa, delta, own, r), tl.where(known, delta * _one_less_power(r), delta)
