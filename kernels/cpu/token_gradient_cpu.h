// The gradient of one row of logits on the CPU. Included after token_rows_cpu.h.
#pragma once
#include "token_rows_cpu.h"

namespace fastalign::FA_ISA {
namespace {

template <bool kCap, Mode kMode>
inline Vec gradient(Vec x, Vec z, const Coefficients& c, const Prepare& k) {
    Vec slope = set1(c.a), squash = set1(1.0f);
    if constexpr (kCap) {
        const Vec th = tanh(x * k.inv_cap);
        squash = set1(1.0f) - th * th;
        x = k.cap * th;
    }
    const Vec u = (x - set1(c.shift)) * k.scale, e = exp2(u);
    Vec dx;
    if constexpr (kMode == kPlain) {
        dx = fma(e, slope, set1(c.kappa));
    } else {
        slope = fma(set1(c.b), u, slope);
        if constexpr (kMode == kReference) {
            const Vec v = (capped<kCap>(z, k) - set1(c.ref_shift)) * k.scale;
            slope = slope - set1(c.g) * v;
        }
        dx = mul_nonzero(e, slope) + set1(c.kappa);
    }
    return kCap ? dx * squash : dx;
}

template <class T, bool kCap, Mode kMode>
void gradient_tail(const T* x, const T* z, T* out, int64_t n, const Coefficients& c, const Prepare& k) {
    Vec a, b, p = set1(0), q = set1(0);
    T unit[kUnit];
    load_tail(x, n, 0.0f, a, b);
    if constexpr (kMode == kReference) load_tail(z, n, 0.0f, p, q);
    store2<false>(unit, gradient<kCap, kMode>(a, p, c, k), gradient<kCap, kMode>(b, q, c, k));
    std::memcpy(out, unit, n * sizeof(T));
}

template <class T, bool kCap, Mode kMode, bool kStream>
void gradient_piece(const T* x, const T* z, T* out, int64_t n, const Coefficients& c, const Prepare& k) {
    constexpr int64_t kAhead = 2048 / sizeof(T);
    constexpr int kLines = kUnit * sizeof(T) < 64 ? 1 : kUnit * sizeof(T) / 64;
    Vec a, b, p = set1(0), q = set1(0);
    int64_t i = 0;
    if (kStream) {  // a streaming store must be aligned: the first few elements go by the ordinary way
        const int64_t past = reinterpret_cast<uintptr_t>(out) % kStreamAlign / sizeof(T);
        i = past ? std::min<int64_t>(n, kStreamAlign / sizeof(T) - past) : 0;
        if (i) gradient_tail<T, kCap, kMode>(x, z, out, i, c, k);
    }
    for (; i + kUnit <= n; i += kUnit) {
        for (int l = 0; l < kLines; ++l) prefetch(x + i + kAhead + l * (64 / static_cast<int>(sizeof(T))));
        load2(x + i, a, b);
        if constexpr (kMode == kReference) {
            for (int l = 0; l < kLines; ++l) prefetch(z + i + kAhead + l * (64 / static_cast<int>(sizeof(T))));
            load2(z + i, p, q);
        }
        store2<kStream>(out + i, gradient<kCap, kMode>(a, p, c, k), gradient<kCap, kMode>(b, q, c, k));
    }
    if (i < n) gradient_tail<T, kCap, kMode>(x + i, kMode == kReference ? z + i : z, out + i, n - i, c, k);
}

// The target's gradient, rounded to T once. Taken before the row is overwritten.
template <class T, bool kCap, Mode kMode>
float label_gradient(const T* x, const T* z, int64_t label, const Coefficients& c, const Prepare& k) {
    const float logit = to_float(x[label]);
    const Vec xl = set1(logit), zl = set1(kMode == kReference ? to_float(z[label]) : 0.0f);
    return first(gradient<kCap, kMode>(xl, zl, at_target(c, prepared<kCap>(logit, k)), k));
}

// Gradient of elements [begin, end) of a row, which may be written over the row itself.
template <class T, bool kCap, Mode kMode>
void write_gradient(const T* x, const T* z, T* out, int64_t begin, int64_t end, int64_t label, const Coefficients& c,
                    const Prepare& k, bool stream) {
    // Ignored tokens, and tokens whose loss does not move (a clipped PPO ratio), are not read at all.
    if (no_gradient(c)) {
        std::memset(static_cast<void*>(out + begin), 0, (end - begin) * sizeof(T));
        return;
    }
    if (kMode == kReference && c.g == 0) z = x;  // any finite number where x is one: the reference may be -inf there
    const bool has_label = begin <= label && label < end;
    const float at_label = has_label ? label_gradient<T, kCap, kMode>(x, z, label, c, k) : 0.0f;
    const T* zb = kMode == kReference ? z + begin : nullptr;
    if (stream && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0) {
        gradient_piece<T, kCap, kMode, true>(x + begin, zb, out + begin, end - begin, c, k);
        stream_fence();
    } else {
        gradient_piece<T, kCap, kMode, false>(x + begin, zb, out + begin, end - begin, c, k);
    }
    if (has_label) from_float(at_label, out[label]);
}

}  // namespace
}  // namespace fastalign::FA_ISA
