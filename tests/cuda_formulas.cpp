// What the CUDA kernels compute with, compiled for the host: the sums of many threads, merged as a block merges them.
#include <cfloat>

#include "../kernels/approximations.h"
#include "../kernels/token_args.h"

using namespace fastalign;

extern "C" {

void exp2_of(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = exp2_polynomial(x[i]);
}

void tanh_many(const float* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = tanh_of(x[i]);
}

// Statistics (logps, lse, entropy, kl, mean, m, r, ref_m, ref_r) of a row that `threads` threads share, each relative
// to the maximum of its own elements; and the coefficients from them under the gradients g.
void row(const float* x, const float* z, int vocab, int label, int threads, double temperature, const float* g,
         float* statistics, float* coefficients_out) {
    const float scale = static_cast<float>(kLog2e / temperature);
    SumsOf<float> all{-FLT_MAX, 0, 0, 0, -FLT_MAX, 0, 0};
    for (int thread = 0; thread < threads; ++thread) {
        SumsOf<float> a{-FLT_MAX, 0, 0, 0, -FLT_MAX, 0, 0};
        for (int i = thread; i < vocab; i += threads) {
            a.pivot = x[i] > a.pivot ? x[i] : a.pivot;
            a.ref_pivot = z[i] > a.ref_pivot ? z[i] : a.ref_pivot;
        }
        for (int i = thread; i < vocab; i += threads) {
            const float u = max_or_nan((x[i] - a.pivot) * scale, -256.0f), v = (z[i] - a.ref_pivot) * scale;
            const float e = power_of_two(u);
            a.s += e, a.w += e * u, a.t += power_of_two(v), a.k += e == 0 ? 0 : e * (u - v), a.total += x[i];
        }
        merge(all, a, scale);
    }
    const Sums sums{all.pivot, all.s, all.w, all.k, all.ref_pivot, all.t, all.total};
    const Stats o = finish(sums, x[label], 1 / temperature, vocab);
    const Coefficients c = coefficients(o, {g[0], g[1], g[2], g[3], g[4]}, temperature, 1 / temperature, vocab);
    const float found[] = {o.logps, o.lse, o.entropy, o.kl, o.mean, o.m, o.r, o.ref_m, o.ref_r};
    const float five[] = {c.pivot, c.ref_pivot, c.a, c.b, c.g, c.kappa, c.delta};
    for (int i = 0; i < 9; ++i) statistics[i] = found[i];
    for (int i = 0; i < 7; ++i) coefficients_out[i] = five[i];
}

}  // extern "C"
