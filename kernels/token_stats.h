// The formulas of token statistics, once, for every compiled backend (host and device).
//
// x are the prepared logits of one row (soft-capped, divided by the temperature T), z those of the reference,
// p = softmax(x), q = softmax(z). A kernel sums over the vocabulary in powers of two, relative to some element of the
// row (its "shift"), so that no exponential overflows:
//
//     u_j = (raw_j - shift) * log2(e) / T          s = sum 2^u_j      w = sum 2^u_j u_j      total = sum raw_j
//     v_j likewise for the reference               t = sum 2^v_j      k = sum 2^u_j (u_j - v_j)
//                                                  squares = sum 4^u_j
//
// Such sums merge over chunks of the vocabulary (blocks of a row, shards of a tensor-parallel head). From them come the
// statistics, and the pair (m, r) with m / T + r = lse, m = T lse rounded to float32: with it the backward knows each
// probability exp((raw_j - m) / T - r) as well at logits of 1e4 as at logits of 1, where a float32 lse alone would not
// do.
//
// A target whose probability is near 1 is known by what is left beside it, which is lost in a sum with it. Such rows
// are *sure*: their others are summed once more by themselves, relative to the target (`make_sure`), and (m, r) is (the
// target's logit, -logps). Where m is the target's logit, the backward takes 1 - p from r.
//
// A row, or a chunk of one, may be nothing but -inf. Its lse is -inf, (m, r) = (-inf, 0), so that it weighs nothing in
// a merge; of a whole row there is no softmax, and its other statistics and its gradient are NaN, as torch's are.
#pragma once
#include "approximations.h"

