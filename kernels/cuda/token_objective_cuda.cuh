// The one launch of rows that a warp does not hold, in CUDA: forward, objective and backward of a row in shared memory.
#pragma once
#include "token_gradient_cuda.cuh"

namespace fastalign::cuda {

// Clusters of blocks; from sm_90 on. A block by itself is a cluster of one.
struct Cluster {
    int rank, size;
    int64_t index, count;

    __device__ explicit Cluster(int log_size) : size(1 << log_size) {
        rank = blockIdx.x & (size - 1), index = blockIdx.x >> log_size, count = gridDim.x >> log_size;
    }

    // Between the two, what a block wrote to its shared memory before `arrive` becomes visible to the others.
    __device__ void arrive() const {
#if __CUDA_ARCH__ >= 900
        if (size > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    }
    __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
        if (size > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    }

    // The sums at the address of `own` in block `of`.
    template <Mode kMode>
    __device__ FloatSums read(const FloatSums& own, int of) const {
        FloatSums a = no_sums();
        a.shift = word(own.shift, of), a.s = word(own.s, of);
        if constexpr (kMode != kPlain) a.w = word(own.w, of), a.total = word(own.total, of);
        if constexpr (kMode == kReference)
            a.k = word(own.k, of), a.ref_shift = word(own.ref_shift, of), a.t = word(own.t, of);
        return a;
    }

    static __device__ float word(const float& own, int of) {
        float result = own;
#if __CUDA_ARCH__ >= 900
        unsigned remote;
        asm("mapa.shared::cluster.u32 %0, %1, %2;"
            : "=r"(remote)
            : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&own))), "r"(of));
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(result) : "r"(remote) : "memory");
#endif
        return result;
    }
};

// A row in one read, by the blocks of a cluster: each stages `span` elements in shared memory, adds them up, learns the
// others' sums, and writes the gradient of its own.
template <class T, bool kCap, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads, kCap&& kMode == kMoments ? 2 : 3)
    objective_kernel(const __grid_constant__ ObjectiveArgs a, const __grid_constant__ Prepare k, int log_blocks,
                     int span) {
    extern __shared__ __align__(16) char staged[];
    __shared__ SharedSums parts[kMaxThreads / 32], own;
    __shared__ float own_others;
    __shared__ Stats stats;   // the first thread's
    __shared__ float target;  // the prepared logit of a sure row's
    __shared__ Slope shared;
    const Cluster cluster(log_blocks);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int begin = cluster.rank * span;
    const int rest = static_cast<int>(a.vocab) - begin;
    int count = rest < 0 ? 0 : rest < span ? rest : span;
    asm("" : "+r"(count), "+r"(begin));  // or the compiler finds them anew at each use
    for (int64_t row = cluster.index; row < a.rows; row += cluster.count) {
        const int64_t label = a.label(row);
        const Row kind = row_kind(a, label);
        T* out = static_cast<T*>(a.out_gradient) + a.out_layout.offset(row) + begin;
        if (kind != Row::kValid) {
            if (threadIdx.x == 0 && cluster.rank == 0) write_row(a.out, nullptr, row, empty_stats(kind));
            fill<BlockTeam>(out, count, kind == Row::kBad ? NAN : 0.0f);
            continue;
        }
        const Source<T> source = row_of<T>(a.logits, a.layout, row, a.vocab), ref = reference_of<T, kMode>(a, row);
        const Staged<T> x = Staged<T>::template copy<BlockTeam>(staged, source.base + begin, count);
        Staged<T> z = x;
        if constexpr (kMode == kReference)
            z = Staged<T>::template copy<BlockTeam>(staged + staged_bytes(span, sizeof(T)), ref.base + begin, count);
        const float logit = threadIdx.x == 0 ? source.at(static_cast<int>(label)) : 0.0f;
        wait_for_copies();
        __syncthreads();  // every thread's copies and paddings are in shared memory before any thread reads them
        const FloatSums mine = thread_sums<BlockTeam, T, kCap, kMode, false>(x, z, k);
        FloatSums sums = block_sums<kMode>(mine, parts, k.scale);
        if (threadIdx.x == 0) keep_sums<kMode>(own, sums);
        // Every block's `own` is written before a block reads it; and, for a gradient that goes over the logits, the
        // target's logit has been read by all before any block writes.
        cluster.arrive();
        cluster.wait();
        bool sure = false;
        if (warp == 0) {
            if (cluster.size > 1)
                sums = warp_sums<kMode>(lane < cluster.size ? cluster.read<kMode>(own, lane) : no_sums(), k.scale);
            if (lane == 0) {
                const Stats o = row_stats<kCap, kMode>(a, sums, logit, k);
                stats = o, sure = is_sure(o);
                if (sure) target = capped<kCap>(logit, k);
            }
        }
        // The first warp has read `parts`. All blocks of the cluster find the same.
        if (__syncthreads_or(sure)) {
            const int hole = static_cast<int>(label) - begin;
            const float s = thread_others<BlockTeam, T, kCap, kMode>(mine, x, hole, target, k);
            float others = team_add<BlockTeam>(s, parts);
            if (threadIdx.x == 0) own_others = others;
            cluster.arrive();
            cluster.wait();  // every block's `own_others` is written before a block reads it
            if (warp == 0) {
                if (cluster.size > 1) others = warp_add(lane < cluster.size ? cluster.word(own_others, lane) : 0);
                if (lane == 0) make_sure(stats, target, others, a.inv_temperature);
            }
        }
        if (threadIdx.x == 0) {
            if (cluster.rank == 0) write_row(a.out, nullptr, row, stats, kMode);
            shared = slope_of<kMode>(row_coefficients(a, row, stats, kMode, k.exact()), k);
        }
        cluster.arrive();
        __syncthreads();  // `shared` is written before the block reads it
        const int at = static_cast<int>(label) - begin;
        write_gradient<BlockTeam, T, kCap, kMode>(x, z, out, count, 0 <= at && at < count ? at : -1, shared, k);
        // No block leaves, or writes the next row's `own`, while another may still read this one's.
        cluster.wait();
        __syncthreads();  // the block has read `staged`, `parts` and `shared` before the next row's are written
    }
}

}  // namespace fastalign::cuda
