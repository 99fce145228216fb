// 8 float32 lanes: AVX2, FMA and F16C. The same operations as simd_avx512.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "simd_types.h"

namespace fastalign::FA_ISA {

struct Vec {
    static constexpr int kWidth = 8;
    __m256 v;
};

constexpr int kTileRows = 6;  // of a matrix product, beside two vectors: what the registers hold
constexpr bool kHasFma = true;
inline float first(Vec a) { return _mm256_cvtss_f32(a.v); }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

inline float reduce_add(Vec a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

inline float reduce_max(Vec a) {
    const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

// Is any lane above the bound? NaN is not.
inline bool any_above(Vec a, float bound) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
}

// 2^u: 0 below -126, at least 2^127 above 127 (callers test sums for that), NaN at NaN. Relative error below 2e-7.
inline Vec exp2(Vec u) {
    // min and max return their second operand where one is NaN, so NaN passes both.
    const __m256 c = _mm256_max_ps(_mm256_set1_ps(-127.0f), _mm256_min_ps(_mm256_set1_ps(127.0f), u.v));
    const __m256 magic = _mm256_set1_ps(12582912.0f + 127.0f);  // 1.5 * 2^23: the sum's low bits are round(u) + 127
    const __m256 n = _mm256_add_ps(c, magic);
    const __m256 f = _mm256_sub_ps(c, _mm256_sub_ps(n, magic));
    __m256 p = _mm256_fmadd_ps(f, _mm256_set1_ps(0.00132647203f), _mm256_set1_ps(0.00967151299f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.0555073358f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.240222424f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.693147004f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    return {_mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n), 23)))};
}

// x = mantissa * 2^exponent with 1 <= mantissa < 2, of a positive, normal number; NaN stays one.
inline void split(Vec x, Vec& exponent, Vec& mantissa) {
    const __m256i bits = _mm256_castps_si256(x.v), one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
    const __m256i biased = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
    const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    exponent.v = _mm256_cvtepi32_ps(biased);
    mantissa.v = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_or_si256(fraction, one)), x.v, nan);
}

inline Vec mul_nonzero(Vec a, Vec b) {
    const __m256 valid = _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return {_mm256_and_ps(valid, _mm256_mul_ps(a.v, b.v))};
}

inline Vec select_small(Vec x, float bound, Vec a, Vec b) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(magnitude, _mm256_set1_ps(bound), _CMP_LT_OQ))};
}

inline void load2(const float* p, Vec& a, Vec& b) { a.v = _mm256_loadu_ps(p), b.v = _mm256_loadu_ps(p + 8); }

inline void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a.v = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b.v = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

inline void load2(const Half* p, Vec& a, Vec& b) {
    a.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}

inline __m256i round_bf16(Vec a) {
    const __m256i x = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}

inline __m256i pack_bf16(Vec a, Vec b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(a), 16), round_bf16(b), 0xaa);
}

inline __m256i pack_half(Vec a, Vec b) {
    const __m128i lo = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i hi = _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1);
}

template <bool kStream>
inline void put(void* p, __m256i x) {
    if constexpr (kStream) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x);
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}

constexpr int kStreamAlign = 32;
template <bool kStream>
inline void store2(float* p, Vec a, Vec b) {
    put<kStream>(p, _mm256_castps_si256(a.v));
    put<kStream>(p + 8, _mm256_castps_si256(b.v));
}
template <bool kStream>
inline void store2(BFloat16* p, Vec a, Vec b) {
    put<kStream>(p, pack_bf16(a, b));
}
template <bool kStream>
inline void store2(Half* p, Vec a, Vec b) {
    put<kStream>(p, pack_half(a, b));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void stream_fence() { _mm_sfence(); }

}  // namespace fastalign::FA_ISA
