// The kernels for short rows in CUDA: a warp has a row to itself, and a block several. What is done once for a row and
// by one thread, its statistics and coefficients, is then done for all of a block's rows at once, by neighbouring
// lanes. A row's numbers do not depend on its neighbours in the block.
#pragma once
#include "token_gradient_cuda.cuh"

namespace fastalign::cuda {

// A block's rows, from `first` on: one for each of its warps, as far as there are so many.
struct ShortRows {
    int64_t first;
    int warp, lane;

    __device__ ShortRows() : first(blockIdx.x * step()), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {}
    static __device__ int64_t step() { return blockDim.x / 32; }
    __device__ int64_t row() const { return first + warp; }  // this warp's
    __device__ void next() { first += gridDim.x * step(); }
    // Whether this thread has a row to do what one thread does; of `first + threadIdx.x`.
    __device__ bool has_one(int64_t rows) const { return threadIdx.x < step() && first + threadIdx.x < rows; }
};

template <class T, bool kCap, Mode kMode, bool kOneTile>
__global__ void __launch_bounds__(kMaxThreads, 4)
    short_forward_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Prepare k) {
    __shared__ SharedSums parts[kMaxThreads / 32];
    __shared__ bool sure[kMaxThreads / 32];
    for (ShortRows at; at.first < a.rows; at.next()) {
        FloatSums mine;
        if (at.row() < a.rows && row_kind(a, a.label(at.row())) == Row::kValid) {
            const Source<T> x = row_of<T>(a.logits, a.layout, at.row(), a.vocab);
            FloatSums sums;
            if constexpr (kOneTile) {
                Pack v[kTile<kMode>];
                x.load_edge(v, 0);
                mine = tile_sums<T, kCap, kMode>(v, x.length, k);
                sums = add_lanes<kMode>(mine);
            } else {
                mine = thread_sums<WarpTeam, T, kCap, kMode, false>(x, x, k);
                sums = warp_sums<kMode>(mine, k.scale);
            }
            if (at.lane == 0) keep_sums<kMode>(parts[at.warp], sums);
        }
        __syncthreads();  // every row's sums are written before the first warp reads them
        if (at.has_one(a.rows)) {
            const int64_t row = at.first + threadIdx.x, label = a.label(row);
            const Row kind = row_kind(a, label);
            Stats o = empty_stats(kind);
            if (kind == Row::kValid)
                o = stats_of<T, kCap, kMode>(a, row, label, kept_sums<kMode>(parts[threadIdx.x]), k);
            write_row(a.out, a.saved, row, o, kMode);
            sure[threadIdx.x] = kind == Row::kValid && is_sure(o);
        }
        // `sure` is written, and the first warp has read `parts` before the next rows' are written.
        __syncthreads();
        if (at.row() < a.rows && sure[at.warp]) {
            const Source<T> x = row_of<T>(a.logits, a.layout, at.row(), a.vocab);
            finish_sure<WarpTeam, T, kCap, kMode>(a, at.row(), mine, x, parts, k);
        }
    }
}

// What one thread finds for a row that it does not write itself.
struct ShortSlope {
    Slope slope;
    float target;  // the gradient of the label's logit
};

template <class T, bool kCap, Mode kMode>
__device__ inline ShortSlope short_slope(const Slope& slope, float logit, const Prepare& k) {
    return {slope, target_gradient<T, kCap, kMode>(logit, 0, slope, k)};
}

// The first `count` elements of a vector.
template <class T>
__device__ inline void store_some(T* to, const Pack& v, int count) {
    using Bits = typename Words<T>::Bits;
    constexpr int kPerWord = Words<T>::kPerWord;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i)
        if (i < count) reinterpret_cast<Bits*>(to)[i] = static_cast<Bits>(v.w[i / kPerWord] >> (i % kPerWord * 16));
}