namespace fastalign {

// Sums over a chunk of the vocabulary. A chunk of nothing but -inf has sums of 0 and a shift below all others.
template <class Real>
struct SumsOf {
    Real shift, s, w, k, ref_shift, t, total, squares;
};
using Sums = SumsOf<double>;

// How far a shift moves, in powers of two. Beyond 2^-16384 nothing is left in any format, and an infinite move would
// turn a sum of zero into NaN.
template <class Real>
FA_HD Real shift_move(Real from, Real to, Real scale) {
    constexpr Real kFar = -16384;
    const Real move = from == to ? 0 : (from - to) * scale;
    return move < kFar ? kFar : move;
}

// The same between what an Exponent takes for the two.
FA_HD float exponent_move(const Exponent& from, const Exponent& to) {
    constexpr float kFar = -16384;
    const float move = from.at - to.at;
    return from.by == to.by && move > kFar ? move : kFar;
}

// Carries the sums to other shifts, not below their own: 2^u shrinks by 2^du, u grows by du. Of the sums only those
// that a mode has.
template <bool kMoments = true, bool kReference = true, bool kSquares = true, class Real>
FA_HD void move_sums(SumsOf<Real>& a, Real shift, Real ref_shift, Real du, Real dv) {
    const Real f = power_of_two(du);
    if (a.s != 0) {  // an empty chunk stays empty: 0 * inf is NaN
        if (kMoments) a.w = (a.w + du * a.s) * f;
        if (kReference) a.k = (a.k + (du - dv) * a.s) * f;
        if (kSquares) a.squares *= f * f;
        a.s *= f;
    }
    if (kReference && a.t != 0) a.t *= power_of_two(dv);
    a.shift = shift, a.ref_shift = ref_shift;
}

template <class Real>
FA_HD void rebase(SumsOf<Real>& a, Real shift, Real ref_shift, Real scale) {
    move_sums(a, shift, ref_shift, shift_move(a.shift, shift, scale), shift_move(a.ref_shift, ref_shift, scale));
}

// Adds b to a. `scale` is log2(e) / T.
template <class Real>
FA_HD void merge(SumsOf<Real>& a, SumsOf<Real> b, Real scale) {
    if (a.shift != b.shift || a.ref_shift != b.ref_shift) {
        const Real shift = a.shift < b.shift ? b.shift : a.shift;
        const Real ref_shift = a.ref_shift < b.ref_shift ? b.ref_shift : a.ref_shift;
        rebase(a, shift, ref_shift, scale);
        rebase(b, shift, ref_shift, scale);
    }
    a.s += b.s, a.w += b.w, a.k += b.k, a.t += b.t, a.total += b.total, a.squares += b.squares;
}

// The logarithm of a row's sum in two numbers, m in the logits' own units and what is left beside it: nothing where
// that is -inf. The shift is kept apart from the logarithm until the end: beside logits of 1e38 the logarithm would be
// lost.
struct LogSum {
    float m, r;
};

FA_HD LogSum log_sum(double shift, double log_s, double temperature, double inv_t) {
    const float m = static_cast<float>(shift + log_s * temperature);
    return {m, m == -INFINITY ? 0 : static_cast<float>((shift - m) * inv_t + log_s)};
}

// What the forward returns for a row. `argmax`: its first element that is as large as any; -1 for a row that is ignored
// or has no softmax.
struct Stats {
    float logps, lse, entropy, kl, mean, m, r, ref_m, ref_r;
    float log_sum_sq = 0;
    int argmax = -1;
};

// What the caller wants of a row decides the inner loop: plain (logps, lse), moments (entropy, mean), a reference, or
// diagnostics, which have the moments too.
enum Mode { kPlain, kMoments, kReference, kDiagnostics };

// Statistics of a row from its merged sums; `label` is the prepared but untempered logit of the target. What the mode
// has no sums for is 0.
FA_HD Stats finish(const Sums& a, double label, double temperature, double inv_t, double vocab, Mode mode) {
    Stats o{};
    const double log_s = natural_log(a.s);
    const LogSum x = log_sum(a.shift, log_s, temperature, inv_t);
    o.m = x.m, o.r = x.r;
    o.lse = static_cast<float>(a.shift * inv_t + log_s);
    o.logps = static_cast<float>((label - a.shift) * inv_t - log_s);
    if (mode == kPlain) return o;
    o.entropy = static_cast<float>(log_s - kLn2 * a.w / a.s);
    o.mean = static_cast<float>(a.total * inv_t / vocab);
    if (mode == kDiagnostics) o.log_sum_sq = static_cast<float>(natural_log(a.squares) - 2 * log_s);
    if (mode != kReference) return o;
    const double ref_log_s = natural_log(a.t);
    const LogSum z = log_sum(a.ref_shift, ref_log_s, temperature, inv_t);
    o.ref_m = z.m, o.ref_r = z.r;
    o.kl = static_cast<float>(kLn2 * a.k / a.s - log_s + ref_log_s);
    return o;
}

// Whether a row is sure. A log-probability from sums has an absolute error of 4.5e-6 at most, as exps up to
// 2^32, 22.2 nats, from the shift are known to 3 * 2^-24 * 22.2 = 4e-6 by the roundings of difference, scale and
// product, and to 3e-7 by their polynomials; sums have less. From 2^-7 on that is a relative error below 6e-4. NaN is
// not sure.
FA_HD bool is_sure(const Stats& o) { return o.logps > -0x1p-7f; }

// The statistics of a sure row: `others` is the sum of its other exps relative to the target. Entropy and KL have an
// absolute error already.
FA_HD void make_sure(Stats& o, double label, double others, double inv_t) {
    const double rest = natural_log1p(others);
    o.m = static_cast<float>(label), o.r = static_cast<float>(rest);
    o.logps = static_cast<float>(0 - rest);
    o.lse = static_cast<float>(label * inv_t + rest);
}

// Gradients of the loss with respect to a row's statistics.
struct Grads {
    float logps, lse, entropy, kl, mean;
};

// dx_j = 2^u_j (a + b u_j - g v_j) + kappa + delta [j = label], u_j = (raw_j - shift) log2(e) / T, v_j alike.
// Under soft-capping the caller multiplies by the cap's slope. `own` is `a` without the log-probability's part; `r` is
// the row's.
struct Coefficients {
    float shift, ref_shift, a, b, g, kappa, delta, own, r;
};

// Those of the target, whose prepared but untempered logit is `label`, as those of any element. Its log-probability
// moves with its own logit by 1 - p. Where p is near 1 that is not to be had from p; but then the shift is the target's
// logit, and log p is -r.
FA_HD Coefficients at_target(Coefficients c, float label) {
    if (label == c.shift) c.a = c.own, c.delta *= one_less_power(-c.r);
    c.kappa += c.delta;
    return c;
}

// For kernels that take a shift as it is.
struct AsGiven {
    FA_MEMBER double operator()(float shift) const { return shift; }
};

// The canonical form's numbers (alpha, beta, gamma, delta, kappa; see token_stats_eager.py for the derivatives), with
// the probability's factor exp(-r), the change to powers of two and inv_t = 1 / T of the chain rule folded in.
// `exact`: what a kernel takes for a shift that it is given.
template <class Exact>
FA_HD Coefficients coefficients(const Stats& o, const Grads& d, double inv_t, double vocab, const Exact& exact) {
    Coefficients c;
    c.shift = o.m, c.r = o.r;
    c.ref_shift = d.kl != 0 ? o.ref_m : 0;
    // From rounding the shifts.
    const double off = (exact(c.shift) - o.m) * inv_t;
    const double p_scale = power_of_row((off - o.r) * kLog2e) * inv_t;
    double alpha = d.lse;
    if (d.entropy != 0) alpha += d.entropy * (static_cast<double>(o.r) - o.entropy);
    if (d.kl != 0) alpha += d.kl * (static_cast<double>(o.ref_r) - o.r - o.kl);
    const double beta = static_cast<double>(d.kl) - d.entropy;
    if (beta != 0) alpha += beta * off;
    if (d.kl != 0) alpha -= d.kl * ((exact(c.ref_shift) - o.ref_m) * inv_t);
    // 0 whatever the row: one may have no softmax.
    c.own = alpha != 0 ? static_cast<float>(alpha * p_scale) : 0;
    alpha -= d.logps;
    c.a = alpha != 0 ? static_cast<float>(alpha * p_scale) : 0;
    c.b = beta != 0 ? static_cast<float>(beta * kLn2 * p_scale) : 0;
    c.g = d.kl != 0 ? static_cast<float>(d.kl * kLn2 * p_scale) : 0;
    c.kappa = d.mean != 0 ? static_cast<float>(d.mean * inv_t / vocab) : 0;
    c.delta = static_cast<float>(d.logps * inv_t);
    return c;
}

}  // namespace fastalign
