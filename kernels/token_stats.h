// The formulas of token statistics, once, for every compiled backend (host and device).
//
// x are the prepared logits of one row (soft-capped, divided by the temperature T), z those of the reference,
// p = softmax(x), q = softmax(z). A kernel sums over the vocabulary in powers of two, relative to some element of the
// row (its "pivot"), so that no exponential overflows:
//
//     u_j = (raw_j - pivot) * log2(e) / T          s = sum 2^u_j      w = sum 2^u_j u_j      total = sum raw_j
//     v_j likewise for the reference               t = sum 2^v_j      k = sum 2^u_j (u_j - v_j)
//
// Such sums merge over pieces of the vocabulary (blocks of a row, shards of a tensor-parallel head). From them come the
// statistics, and the pair (m, r) with m + r = lse, m = lse rounded to float32: with it the backward knows each
// probability exp((x_j - m) - r) as well at logits of 1e4 as at logits of 1, where a float32 lse alone would not do.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FA_HD __host__ __device__ inline
#define FA_MEMBER __host__ __device__
#else
// static: each instruction set keeps its own copy, none of which may serve another processor.
#define FA_HD static inline
#define FA_MEMBER
#endif

namespace fastalign {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// tanh(x) = x + x^3 (c3 + c5 x^2 + .. + c11 x^8) for |x| < 0.6, relative error below 3e-7.
constexpr float kTanh3 = -0.333332986f, kTanh5 = 0.133319244f, kTanh7 = -0.0537838265f, kTanh9 = 0.0207959563f,
                kTanh11 = -0.00589514058f;

// 2^x as fast as the place allows: float on the device is for sums that are merged there, before the final step.
FA_HD double power_of_two(double x) { return exp2(x); }
FA_HD float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Sums over a piece of the vocabulary. A piece of nothing but -inf has sums of 0 and a pivot below all others.
template <class Real>
struct SumsOf {
    Real pivot, s, w, k, ref_pivot, t, total;
};
using Sums = SumsOf<double>;

// How far a pivot moves, in powers of two. Beyond 2^-16384 nothing is left in any format, and an infinite move would
// turn a sum of zero into NaN.
template <class Real>
FA_HD Real pivot_move(Real from, Real to, Real scale) {
    constexpr Real kFar = -16384;
    const Real move = from == to ? 0 : (from - to) * scale;
    return move < kFar ? kFar : move;
}

// Carries the sums to other pivots, not below their own: 2^u shrinks by 2^du, u grows by du.
template <class Real>
FA_HD void rebase(SumsOf<Real>& a, Real pivot, Real ref_pivot, Real scale) {
    const Real du = pivot_move(a.pivot, pivot, scale), dv = pivot_move(a.ref_pivot, ref_pivot, scale);
    const Real f = power_of_two(du);
    if (a.s != 0) {  // an empty piece stays empty: 0 * inf is NaN
        a.w = (a.w + du * a.s) * f;
        a.k = (a.k + (du - dv) * a.s) * f;
        a.s *= f;
    }
    if (a.t != 0) a.t *= power_of_two(dv);
    a.pivot = pivot, a.ref_pivot = ref_pivot;
}

// Adds b to a. `scale` is log2(e) / T.
template <class Real>
FA_HD void merge(SumsOf<Real>& a, SumsOf<Real> b, Real scale) {
    if (a.pivot != b.pivot || a.ref_pivot != b.ref_pivot) {
        const Real pivot = a.pivot < b.pivot ? b.pivot : a.pivot;
        const Real ref_pivot = a.ref_pivot < b.ref_pivot ? b.ref_pivot : a.ref_pivot;
        rebase(a, pivot, ref_pivot, scale);
        rebase(b, pivot, ref_pivot, scale);
    }
    a.s += b.s, a.w += b.w, a.k += b.k, a.t += b.t, a.total += b.total;
}

// What the forward returns for a row.
struct Stats {
    float logps, lse, entropy, kl, mean, m, r, ref_m, ref_r;
};

// Statistics of a row from its merged sums; `label` is the prepared but untempered logit of the target.
FA_HD Stats finish(const Sums& a, double label, double inv_t, double vocab) {
    Stats o;
    // The pivot is kept apart from the logarithm until the end: beside logits of 1e38 the logarithm would be lost.
    const double at = a.pivot * inv_t, log_s = kLn2 * log2(a.s);
    o.m = static_cast<float>(at + log_s);
    o.r = static_cast<float>((at - o.m) + log_s);
    o.lse = o.m;
    o.logps = static_cast<float>((label - a.pivot) * inv_t - log_s);
    o.entropy = static_cast<float>(log_s - kLn2 * a.w / a.s);
    o.mean = static_cast<float>(a.total * inv_t / vocab);
    const double ref_at = a.ref_pivot * inv_t, ref_log_s = kLn2 * log2(a.t);
    o.ref_m = static_cast<float>(ref_at + ref_log_s);
    o.ref_r = static_cast<float>((ref_at - o.ref_m) + ref_log_s);
    o.kl = static_cast<float>(kLn2 * a.k / a.s - log_s + ref_log_s);
    return o;
}

// Gradients of the loss with respect to a row's statistics.
struct Grads {
    float logps, lse, entropy, kl, mean;
};

// dx_j = 2^u_j (a + b u_j - g v_j) + kappa + delta [j = label], u_j = (raw_j - pivot) log2(e) / T, v_j alike.
// Under soft-capping the caller multiplies by the cap's slope.
struct Coefficients {
    float pivot, ref_pivot, a, b, g, kappa, delta;
};

// The canonical form's numbers (alpha, beta, gamma, delta, kappa; see token_stats_eager.py for the derivatives), with
// the probability's factor exp(-r), the change to powers of two and inv_t = 1 / T of the chain rule folded in.
FA_HD Coefficients coefficients(const Stats& o, const Grads& d, double temperature, double inv_t, double vocab) {
    Coefficients c;
    c.pivot = static_cast<float>(o.m * temperature);
    c.ref_pivot = static_cast<float>(o.ref_m * temperature);
    const double shift = c.pivot * inv_t - o.m, ref_shift = c.ref_pivot * inv_t - o.ref_m;  // from rounding the pivots
    const double p_scale = exp2((shift - o.r) * kLog2e) * inv_t;
    double alpha = static_cast<double>(d.lse) - d.logps;
    if (d.entropy != 0) alpha += d.entropy * (static_cast<double>(o.r) - o.entropy);
    if (d.kl != 0) alpha += d.kl * (static_cast<double>(o.ref_r) - o.r - o.kl);
    const double beta = static_cast<double>(d.kl) - d.entropy;
    if (beta != 0) alpha += beta * shift;
    if (d.kl != 0) alpha -= d.kl * ref_shift;
    c.a = static_cast<float>(alpha * p_scale);
    c.b = static_cast<float>(beta * kLn2 * p_scale);
    c.g = static_cast<float>(d.kl * kLn2 * p_scale);
    c.kappa = static_cast<float>(d.mean * inv_t / vocab);
    c.delta = static_cast<float>(d.logps * inv_t);
    return c;
}

}  // namespace fastalign
