// 8 float32 lanes in plain C++, for any processor; loops that compilers turn into what vectors there are.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd_types.h"

namespace fastalign::FA_ISA {

struct Vec {
    static constexpr int kWidth = 8;
    float v[8];
};

template <class F>
inline Vec each(F f) {
    Vec r;
    for (int i = 0; i < 8; ++i) r.v[i] = f(i);
    return r;
}

constexpr int kTileRows = 2;  // of a matrix product, beside two vectors: what the registers hold
constexpr bool kHasFma = false;
inline float first(Vec a) { return a.v[0]; }
inline Vec set1(float x) {
    return each([=](int) { return x; });
}
inline Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

inline float reduce_add(Vec a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}

inline float reduce_max(Vec a) {
    float m = a.v[0];
    for (int i = 1; i < 8; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
}

// Is any lane above the bound? NaN is not.
inline bool any_above(Vec a, float bound) {
    bool above = false;
    for (int i = 0; i < 8; ++i) above |= a.v[i] > bound;
    return above;
}

// 2^u: 0 below -126, at least 2^127 above 127 (callers test sums for that), NaN at NaN. Relative error below 3e-7.
inline Vec exp2(Vec u) {
    return each([&](int i) {
        float c = u.v[i] < -127.0f ? -127.0f : u.v[i];  // false for NaN, which passes
        c = c > 127.0f ? 127.0f : c;
        const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's low bits are round(u) + 127
        const float n = c + magic, f = c - (n - magic);
        float p = f * 0.00132647203f + 0.00967151299f;
        p = p * f + 0.0555073358f;
        p = p * f + 0.240222424f;
        p = p * f + 0.693147004f;
        p = p * f + 1.0f;
        return p * bit_cast<float>(bit_cast<uint32_t>(n) << 23);
    });
}

// x = mantissa * 2^exponent with 1 <= mantissa < 2, of a positive, normal number; NaN stays one.
inline void split(Vec x, Vec& exponent, Vec& mantissa) {
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(x.v[i]), fraction = bits & 0x7fffffu, one = 0x3f800000u;
        exponent.v[i] = static_cast<float>(static_cast<int>(bits >> 23) - 127);
        mantissa.v[i] = x.v[i] == x.v[i] ? bit_cast<float>(fraction | one) : x.v[i];
    }
}

inline Vec mul_nonzero(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] == 0.0f ? 0.0f : a.v[i] * b.v[i]; });
}

inline Vec select_small(Vec x, float bound, Vec a, Vec b) {
    return each([&](int i) { return std::fabs(x.v[i]) < bound ? a.v[i] : b.v[i]; });
}

template <class T>
inline void load2(const T* p, Vec& a, Vec& b) {
    for (int i = 0; i < 8; ++i) a.v[i] = to_float(p[i]), b.v[i] = to_float(p[i + 8]);
}

constexpr int kStreamAlign = 1;
template <bool kStream, class T>
inline void store2(T* p, Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) from_float(a.v[i], p[i]), from_float(b.v[i], p[i + 8]);
}

inline void prefetch(const void*) {}
inline void stream_fence() {}

}  // namespace fastalign::FA_ISA
