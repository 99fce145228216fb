// 16-byte vectors of logits in CUDA, and their conversions.
#pragma once
#include <cfloat>
#include <cstdint>

#include "../approximations.h"
#include "../cpu/simd_types.h"

namespace fastalign::cuda {

constexpr int kBytes = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

// Who shares a row: the threads of a block; or, where rows are short, those of a warp, whose neighbours in the block
// have rows of their own.
struct BlockTeam {
    static __device__ int thread() { return threadIdx.x; }
    static __device__ int threads() { return blockDim.x; }
};
struct WarpTeam {
    static __device__ int thread() { return threadIdx.x % 32; }
    static __device__ int threads() { return 32; }
};

struct Pack {
    uint32_t w[4];
};

// ------------------------------------------------------------------------------------------------- element types
// bits of -inf, in each element of a word; `unpack` and `pack` one word; `larger` and `magnitude` by element, NaN may
// be lost.
template <class T>
struct Words;

template <>
struct Words<float> {
    using Bits = uint32_t;
    static constexpr int kPerWord = 1;
    static constexpr uint32_t kMinusInf = 0xff800000u;
    static __device__ void unpack(uint32_t w, float* x) { x[0] = __uint_as_float(w); }
    static __device__ uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
    static __device__ uint32_t larger(uint32_t a, uint32_t b) {
        return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
    }
    static __device__ uint32_t magnitude(uint32_t w) { return w & 0x7fffffffu; }
    static __device__ float load(const float* p) { return *p; }
    static __device__ void store(float* p, float x) { *p = x; }
};

template <>
struct Words<BFloat16> {
    using Bits = uint16_t;
    static constexpr int kPerWord = 2;
    static constexpr uint32_t kMinusInf = 0xff80ff80u;
    static __device__ void unpack(uint32_t w, float* x) {
        x[0] = __uint_as_float(w << 16);
        x[1] = __uint_as_float(w & 0xffff0000u);
    }
    static __device__ uint32_t pack(const float* x) {
        uint32_t w;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(x[1]), "f"(x[0]));
        return w;
    }
    static __device__ uint32_t larger(uint32_t a, uint32_t b) {
        uint32_t w;
        asm("max.bf16x2 %0, %1, %2;" : "=r"(w) : "r"(a), "r"(b));
        return w;
    }
    static __device__ uint32_t magnitude(uint32_t w) { return w & 0x7fff7fffu; }
    static __device__ float load(const BFloat16* p) { return __uint_as_float(static_cast<uint32_t>(p->bits) << 16); }
    static __device__ void store(BFloat16* p, float x) {
        const float two[2] = {x, x};
        p->bits = static_cast<uint16_t>(pack(two));
    }
};

template <>
struct Words<Half> {
    using Bits = uint16_t;
    static constexpr int kPerWord = 2;
    static constexpr uint32_t kMinusInf = 0xfc00fc00u;
    static __device__ void unpack(uint32_t w, float* x) {
        asm("{.reg .f16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;}"
            : "=f"(x[0]), "=f"(x[1])
            : "r"(w));
    }
    static __device__ uint32_t pack(const float* x) {
        uint32_t w;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(x[1]), "f"(x[0]));
        return w;
    }
    static __device__ uint32_t larger(uint32_t a, uint32_t b) {
        uint32_t w;
        asm("max.f16x2 %0, %1, %2;" : "=r"(w) : "r"(a), "r"(b));
        return w;
    }
    static __device__ uint32_t magnitude(uint32_t w) { return w & 0x7fff7fffu; }
    static __device__ float load(const Half* p) {
        float two[2];
        unpack(p->bits, two);
        return two[0];
    }
    static __device__ void store(Half* p, float x) {
        const float two[2] = {x, x};
        p->bits = static_cast<uint16_t>(pack(two));
    }
};

template <class T>
constexpr int kWidth = kBytes / static_cast<int>(sizeof(T));  // elements of a vector

// Vectors that hold `elements`. Unsigned, so that the division is a shift.
template <class T>
__device__ inline int vectors_of(int elements) {
    return static_cast<int>((static_cast<unsigned>(elements) + kWidth<T> - 1) / kWidth<T>);
}

template <class T>
__device__ inline void unpack(const Pack& v, float (&x)[kWidth<T>]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) Words<T>::unpack(v.w[i], x + i * Words<T>::kPerWord);
}