// Writes the gradient of a row that is one tile of this warp, v. It is formed where the logits are and only then moved
// to where the stores are aligned.
template <class T, bool kCap, Mode kMode>
__device__ inline void write_tile(Pack (&v)[kTile<kMode>], T* out, int count, int label, const ShortSlope& found,
                                  const Prepare& k) {
    constexpr int kCount = kTile<kMode>;
    if (found.slope.none) return fill<WarpTeam>(out, count, 0.0f);
    const int lane = threadIdx.x % 32, head = first_aligned(out, count);
    const int vectors = static_cast<int>(static_cast<unsigned>(count - head) / kWidth<T>);
    tile_gradient<T, kCap, kMode, true>(v, v, found.slope, k);
    if (head > 0) {
        if (lane == 0) store_some(out, v[0], head);
        shift_down(v, head * static_cast<int>(sizeof(T)), v[0]);  // nothing is stored of what follows the last
    }
    T* to = out + head + lane * kWidth<T>;
#pragma unroll
    for (int u = 0; u < kCount; ++u)
        if (lane + 32 * u < vectors) store_pack(to + 32 * u * kWidth<T>, v[u]);
    const int tail = count - head - vectors * kWidth<T>;
    if (tail > 0) {
#pragma unroll
        for (int u = 0; u < kCount; ++u)
            if (lane + 32 * u == vectors) store_some(to + 32 * u * kWidth<T>, v[u], tail);
    }
    __syncwarp();  // the target's vector is written before the target
    if (lane == 0) Words<T>::store(out + label, found.target);
}

// Writes the gradient of this warp's row: of v where that is the whole row, else of x, wherever its logits lie.
template <bool kOneTile, class T, bool kCap, Mode kMode, class Args, class Rows>
__device__ inline void short_gradient(const Args& a, int64_t row, Pack (&v)[kTile<kMode>], const Rows& x, int64_t label,
                                      Row kind, const ShortSlope& found, const Prepare& k) {
    const int vocab = static_cast<int>(a.vocab);
    T* out = static_cast<T*>(a.out_gradient) + a.out_layout.offset(row);
    if (kind != Row::kValid) return fill<WarpTeam>(out, vocab, kind == Row::kBad ? NAN : 0.0f);
    const int target = static_cast<int>(label);
    if constexpr (kOneTile) write_tile<T, kCap, kMode>(v, out, vocab, target, found, k);
    else write_gradient<WarpTeam, T, kCap, kMode>(x, x, out, vocab, target, found.slope, k);
}

template <class T, bool kCap, Mode kMode, bool kOneTile>
__global__ void __launch_bounds__(kMaxThreads, 3)
    short_backward_kernel(const __grid_constant__ Slopes a, const __grid_constant__ Prepare k) {
    __shared__ ShortSlope slopes[kMaxThreads / 32];
    for (ShortRows at; at.first < a.rows; at.next()) {
        const int64_t label = at.row() < a.rows ? a.label(at.row()) : a.ignore_index;
        const Row kind = row_kind(a, label);
        const Source<T> x = row_of<T>(a.logits, a.layout, kind == Row::kValid ? at.row() : 0, a.vocab);
        Pack v[kTile<kMode>];
        if (kOneTile && kind == Row::kValid) x.load_edge(v, 0);
        if (at.has_one(a.rows)) {
            const int64_t row = at.first + threadIdx.x, target = a.label(row);
            if (row_kind(a, target) == Row::kValid) {
                const float logit = row_of<T>(a.logits, a.layout, row, a.vocab).at(static_cast<int>(target));
                slopes[threadIdx.x] = short_slope<T, kCap, kMode>(a.of<kMode>(row, k), logit, k);
            }
        }
        // Every row's slope is written before its warp reads it. The targets' logits are read before any gradient is
        // written, perhaps over them.
        __syncthreads();
        if (at.row() < a.rows)
            short_gradient<kOneTile, T, kCap, kMode>(a, at.row(), v, x, label, kind, slopes[at.warp], k);
        __syncthreads();  // each warp has read its slope before the next rows' are written
    }
}

