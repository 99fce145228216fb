// What the CUDA kernels compute with, compiled for the host: the sums of many threads, merged as a block merges them.
#include <cfloat>
#include <cmath>
#include <initializer_list>

#include "../../kernels/approximations.h"
#include "../../kernels/token_args.h"

using namespace fastalign;

extern "C" {

void exp2_of(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = exp2_polynomial(x[i]);
}

void tanh_many(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = tanh_of(x[i]);
}

void tanh_series_many(const float* x, float* y, int n, double unit, double by) {
    const TanhSeries series = tanh_series(unit, by);
    for (int i = 0; i < n; ++i) y[i] = x[i] * series(x[i]);
}

void natural_log_many(const float* x, double* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = natural_log_of(x[i]);
}

// Statistics (logps, lse, entropy, kl, mean, m, r, ref_m, ref_r) of a row that `threads` threads share, each relative
// to the maximum of its own elements; and from them, under the gradients g, the coefficients after what the exps are
// relative to (by, at, and those of the reference).
void row(const float* x, const float* z, int vocab, int label, int threads, double temperature, const float* g,
         float* statistics, float* coefficients_out) {
    const float scale = static_cast<float>(kLog2e / temperature);
    const ExactShift exact{scale, 1.0 / scale};
    const auto move = [&](float from, float to) {
        return from == to ? 0 : exponent_move(exponent(from, scale), exponent(to, scale));
    };
    SumsOf<float> all{-FLT_MAX, 0, 0, 0, -FLT_MAX, 0, 0};
    for (int thread = 0; thread < threads; ++thread) {
        SumsOf<float> a{-FLT_MAX, 0, 0, 0, -FLT_MAX, 0, 0};
        for (int i = thread; i < vocab; i += threads) {
            a.shift = x[i] > a.shift ? x[i] : a.shift;
            a.ref_shift = z[i] > a.ref_shift ? z[i] : a.ref_shift;
        }
        const Exponent by = exponent(a.shift, scale), ref_by = exponent(a.ref_shift, scale);
        for (int i = thread; i < vocab; i += threads) {
            const float u = max_or_nan(by.of(x[i]), -256.0f), v = ref_by.of(z[i]);
            const float e = power_of_two(u);
            a.s += e, a.w += e * u, a.t += power_of_two(v), a.k += e == 0 ? 0 : e * (u - v), a.total += x[i];
        }
        const float shift = fmaxf(all.shift, a.shift), ref_shift = fmaxf(all.ref_shift, a.ref_shift);
        for (SumsOf<float>* part : {&all, &a})
            move_sums(*part, shift, ref_shift, move(part->shift, shift), move(part->ref_shift, ref_shift));
        all.s += a.s, all.w += a.w, all.k += a.k, all.t += a.t, all.total += a.total;
    }
    const Sums sums{exact(all.shift), all.s, all.w, all.k, exact(all.ref_shift), all.t, all.total};
    const Stats o = finish(sums, x[label], temperature, 1 / temperature, vocab, kReference);
    const Coefficients c = coefficients(o, {g[0], g[1], g[2], g[3], g[4]}, 1 / temperature, vocab, exact);
    const Exponent by = exponent(c.shift, scale), ref_by = exponent(c.ref_shift, scale);
    const float found[] = {o.logps, o.lse, o.entropy, o.kl, o.mean, o.m, o.r, o.ref_m, o.ref_r};
    const float five[] = {by.by, by.at, ref_by.by, ref_by.at, c.a, c.b, c.g, c.kappa, c.delta};
    for (int i = 0; i < 9; ++i) statistics[i] = found[i];
    for (int i = 0; i < 9; ++i) coefficients_out[i] = five[i];
}

}  // extern "C"
