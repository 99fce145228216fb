// Divergences between two models' distributions on the CPU, and their gradient, while both rows are in cache. Included
// once per instruction set after its simd header; formulas: divergence_eager.py. Logarithms are in powers of two.
//
// Three walks over a row: the sums of both softmaxes, the sums of D and of p s, the gradient. Each row is one thread's
// and is summed in one order, in float32 within a chunk and in float64 across.
#pragma once
#include "../divergence_args.h"
#include "token_rows_cpu.h"

namespace fastalign::FA_ISA {
namespace {

enum class Mixed { kStudent, kTeacher, kBoth };  // what m is made of

// log2 of a positive number, to 1e-7: of the mantissa 1 <= f < 2 by the series of 2 atanh(y), y = (f - c) / (f + c)
// with c = sqrt 2, so that |y| < 0.172.
inline Vec log2(Vec x) {
    Vec exponent, f;
    split(x, exponent, f);
    const Vec c = set1(1.41421356f), y = (f - c) / (f + c), s = y * y;
    constexpr float k = static_cast<float>(2 * kLog2e);
    Vec series = fma(set1(k / 9), s, set1(k / 7));
    series = fma(series, s, set1(k / 5));
    series = fma(series, s, set1(k / 3));
    series = fma(series, s, set1(k));
    return exponent + fma(series, y, set1(0.5f));
}

// One model's row, ready to be read.
template <class T, bool kCap>
struct LogRow {
    const T* at;
    Vec inv_cap, cap, scale, shift, log_sum;  // scale: of powers of two
    bool capped;

    LogRow(const DivergenceSide& side, int64_t row, int64_t n, const Prepare& plain)
        : at(static_cast<const T*>(side.logits) + row * side.row),
          inv_cap(set1(side.softcap != 0 ? 1 / side.softcap : 0.0f)),
          cap(set1(side.softcap)),
          scale(set1(side.scale[row] * static_cast<float>(kLog2e))),
          log_sum(set1(0)),
          capped(side.softcap != 0) {
        const float most = maximum<T, false>(at, n, plain);
        shift = set1(reduce_max(raw(set1(most == -INFINITY ? -FLT_MAX : most))));
    }

    // The soft-capped logit.
    Vec raw(Vec x) const {
        if constexpr (kCap) {
            if (capped) return cap * tanh(x * inv_cap);
        }
        return x;
    }
    // log2 of its probability, or, before `log_sum` is known, of its share in the sum. `pad`: see `walk`.
    Vec log_of(Vec x, Vec pad) const { return (raw(x) + pad - shift) * scale - log_sum; }
};

// Calls step(half, x, z, pad) for every vector of two rows, where `pad` is 0, or -inf in lanes beyond the end, where x
// and z are 0; what it returns is stored, if there is an `out`.
template <bool kStore, class T, class Step>
inline void walk(const T* x, const T* z, T* out, int64_t n, const Step& step) {
    constexpr int64_t kAhead = 2048 / sizeof(T);
    constexpr int kLines = kUnit * sizeof(T) < 64 ? 1 : kUnit * sizeof(T) / 64;
    const Vec none = set1(0);
    Vec a, b, c, d;
    int64_t i = 0;
    for (; i + kUnit <= n; i += kUnit) {
        for (int l = 0; l < kLines; ++l) {
            prefetch(x + i + kAhead + l * (64 / static_cast<int>(sizeof(T))));
            prefetch(z + i + kAhead + l * (64 / static_cast<int>(sizeof(T))));
        }
        load2(x + i, a, b);
        load2(z + i, c, d);
        const Vec e = step(0, a, c, none), f = step(1, b, d, none);
        if constexpr (kStore) store2<false>(out + i, e, f);
    }
    if (i == n) return;
    T unit[kUnit];
    std::memset(static_cast<void*>(unit), 0, sizeof unit);
    Vec pad_a, pad_b;
    load_tail(unit, n - i, -INFINITY, pad_a, pad_b);
    load_tail(x + i, n - i, 0.0f, a, b);
    load_tail(z + i, n - i, 0.0f, c, d);
    const Vec e = step(0, a, c, pad_a), f = step(1, b, d, pad_b);
    if constexpr (kStore) {
        store2<false>(unit, e, f);
        std::memcpy(static_cast<void*>(out + i), unit, (n - i) * sizeof(T));
    }
}

// Two sums over a whole row, in float64 across its chunks: of what step(x, z, pad) gives as (first, second).
struct Two {
    double first = 0, second = 0;
};
template <class T, class Step>
Two sum_two(const T* x, const T* z, int64_t n, const Step& step) {
    Two total;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
        Vec s[2] = {set1(0), set1(0)}, t[2] = {set1(0), set1(0)};
        walk<false>(x + begin, z + begin, static_cast<T*>(nullptr), std::min(kChunk, n - begin),
                    [&](int half, Vec a, Vec c, Vec pad) {
                        Vec first, second;
                        step(a, c, pad, first, second);
                        s[half] = s[half] + first, t[half] = t[half] + second;
                        return a;
                    });
        total.first += reduce_add(s[0] + s[1]), total.second += reduce_add(t[0] + t[1]);
    }
    return total;
}

constexpr float kFar = 120;  // of log2(q / p), beyond which log2(m / q) no longer changes

// What an element adds to D, in powers of two, and its p s; and p.
template <Mixed kMixed>
struct Terms {
    Vec forward, reverse, share, rest;  // a, b, w, 1 - w
    Vec reverse_ln2, difference, bend;  // b ln 2; c in powers of two; c
    bool bends;

