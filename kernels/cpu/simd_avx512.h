// 16 float32 lanes: AVX-512 F, BW, DQ, VL, and BF16 where the compiler may use it. The smallest vocabulary of
// operations that the kernels need.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "simd_types.h"

namespace fastalign::FA_ISA {

struct Vec {
    static constexpr int kWidth = 16;
    __m512 v;
};

constexpr int kTileRows = 12;  // of a matrix product, beside two vectors: what the registers hold
constexpr bool kHasFma = true;
inline float first(Vec a) { return _mm512_cvtss_f32(a.v); }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

// Is any lane above the bound? NaN is not.
inline bool any_above(Vec a, float bound) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0; }

// 2^u for any u: 0 at -inf, inf where it overflows, NaN at NaN. Relative error below 2e-7.
inline Vec exp2(Vec u) {
    const __m512 f = _mm512_reduce_ps(u.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // u - floor(u); 0 at -inf
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.00186713098f), _mm512_set1_ps(0.00901702791f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0557999164f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240164444f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693151295f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return {_mm512_scalef_ps(p, u.v)};  // p * 2^floor(u)
}

// x = mantissa * 2^exponent with 1 <= mantissa < 2, of a positive number.
inline void split(Vec x, Vec& exponent, Vec& mantissa) {
    exponent.v = _mm512_getexp_ps(x.v);
    mantissa.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}

// a * b, but 0 where a is 0, whatever b is.
inline Vec mul_nonzero(Vec a, Vec b) {
    return {_mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), a.v, b.v)};
}

// |x| < bound ? a : b
inline Vec select_small(Vec x, float bound, Vec a, Vec b) {
    const __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(x.v), _mm512_set1_ps(bound), _CMP_LT_OQ);
    return {_mm512_mask_blend_ps(small, b.v, a.v)};
}

// Two vectors of consecutive elements. Which lane holds which element is not said: bfloat16 comes as even and odd
// ones, which needs no shuffle; a store puts every element back where its load found it.
inline void load2(const float* p, Vec& a, Vec& b) { a.v = _mm512_loadu_ps(p), b.v = _mm512_loadu_ps(p + 16); }

inline void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m512i x = _mm512_loadu_si512(p);
    a.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline void load2(const Half* p, Vec& a, Vec& b) {
    a.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}

#ifdef __AVX512BF16__
inline __m512i pack_bf16(Vec a, Vec b) {
    // a's results fill the lower half and b's the upper: interleaved again, as they came.
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
}
#else
// Upper halves of the lanes after rounding to nearest even; NaN stays NaN.
inline __m512i round_bf16(Vec a) {
    const __m512i x = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
}

inline __m512i pack_bf16(Vec a, Vec b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(round_bf16(a), 16), round_bf16(b));
}

#endif

inline __m512i pack_half(Vec a, Vec b) {
    const __m256i lo = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i hi = _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

template <bool kStream>
inline void put(void* p, __m512i x) {
    if constexpr (kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
    else _mm512_storeu_si512(p, x);
}

// kStream: past the caches; p must then be aligned to kStreamAlign bytes.
constexpr int kStreamAlign = 64;
template <bool kStream>
inline void store2(float* p, Vec a, Vec b) {
    put<kStream>(p, _mm512_castps_si512(a.v));
    put<kStream>(p + 16, _mm512_castps_si512(b.v));
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
