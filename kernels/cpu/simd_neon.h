// 8 float32 lanes in two registers of 64-bit Arm, which all have NEON with FMA and conversions of 16-bit floats. The
// same operations as simd_avx2.h in the same lanes and the same order, so that the same numbers come out.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "simd_types.h"

namespace fastalign::FA_ISA {

struct Vec {
    static constexpr int kWidth = 8;
    float32x4_t lo, hi;
};

// `f` of each half.
template <class F>
inline Vec halves(Vec a, F f) {
    return {f(a.lo), f(a.hi)};
}
template <class F>
inline Vec halves(Vec a, Vec b, F f) {
    return {f(a.lo, b.lo), f(a.hi, b.hi)};
}

constexpr int kTileRows = 6;  // of a matrix product, beside two vectors: what the 32 registers hold
constexpr bool kHasFma = true;
inline float first(Vec a) { return vgetq_lane_f32(a.lo, 0); }
inline Vec set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)}; }

// b where a is not above it, NaN among that, as x86 has it; Arm's own would carry every NaN on.
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec max(Vec a, Vec b) { return halves(a, b, larger); }

inline float reduce_add(Vec a) {
    const float32x4_t x = vaddq_f32(a.lo, a.hi);
    return vpadds_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x)));
}

inline float reduce_max(Vec a) {
    const float32x4_t x = larger(a.lo, a.hi), y = larger(x, vextq_f32(x, x, 2)), z = larger(y, vdupq_laneq_f32(y, 1));
    return vgetq_lane_f32(z, 0);
}

// Is any lane above the bound? NaN is not.
inline bool any_above(Vec a, float bound) {
    const float32x4_t b = vdupq_n_f32(bound);
    return vmaxvq_u32(vorrq_u32(vcgtq_f32(a.lo, b), vcgtq_f32(a.hi, b))) != 0;
}

// 2^u: 0 below -126, at least 2^127 above 127 (callers test sums for that), NaN at NaN. Relative error below 2e-7.
inline Vec exp2(Vec u) {
    return halves(u, [](float32x4_t x) {
        const float32x4_t c = vmaxq_f32(vdupq_n_f32(-127.0f), vminq_f32(vdupq_n_f32(127.0f), x));  // NaN passes
        const float32x4_t magic = vdupq_n_f32(12582912.0f + 127.0f);  // 1.5 * 2^23: the low bits are round(u) + 127
        const float32x4_t n = vaddq_f32(c, magic), f = vsubq_f32(c, vsubq_f32(n, magic));
        float32x4_t p = vfmaq_f32(vdupq_n_f32(0.00967151299f), f, vdupq_n_f32(0.00132647203f));
        p = vfmaq_f32(vdupq_n_f32(0.0555073358f), p, f);
        p = vfmaq_f32(vdupq_n_f32(0.240222424f), p, f);
        p = vfmaq_f32(vdupq_n_f32(0.693147004f), p, f);
        p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
        return vmulq_f32(p, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(n), 23)));
    });
}

// x = mantissa * 2^exponent with 1 <= mantissa < 2, of a positive, normal number; NaN stays one.
inline void split(Vec x, Vec& exponent, Vec& mantissa) {
    exponent = halves(x, [](float32x4_t a) {
        return vcvtq_f32_s32(
            vsubq_s32(vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_f32(a), 23)), vdupq_n_s32(127)));
    });
    mantissa = halves(x, [](float32x4_t a) {
        const uint32x4_t fraction = vandq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(0x7fffffu));
        const float32x4_t found = vreinterpretq_f32_u32(vorrq_u32(fraction, vdupq_n_u32(0x3f800000u)));
        return vbslq_f32(vceqq_f32(a, a), found, a);
    });
}

inline Vec mul_nonzero(Vec a, Vec b) {
    return halves(a, b, [](float32x4_t x, float32x4_t y) {
        const uint32x4_t product = vreinterpretq_u32_f32(vmulq_f32(x, y));
        return vreinterpretq_f32_u32(vbicq_u32(product, vceqzq_f32(x)));
    });
}

inline Vec select_small(Vec x, float bound, Vec a, Vec b) {
    const float32x4_t limit = vdupq_n_f32(bound);
    return {vbslq_f32(vcaltq_f32(x.lo, limit), a.lo, b.lo), vbslq_f32(vcaltq_f32(x.hi, limit), a.hi, b.hi)};
}

inline void load2(const float* p, Vec& a, Vec& b) {
    a = {vld1q_f32(p), vld1q_f32(p + 4)}, b = {vld1q_f32(p + 8), vld1q_f32(p + 12)};
}

// The even elements, and the odd ones.
inline void load2(const BFloat16* p, Vec& a, Vec& b) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(p);
    const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(bits)), y = vreinterpretq_u32_u16(vld1q_u16(bits + 8));
    const uint32x4_t upper = vdupq_n_u32(0xffff0000u);
    a = {vreinterpretq_f32_u32(vshlq_n_u32(x, 16)), vreinterpretq_f32_u32(vshlq_n_u32(y, 16))};
    b = {vreinterpretq_f32_u32(vandq_u32(x, upper)), vreinterpretq_f32_u32(vandq_u32(y, upper))};
}

inline Vec load_half(const uint16_t* p) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(p));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
}

inline void load2(const Half* p, Vec& a, Vec& b) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(p);
    a = load_half(bits), b = load_half(bits + 8);
}

// Rounded to nearest even in the upper 16 bits; what is in the lower ones does not count.
inline uint32x4_t round_bf16(float32x4_t a) {
    const uint32x4_t x = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(x, vdupq_n_u32(0x7fff)), odd);
    return vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc00000u));
}

inline void put_bf16(uint16_t* p, float32x4_t even, float32x4_t odd) {
    vst1q_u16(p, vreinterpretq_u16_u32(vsriq_n_u32(round_bf16(odd), round_bf16(even), 16)));
}

inline void put_half(uint16_t* p, Vec a) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.lo), a.hi)));
}

// There are no intrinsics for stores that pass the caches by.
constexpr int kStreamAlign = 1;
template <bool kStream>
inline void store2(float* p, Vec a, Vec b) {
    vst1q_f32(p, a.lo), vst1q_f32(p + 4, a.hi), vst1q_f32(p + 8, b.lo), vst1q_f32(p + 12, b.hi);
}
template <bool kStream>
inline void store2(BFloat16* p, Vec a, Vec b) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(p);
    put_bf16(bits, a.lo, b.lo), put_bf16(bits + 8, a.hi, b.hi);
}
template <bool kStream>
inline void store2(Half* p, Vec a, Vec b) {
    uint16_t* bits = reinterpret_cast<uint16_t*>(p);
    put_half(bits, a), put_half(bits + 8, b);
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void stream_fence() {}

}  // namespace fastalign::FA_ISA