template <class T>
__device__ inline Pack pack(const float (&x)[kWidth<T>]) {
    Pack v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = Words<T>::pack(x + i * Words<T>::kPerWord);
    return v;
}

// The largest element of a tile, or the largest magnitude.
template <class T, bool kMagnitude = false, int kCount>
__device__ inline float maximum(const Pack (&v)[kCount]) {
    const auto word = [](uint32_t w) { return kMagnitude ? Words<T>::magnitude(w) : w; };
    Pack m;
#pragma unroll
    for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i) m.w[i] = u == 0 ? word(v[0].w[i]) : Words<T>::larger(m.w[i], word(v[u].w[i]));
    const uint32_t one = Words<T>::larger(Words<T>::larger(m.w[0], m.w[1]), Words<T>::larger(m.w[2], m.w[3]));
    float x[2] = {0, -INFINITY};
    Words<T>::unpack(one, x);
    return fmaxf(x[0], x[1]);
}

// The vector whose elements' bits kWidth lanes hold, from `lane` on; every lane gets it.
template <class T>
__device__ inline Pack vector_of_lanes(uint32_t bits, int lane) {
    constexpr int kPerWord = Words<T>::kPerWord;
    if constexpr (kPerWord == 2) bits |= __shfl_down_sync(kAllLanes, bits, 1) << 16;
    Pack v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = __shfl_sync(kAllLanes, bits, lane + i * kPerWord);
    return v;
}

// ------------------------------------------------------------------------------------------------- logits
// What a call does to every logit before anything else; scale = log2(e) / T.
struct Prepare {
    float inv_cap, cap, scale, inv_scale;
    double exact_inv_scale;  // of the scale as it is rounded
    // Soft-capping. Logits up to `near` in magnitude times their series are their capped ones times scale. `centred`:
    // capped logits are so few powers of two from 0 that a plain sum needs no other shift.
    float per_cap, near;
    TanhSeries exponent;
    bool centred;
    bool mean;  // whether the logits' mean is asked for

    __device__ ExactShift exact() const { return {scale, exact_inv_scale}; }
};

template <bool kCap>
__device__ inline float capped(float x, const Prepare& k) {
    if constexpr (kCap) return k.cap * tanh_of(x * k.inv_cap);
    else return x;
}

// tanh(x / cap) for the gradient. Half of tanh_of's instructions where the gradient is rounded to 16 bits, beside which
// an absolute error of 1e-7 does not show.
template <class T>
__device__ inline float tanh_in_gradient(float x, const Prepare& k) {
    if constexpr (sizeof(T) == 4) return tanh_of(x * k.inv_cap);
    else return fmaf(reciprocal(power_of_two(x * k.per_cap) + 1), -2.0f, 1.0f);
}

template <class T, int kCount>
__device__ inline bool all_near(const Pack (&v)[kCount], const Prepare& k) {
    return maximum<T, true>(v) <= k.near;
}

__device__ inline Pack minus_infinity(uint32_t word) { return {{word, word, word, word}}; }

// Cuts each vector's 16 bytes at byte `shift`, the same for all lanes, from v[u] and the vector after it in memory, of
// which `following(u, i)` is word i. A branch on whole words first: no word is moved by selections, or fetched in vain.
template <int kWords, int kCount, class Following>
__device__ inline void cut_words(Pack (&v)[kCount], int bits, const Following& following) {
    Pack next[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int i = 0; i <= kWords; ++i) next[u].w[i] = following(u, i);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        const Pack a = v[u], b = next[u];
        const auto word = [&](int i) { return i < 4 ? a.w[i & 3] : b.w[i & 3]; };
#pragma unroll
        for (int i = 0; i < 4; ++i) v[u].w[i] = __funnelshift_r(word(i + kWords), word(i + kWords + 1), bits);
    }
}

template <int kCount, class Following>
__device__ inline void cut(Pack (&v)[kCount], int shift, const Following& following) {
    const int bits = 8 * (shift & 3);
    switch (shift >> 2) {
        case 0:
            return cut_words<0>(v, bits, following);
        case 1:
            return cut_words<1>(v, bits, following);
        case 2:
            return cut_words<2>(v, bits, following);
        default:
            return cut_words<3>(v, bits, following);
    }
}

}  // namespace fastalign::cuda
