// The 16-bit element types, as bits, and their scalar conversions (round to nearest even; NaN stays NaN).
#pragma once
#include <cstdint>
#include <cstring>

namespace fastalign {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Moving the exponent field into place leaves it 112 too small; the product repairs that, denormals included.
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

inline void from_float(float x, float& out) { out = x; }

inline void from_float(float x, BFloat16& out) {
    const uint32_t b = bit_cast<uint32_t>(x);
    out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}

inline void from_float(float x, Half& out) {
    const uint32_t b = bit_cast<uint32_t>(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
    uint32_t h;
    if (magnitude > 0x7f800000u) h = 0x7e00u;
    else if (magnitude >= 0x477ff000u) h = 0x7c00u;  // rounds to 65536 or more
    else if (magnitude < 0x38800000u) {              // a half denormal: let the float adder round at 2^-24
        h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    out.bits = static_cast<uint16_t>(sign | h);
}

}  // namespace fastalign
