// The gradient of a row in CUDA: no thread needs another's number, so the stores' alignment decides who does what.
#pragma once
#include "token_rows_cuda.cuh"

namespace fastalign::cuda {

// A row's coefficients, what its exps are relative to, and whether all are 0: then it is written without being read.
struct Slope {
    Coefficients c;
    Exponent u, v;
    bool none;
};

template <Mode kMode>
__device__ inline Slope slope_of(const Coefficients& c, const Prepare& k) {
    const Exponent u = exponent(c.shift, k.scale);
    return {c, u, kMode == kReference ? exponent(c.ref_shift, k.scale) : u, no_gradient(c)};
}

// What the gradient of a row is taken from: the gradients of its statistics, or an objective on them, which is then all
// there but for what `BackwardArgs` names as well.
struct Slopes : BackwardArgs {
    bool under_objective;
    ObjectiveArgs objective;

    template <Mode kMode>
    __device__ Slope of(int64_t row, const Prepare& k) const {
        if (!under_objective) return slope_of<kMode>(row_coefficients(*this, row, kMode, k.exact()), k);
        const PerRow<float>& o = objective.out;
        const Saved m = saved_row(saved, row);
        const Stats stats{
            o.logps[row], o.lse[row], at_row(o.entropy, row), at_row(o.kl, row), at_row(o.mean, row), m.m, m.r,
            m.ref_m,      m.ref_r};
        return slope_of<kMode>(row_coefficients(objective, row, stats, kMode, k.exact()), k);
    }
};

// What is left of an element once the row's coefficients are known; see token_stats.h. A probability of 0 has no
// gradient: where it is one for -inf, the result is NaN without `kHoles`.
template <class T, bool kCap, Mode kMode, bool kHoles = true>
__device__ inline float gradient(float x, float z, const Slope& slope, float a, float kappa, const Prepare& k) {
    const Coefficients& c = slope.c;
    // Under a cap it is the coefficients' signs that are turned, and not every element's.
    constexpr float kSign = kCap ? -1.0f : 1.0f;
    // Of x, or of what is left of it when it is capped.
    const auto exponent_of = [&](const Exponent& u, float x) { return kCap ? fmaf(x, u.by * k.cap, -u.at) : u.of(x); };
    if constexpr (kCap) x = tanh_in_gradient<T>(x, k), z = kMode == kReference ? tanh_in_gradient<T>(z, k) : z;
    const float u = exponent_of(slope.u, x);
    float dx;
    if constexpr (kMode == kPlain) {
        dx = fmaf(power_of_two(u), kSign * a, kSign * kappa);
    } else {
        const float low = kHoles ? max_or_nan(u, -256.0f) : u, e = power_of_two(low);
        float by = fmaf(kSign * c.b, low, kSign * a);
        if constexpr (kMode == kReference) {
            by = fmaf(-kSign * c.g, exponent_of(slope.v, z), by);
            if constexpr (kHoles) by = e == 0 ? 0 : by;
        }
        dx = fmaf(e, by, kSign * kappa);
    }
    return kCap ? dx * fmaf(x, x, -1.0f) : dx;
}

// The same of the target.
template <class T, bool kCap, Mode kMode>
__device__ inline float target_gradient(float x, float z, const Slope& slope, const Prepare& k) {
    const Coefficients c = at_target(slope.c, capped<kCap>(x, k));
    return gradient<T, kCap, kMode>(x, z, slope, c.a, c.kappa, k);
}

// The first element from which 16-byte stores to [out, out + count) are aligned.
template <class T>
__device__ inline int first_aligned(const T* out, int count) {
    const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(out) & 15) / static_cast<int>(sizeof(T));
    return before < count ? before : count;
}

template <class Team, class T>
__device__ inline void fill(T* out, int count, float value) {
    float many[kWidth<T>];
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) many[i] = value;
    const Pack v = pack<T>(many);
    const int head = first_aligned(out, count), vectors = (count - head) / kWidth<T>;
    const int tail = head + vectors * kWidth<T>;
    if (Team::thread() < head) Words<T>::store(out + Team::thread(), value);
    for (int i = Team::thread(); i < vectors; i += Team::threads()) store_pack(out + head + i * kWidth<T>, v);
    if (Team::thread() < count - tail) Words<T>::store(out + tail + Team::thread(), value);
}

// The gradient of vectors v; returns a number that is NaN if any of it is.
template <class T, bool kCap, Mode kMode, bool kHoles, int kCount>
__device__ inline float vectors_gradient(Pack (&out)[kCount], const Pack (&v)[kCount], const Pack (&z)[kCount],
                                         const Slope& slope, const Prepare& k) {
    float check = 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        float x[kWidth<T>], y[kWidth<T>] = {};
        unpack<T>(v[u], x);
        if constexpr (kMode == kReference) unpack<T>(z[u], y);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i)
            x[i] = gradient<T, kCap, kMode, kHoles>(x[i], y[i], slope, slope.c.a, slope.c.kappa, k);
