// What every compiled backend computes with, and the few functions that the CUDA kernels need beyond the hardware's
// own. All compile for the host too, where the tests hold them against float64.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FA_HD __host__ __device__ inline
#define FA_MEMBER __host__ __device__
#define FA_APART __noinline__
#else
// static: each instruction set keeps its own copy, none of which may serve another processor.
#define FA_HD static inline
#define FA_MEMBER
#define FA_APART
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

// The larger of the two, NaN if x is one.
FA_HD float max_or_nan(float x, float low) {
#ifdef __CUDA_ARCH__
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
    return y;
#else
    return x < low ? low : x;
#endif
}

FA_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}

FA_HD uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

FA_HD float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// 2^u without the special-function unit, for a share of the elements, as that unit is the first to run out where 16-bit
// logits are only read. 2^u = 2^i 2^f, |f| <= 1/2, by a polynomial of relative error 1.6e-7 (fitted for equal ripple,
// exact at 0). 0 below -126.5 and at -inf, NaN at NaN; u must not exceed 127.
FA_HD float exp2_polynomial(float u) {
    constexpr float kRound = 12582912.0f + 127.0f;  // adding 1.5 * 2^23 rounds to an integer; 127: the exponent's bias
    u = max_or_nan(u, -127.0f);
    const float t = u + kRound, f = u - (t - kRound);
    float p = fmaf(0.00132746331f, f, 0.00967196189f);
    p = fmaf(p, f, 0.0555067845f);
    p = fmaf(p, f, 0.24022235f);
    p = fmaf(p, f, 0.693147063f);
    p = fmaf(p, f, 1.0f);
    return p * float_of(bits_of(t) << 23);  // t holds i + 127 in its last bits
}

// ln(s), error below 5e-9, for s of 0 or at least the smallest normal number: s = 2^i (1 + g), g in [-0.293, 0.415),
// ln(1 + g) = g - g^2 / 2 + g^3 q(g), q by a polynomial in float32. A fifth of the instructions of the float64 log.
FA_HD double natural_log_of(float s) {
    constexpr uint32_t kRootHalf = 0x3f3504f3u;
    const int32_t exponent = static_cast<int32_t>(bits_of(s) - kRootHalf) >> 23;
    const float g = float_of(bits_of(s) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
    float q = fmaf(-0.0763121024f, g, 0.128549263f);
    q = fmaf(q, g, -0.132078886f);
    q = fmaf(q, g, 0.141900063f);
    q = fmaf(q, g, -0.166165233f);
    q = fmaf(q, g, 0.200016156f);
    q = fmaf(q, g, -0.25001061f);
    q = fmaf(q, g, 0.333333284f);
    const double wide = g, rest = fma(wide * wide, -0.5, static_cast<double>(g * g * g * q));
    const double log = fma(static_cast<double>(exponent), kLn2, wide + rest);
    if (s > 0 && s <= 3.402823466e38f) return log;
    return s == 0 ? -INFINITY : s;  // infinity and NaN stay what they are
}

// ln(x); on the device x was a float32 sum.
FA_HD double natural_log(double x) {
#ifdef __CUDA_ARCH__
    return natural_log_of(static_cast<float>(x));
#else
    return kLn2 * log2(x);
#endif
}

// ln(1 + x) to a relative error below 3e-7, for x from 0 to 2^-6.
FA_HD double natural_log1p(double x) {
#ifdef __CUDA_ARCH__
    const float f = static_cast<float>(x);
    return f - f * f * fmaf(f, fmaf(f, 0.25f, -0.333333333f), 0.5f);
#else
    return log1p(x);
#endif
}

// 1 - e^x to a relative error below 2e-7.
FA_HD float one_less_power(float x) { return -expm1f(x); }

// 2^x for a factor of float32 accuracy, such as a row's; on the device without float64's long way.
FA_HD double power_of_row(double x) {
#ifdef __CUDA_ARCH__
    return exp2_polynomial(static_cast<float>(x < 126 ? x : 126));
#else
    return exp2(x);
#endif
}

// (x - shift) * scale in one operation, fma(x, by, -at), where `at` is shift * scale rounded: all of a row's exps are
// relative to at / scale then, a number as good as the shift. Far out (rows of masked logits) it would be off by more
// powers of two than a float32 has. There neighbouring logits are so far apart that only equal ones count, and a scale
// of 1 will do, by which nothing is rounded and nothing overflows.
struct Exponent {
    float by, at;

    FA_MEMBER float of(float x) const { return fmaf(x, by, -at); }
};

FA_HD bool fits_exponent(float shift, float scale) { return fabsf(shift * scale) < 0x1p30f; }

FA_HD Exponent exponent(float shift, float scale) {
    const float by = fits_exponent(shift, scale) ? scale : 1.0f;
    return {by, shift * by};
}

// The number that exps by an Exponent are relative to, in the logits' own units.
struct ExactShift {
    float scale;
    double inverse;  // 1 / scale

    FA_MEMBER double operator()(float shift) const {
        return fits_exponent(shift, scale) ? static_cast<double>(shift * scale) * inverse : static_cast<double>(shift);
    }
};

// tanh: its series below 0.6 (the quotient would cancel there), 1 - 2 / (e^2x + 1) beyond. The CPU's, in one lane.
FA_HD float tanh_of(float x) {
    const float s = x * x;
    float p = fmaf(kTanh11, s, kTanh9);
    p = fmaf(p, s, kTanh7);
    p = fmaf(p, s, kTanh5);
    p = fmaf(p, s, kTanh3);
    const float quotient = 1 - 2 * reciprocal(power_of_two(x * static_cast<float>(2 * kLog2e)) + 1);
    const float large = x < 0 ? -x : x;
    return large < 0.6f ? fmaf(x * s, p, x) : quotient;
}

// tanh near zero as t (c[0] + c[1] t^2 + .. + c[4] t^8), relative error below 2.5e-7 for |t| <= 0.6 (fitted for equal
// ripple). With the units of argument and result factored in.
struct TanhSeries {
    static constexpr float kEnd = 0.6f;
    static constexpr int kTerms = 5;
    float c[kTerms];

    FA_MEMBER float operator()(float x) const {
        const float s = x * x;
        float p = fmaf(c[4], s, c[3]);
        p = fmaf(p, s, c[2]);
        p = fmaf(p, s, c[1]);
        return fmaf(p, s, c[0]);
    }
};

// `by` tanh(x / unit) = x series(x).
FA_HD TanhSeries tanh_series(double unit, double by) {
    constexpr double kFitted[] = {0.99999994, -0.333323091, 0.133101732, -0.0521014668, 0.01547541};
    TanhSeries series{};
    double factor = by / unit;
    for (int i = 0; i < TanhSeries::kTerms; ++i, factor /= unit * unit)
        series.c[i] = static_cast<float>(kFitted[i] * factor);
    return series;
}

}  // namespace fastalign
