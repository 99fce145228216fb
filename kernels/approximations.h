// The few functions of one element that the CUDA kernels need beyond the hardware's own. They compile for the host too,
// where the tests hold them against float64.
#pragma once
#include <cstring>

#include "token_stats.h"

namespace fastalign {

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

// 2^n of the integer n that t holds in its last bits, biased by 127.
FA_HD float power_of_integer(float t) {
    uint32_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits <<= 23;
    memcpy(&t, &bits, sizeof t);
    return t;
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
    return p * power_of_integer(t);
}

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

}  // namespace fastalign