    explicit Terms(const DivergenceArgs& a)
        : forward(set1(a.forward)),
          reverse(set1(a.reverse)),
          share(set1(a.share)),
          rest(set1(1 - a.share)),
          reverse_ln2(set1(a.reverse * static_cast<float>(kLn2))),
          difference(set1(a.difference * static_cast<float>(kLog2e))),
          bend(set1(a.difference)),
          bends(a.difference != 0) {}

    Vec operator()(Vec lp, Vec lq, Vec& value, Vec& tilted) const {
        const Vec p = exp2(lp), q = exp2(lq), gap = p - q;
        if constexpr (kMixed == Mixed::kTeacher) {
            const Vec own = mul_nonzero(p, lp - lq);
            value = fma(difference, gap, reverse * own), tilted = reverse_ln2 * own;
        } else if constexpr (kMixed == Mixed::kStudent) {
            value = fma(difference, gap, forward * mul_nonzero(q, lq - lp)), tilted = forward * gap;
        } else {
            const Vec t = set1(0) - max(set1(-kFar), lp - lq), r = exp2(t), m = fma(share, r, rest), lm = log2(m);
            const Vec own = mul_nonzero(p, set1(0) - lm);
            value = fma(difference, gap, fma(reverse, own, forward * mul_nonzero(q, t - lm)));
            tilted = reverse_ln2 * own;
            if (bends) tilted = tilted - mul_nonzero(p, bend * r / m);
        }
        return p;
    }
};

template <class T, bool kCap, Mixed kMixed>
struct Divergence {
    static void run(const DivergenceArgs& a) {
        TokenArgs none{};
        none.temperature = 1;
        const Prepare plain(none);
        const Terms<kMixed> terms(a);
        parallel_for(a.rows, 1, a.threads, [&](int64_t row) {
            if (a.labels[row] >= 0) return one(a, row, terms, plain);
            a.divergence[row] = a.logps[row] = 0;
            if (a.out) std::memset(static_cast<void*>(out_row(a, row)), 0, a.vocab * sizeof(T));
        });
    }

    static T* out_row(const DivergenceArgs& a, int64_t row) { return static_cast<T*>(a.out) + row * a.out_row; }

    static void one(const DivergenceArgs& a, int64_t row, const Terms<kMixed>& terms, const Prepare& plain) {
        LogRow<T, kCap> x(a.student, row, a.vocab, plain), z(a.teacher, row, a.vocab, plain);
        const Two sums = sum_two(x.at, z.at, a.vocab, [&](Vec u, Vec v, Vec pad, Vec& s, Vec& t) {
            s = exp2(x.log_of(u, pad)), t = exp2(z.log_of(v, pad));
        });
        x.log_sum = set1(static_cast<float>(std::log2(sums.first)));
        z.log_sum = set1(static_cast<float>(std::log2(sums.second)));
        const Two found = sum_two(x.at, z.at, a.vocab, [&](Vec u, Vec v, Vec pad, Vec& value, Vec& tilted) {
            terms(x.log_of(u, pad), z.log_of(v, pad), value, tilted);
        });
        const Vec own = x.log_of(set1(to_float(x.at[a.labels[row]])), set1(0));
        a.divergence[row] = static_cast<float>(kLn2 * found.first);
        a.logps[row] = static_cast<float>(kLn2 * first(own));
        if (a.out) write(a, row, terms, x, z, static_cast<float>(found.second));
    }

    static void write(const DivergenceArgs& a, int64_t row, const Terms<kMixed>& terms, const LogRow<T, kCap>& x,
                      const LogRow<T, kCap>& z, float total) {
        T* const out = out_row(a, row);
        const float scale = a.student.scale[row];
        const float d = at_row(a.g_divergence, row) * scale, l = at_row(a.g_logps, row) * scale;
        if (d == 0 && l == 0) {
            std::memset(static_cast<void*>(out), 0, a.vocab * sizeof(T));
            return;
        }
        const Vec sum = set1(total), gd = set1(d), gl = set1(l);
        // `extra`: what the label has beside the others.
        const auto slope = [&](Vec u, Vec v, Vec pad, Vec extra) {
            Vec value, tilted;
            const Vec p = terms(x.log_of(u, pad), z.log_of(v, pad), value, tilted);
            Vec dx = fma(gd, tilted - p * sum, extra - gl * p);
            if constexpr (kCap) {
                if (x.capped) {
                    const Vec th = tanh(u * x.inv_cap);
                    dx = dx * (set1(1.0f) - th * th);
                }
            }
            return dx;
        };
        const int64_t label = a.labels[row];
        const float at_label = first(slope(set1(to_float(x.at[label])), set1(to_float(z.at[label])), set1(0), gl));
        walk<true>(x.at, z.at, out, a.vocab, [&](int, Vec u, Vec v, Vec pad) { return slope(u, v, pad, set1(0)); });
        from_float(at_label, out[label]);
    }
};

template <class T, bool kCap>
void with_mixture(const DivergenceArgs& a) {
    if (a.share == 0) return Divergence<T, kCap, Mixed::kStudent>::run(a);
    if (a.share == 1) return Divergence<T, kCap, Mixed::kTeacher>::run(a);
    Divergence<T, kCap, Mixed::kBoth>::run(a);
}

template <class T>
void with_cap(const DivergenceArgs& a) {
    if (a.student.softcap != 0 || a.teacher.softcap != 0) return with_mixture<T, true>(a);
    with_mixture<T, false>(a);
}

void divergence(const DivergenceArgs& a) {
    if (a.dtype == DType::kBFloat16) return with_cap<BFloat16>(a);
#ifndef FA_BASE_ISA
    if (a.dtype == DType::kFloat32) return with_cap<float>(a);
    with_cap<Half>(a);
#endif
}

}  // namespace
}  // namespace fastalign::FA_ISA
