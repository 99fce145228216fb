// The gradient of a row in CUDA: no thread needs another's number, so the stores' alignment decides who does what.
#pragma once
#include "token_rows_cuda.cuh"

namespace fastalign::cuda {

// What is left of an element once the row's coefficients are known; see token_stats.h.
template <bool kCap, Mode kMode>
__device__ inline float gradient(float x, float z, const Coefficients& c, const Prepare& k) {
    float squash = 1;
    if constexpr (kCap) {
        const float th = tanh_of(x * k.inv_cap);
        squash = 1 - th * th;
        x = k.cap * th;
    }
    const float u = (x - c.pivot) * k.scale, e = power_of_two(u);
    float dx;
    if constexpr (kMode == kPlain) {
        dx = fmaf(e, c.a, c.kappa);
    } else {
        float slope = fmaf(c.b, u, c.a);
        if constexpr (kMode == kReference) slope = fmaf(-c.g, (capped<kCap>(z, k) - c.ref_pivot) * k.scale, slope);
        dx = (e == 0 ? 0 : e * slope) + c.kappa;  // 0 * inf: a token of probability 0 has no gradient
    }
    return kCap ? dx * squash : dx;
}

// The first element from which 16-byte stores to [out, out + count) are aligned.
template <class T>
__device__ inline int first_aligned(const T* out, int count) {
    const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(out) & 15) / static_cast<int>(sizeof(T));
    return before < count ? before : count;
}

template <class T>
__device__ inline void fill(T* out, int count, float value) {
    float many[kWidth<T>];
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) many[i] = value;
    const Pack v = pack<T>(many);
    const int head = first_aligned(out, count), vectors = (count - head) / kWidth<T>;
    const int tail = head + vectors * kWidth<T>;
    if (static_cast<int>(threadIdx.x) < head) Words<T>::store(out + threadIdx.x, value);
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) store_pack(out + head + i * kWidth<T>, v);
    if (static_cast<int>(threadIdx.x) < count - tail) Words<T>::store(out + tail + threadIdx.x, value);
}

// Those of elements [at, at + kWidth) that lie before `count`.
template <class T>
__device__ inline void store_edge(T* out, int at, int count, const Pack& v) {
    using Bits = typename Words<T>::Bits;
    constexpr int kPerWord = Words<T>::kPerWord;
    if (at + kWidth<T> <= count) return store_pack(out + at, v);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
        const Bits bits = static_cast<Bits>(v.w[i / kPerWord] >> (i % kPerWord * 16));
        if (at + i < count) reinterpret_cast<Bits*>(out)[at + i] = bits;
    }
}

template <class T, bool kCap, Mode kMode, int kCount>
__device__ inline void tile_gradient(Pack (&v)[kCount], const Pack (&z)[kCount], const Coefficients& c,
                                     const Prepare& k) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        float x[kWidth<T>], y[kWidth<T>] = {};
        unpack<T>(v[u], x);
        if constexpr (kMode == kReference) unpack<T>(z[u], y);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) x[i] = gradient<kCap, kMode>(x[i], y[i], c, k);
        v[u] = pack<T>(x);
    }
}

// A row's coefficients, and whether all are 0: then it is written without being read.
struct Slope {
    Coefficients c;
    bool none;

    Slope() = default;
    __device__ Slope(const Coefficients& c) : c(c), none(no_gradient(c)) {}
};

// Writes the gradient of the first `count` elements of x, of which `label` (or none: -1) is the target. `Rows` is a
// Source, perhaps of the very memory that is written, or a Staged. No barrier: what a thread overwrites only it reads.
template <class T, bool kCap, Mode kMode, class Rows>
__device__ inline void write_gradient(Rows x, Rows z, T* out, int count, int label, const Slope& slope,
                                      const Prepare& k) {
    constexpr int kCount = kTile<kMode>, kSpan = 32 * kCount;
    constexpr bool kReads = kMode == kReference;
    if (slope.none) return fill(out, count, 0.0f);
    const Coefficients c = slope.c;
    const int thread = threadIdx.x, lane = thread % 32, head = first_aligned(out, count);
    const int label_vector = static_cast<int>(static_cast<unsigned>(label - head) / kWidth<T>);
    const int owner = label < head ? label : (label_vector / kSpan & (blockDim.x / 32 - 1)) * 32 + label_vector % 32;
    float at_label = 0;
    if (thread == owner) {  // with its delta added before the one rounding to T
        Coefficients with_delta = c;
        with_delta.kappa += c.delta;
        at_label = gradient<kCap, kMode>(x.at(label), kMode == kReference ? z.at(label) : 0.0f, with_delta, k);
    }
    if (thread < head) {
        const float zi = kMode == kReference ? z.at(thread) : 0.0f;
        Words<T>::store(out + thread, gradient<kCap, kMode>(x.at(thread), zi, c, k));
    }
    const int rest = count - head;
    x = x.part(head, rest);
    if constexpr (kReads) z = z.part(head, rest);
    T* body = out + head;
    const auto inner = [&](int first) {
        Pack v[kCount], y[kCount];
        x.load(v, first);
        if constexpr (kReads) z.load(y, first);
        tile_gradient<T, kCap, kMode>(v, y, c, k);
        T* to = body + (first + lane) * kWidth<T>;
#pragma unroll
        for (int u = 0; u < kCount; ++u) store_pack(to + 32 * u * kWidth<T>, v[u]);
    };
    const auto edge = [&](int first) {
#pragma unroll 1
        for (int u = 0; u < kCount; ++u) {
            Pack v[1], y[1];
            x.load_edge(v, first + 32 * u);
            if constexpr (kReads) z.load_edge(y, first + 32 * u);
            tile_gradient<T, kCap, kMode>(v, y, c, k);
            store_edge(body, (first + lane + 32 * u) * kWidth<T>, rest, v[0]);
        }
    };
    for_tiles<T, kSpan, kReads>(x, z, inner, edge);
    if (thread == owner) Words<T>::store(out + label, at_label);
}

}  // namespace fastalign::cuda