#pragma unroll
        for (int i = 0; i < kWidth<T>; i += 2) check = fmaf(x[i], x[i + 1], check);
        out[u] = pack<T>(x);
    }
    return check;
}

// Holes are rare within rows: a tile there is taken to have none, and once more if its gradient says otherwise.
template <class T, bool kCap, Mode kMode, bool kAtEdge, int kCount>
__device__ inline void tile_gradient(Pack (&v)[kCount], const Pack (&z)[kCount], const Slope& slope, const Prepare& k) {
    constexpr bool kMayHaveHoles = !kCap && kMode != kPlain;
    Pack out[kCount];
    const float check = vectors_gradient < T, kCap, kMode, kMayHaveHoles && kAtEdge > (out, v, z, slope, k);
    if constexpr (kMayHaveHoles && !kAtEdge)
        if (check != check) vectors_gradient<T, kCap, kMode, true>(out, v, z, slope, k);
#pragma unroll
    for (int u = 0; u < kCount; ++u) v[u] = out[u];
}

// Writes the gradient of the first `count` elements of x, of which `label` (or none: -1) is the target. `Rows` is a
// Source, perhaps of the very memory that is written, or a Staged. No barrier: what a thread overwrites only it reads.
template <class Team, class T, bool kCap, Mode kMode, class Rows>
__device__ inline void write_gradient(Rows x, Rows z, T* out, int count, int label, const Slope& slope,
                                      const Prepare& k) {
    constexpr int kCount = kTile<kMode>, kSpan = 32 * kCount;
    constexpr bool kReads = kMode == kReference;
    if (slope.none) return fill<Team>(out, count, 0.0f);
    if constexpr (kReads)
        if (slope.c.g == 0) z = x;  // any finite number where x is one: the reference may be -inf there
    const int warp = Team::thread() / 32, lane = Team::thread() % 32, head = first_aligned(out, count);
    const int vectors = static_cast<int>(static_cast<unsigned>(count - head) / kWidth<T>),
              tail = head + vectors * kWidth<T>;
    // Single elements: those before and after the whole vectors, by the first warp's lanes; and the target, rounded to
    // T once, by the last lane of the warp that has its vector.
    const bool in_vector = head <= label && label < tail;
    const int target_tile = static_cast<int>(static_cast<unsigned>(label - head) / (kWidth<T> * kSpan));
    const bool has_target = in_vector && warp == (target_tile & (Team::threads() / 32 - 1));
    float own = 0;
    if (warp == 0 || has_target) {
        int i = label;
        bool mine = has_target && lane == 31;
        if (warp == 0 && !mine && (head > 0 || tail < count)) {
            i = lane < kWidth<T> ? lane : tail + lane - kWidth<T>;
            mine = lane < kWidth<T> ? lane < head : lane < 2 * kWidth<T> && i < count;
        }
        if (mine) {
            const float logit = x.at(i);
            Coefficients c = slope.c;
            if (i == label) c = at_target(c, capped<kCap>(logit, k));
            own = gradient<T, kCap, kMode>(logit, kReads ? z.at(i) : 0.0f, slope, c.a, c.kappa, k);
            if (lane < 31) Words<T>::store(out + i, own);
        }
        __syncwarp();  // the target's logit has been read before its vector is written, perhaps over it
    }
    x = x.part(head, tail - head);
    if constexpr (kReads) z = z.part(head, tail - head);
    T* body = out + head;
    const auto inner = [&](int first) {
        Pack v[kCount], y[kCount];
        x.load(v, first);
        if constexpr (kReads) z.load(y, first);
        tile_gradient<T, kCap, kMode, false>(v, y, slope, k);
        T* to = body + (first + lane) * kWidth<T>;
#pragma unroll
        for (int u = 0; u < kCount; ++u) store_pack(to + 32 * u * kWidth<T>, v[u]);
    };
    const auto edge = [&](int first) {
        Pack v[kCount], y[kCount];
        x.load_edge(v, first);
        if constexpr (kReads) z.load_edge(y, first);
        tile_gradient<T, kCap, kMode, true>(v, y, slope, k);
        T* to = body + (first + lane) * kWidth<T>;
#pragma unroll
        for (int u = 0; u < kCount; ++u)
            if (first + lane + 32 * u < vectors) store_pack(to + 32 * u * kWidth<T>, v[u]);
    };
    for_tiles<Team, T, kSpan, kReads>(x, z, inner, edge);
    if (!has_target) return;
    __syncwarp();  // the target's vector is written before the target
    if (lane == 31) Words<T>::store(out + label, own);
}

}  // namespace fastalign::cuda