// `span`: bytes of shared memory for a row; none where it stays in registers.
template <class T, bool kCap, Mode kMode, bool kOneTile>
__global__ void __launch_bounds__(kMaxThreads, 3)
    short_objective_kernel(const __grid_constant__ ObjectiveArgs a, const __grid_constant__ Prepare k, int span) {
    extern __shared__ __align__(16) char staged[];
    __shared__ SharedSums parts[kMaxThreads / 32];
    __shared__ ShortSlope slopes[kMaxThreads / 32];
    __shared__ float others[kMaxThreads / 32];
    __shared__ bool sure[kMaxThreads / 32];
    for (ShortRows at; at.first < a.rows; at.next()) {
        const int64_t label = at.row() < a.rows ? a.label(at.row()) : a.ignore_index;
        Staged<T> x(staged + at.warp * span, 0, 0);
        const Row kind = row_kind(a, label);
        Pack v[kTile<kMode>];
        FloatSums mine;
        if (kind == Row::kValid) {
            const Source<T> source = row_of<T>(a.logits, a.layout, at.row(), a.vocab);
            FloatSums sums;
            if constexpr (kOneTile) {
                source.load_edge(v, 0);
                mine = tile_sums<T, kCap, kMode>(v, source.length, k);
                sums = add_lanes<kMode>(mine);
            } else {
                x = Staged<T>::template copy<WarpTeam>(staged + at.warp * span, source.base, source.length);
                wait_for_copies();
                __syncwarp();  // every lane's copies and paddings are in shared memory before any lane reads them
                mine = thread_sums<WarpTeam, T, kCap, kMode, false>(x, x, k);
                sums = warp_sums<kMode>(mine, k.scale);
            }
            if (at.lane == 0) keep_sums<kMode>(parts[at.warp], sums);
        }
        // Every row's sums are written before the first warp reads them.
        __syncthreads();
        for (bool again = false;; again = true) {  // once more for sure rows
            bool open = false;
            if (at.has_one(a.rows) && (!again || sure[threadIdx.x])) {
                const int64_t row = at.first + threadIdx.x, target = a.label(row);
                const Row found = row_kind(a, target);
                Stats o = empty_stats(found);
                if (found == Row::kValid) {
                    const float logit = row_of<T>(a.logits, a.layout, row, a.vocab).at(static_cast<int>(target));
                    o = row_stats<kCap, kMode>(a, kept_sums<kMode>(parts[threadIdx.x]), logit, k);
                    if (again) make_sure(o, capped<kCap>(logit, k), others[threadIdx.x], a.inv_temperature);
                    else open = is_sure(o);
                    const Slope slope = slope_of<kMode>(row_coefficients(a, row, o, kMode, k.exact()), k);
                    slopes[threadIdx.x] = short_slope<T, kCap, kMode>(slope, logit, k);
                }
                write_row(a.out, nullptr, row, o, kMode);
                if (!again) sure[threadIdx.x] = open;
            }
            // Every row's slope is written before its warp reads it. The targets' logits are read before any gradient
            // is written, perhaps over them.
            if (!__syncthreads_or(open)) break;
            if (at.row() < a.rows && sure[at.warp]) {
                const Source<T> source = row_of<T>(a.logits, a.layout, at.row(), a.vocab);
                const int hole = static_cast<int>(label);
                const float logit = capped<kCap>(source.at(hole), k);
                others[at.warp] = warp_add(thread_others<WarpTeam, T, kCap, kMode>(mine, source, hole, logit, k));
            }
            __syncthreads();  // the others' sums are written before the first warp reads them
        }
        if (at.row() < a.rows)
            short_gradient<kOneTile, T, kCap, kMode>(a, at.row(), v, x, label, kind, slopes[at.warp], k);
        __syncthreads();  // all have read `parts` and `slopes` before the next rows' are written
    }
}

}  // namespace fastalign::cuda
