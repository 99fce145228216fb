// The largest element of a row in CUDA, for diagnostics.
#pragma once
#include "token_rows_cuda.cuh"

namespace fastalign::cuda {

// The row's first element that is as large as any: in one of the tiles that its threads know, read once more. For the
// first thread of the block; `tops` and `places` are shared, one of each per warp.
template <class T, class Rows>
__device__ inline int first_largest(const Rows& x, const Largest& mine, float* tops, int* places) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const float of_warp = warp_max(mine.top);
    if (lane == 0) tops[warp] = of_warp;
    __syncthreads();  // every warp's largest is written before any thread reads them
    const float top = warp_max(lane < warps ? tops[lane] : -INFINITY);
    unsigned first = x.length;
    if (mine.top == top) {
        const int count = kTile<kDiagnostics> * kWidth<T>;
        for (int i = 0; i < count && first == x.length; ++i) {
            const int at = mine.at + i / kWidth<T> * 32 * kWidth<T> + i % kWidth<T>;
            if (at >= 0 && at < x.length && x.at(at) == top) first = at;
        }
    }
    first = __reduce_min_sync(kAllLanes, first);
    if (lane == 0) places[warp] = static_cast<int>(first);
    __syncthreads();  // as above
    return static_cast<int>(
        __reduce_min_sync(kAllLanes, static_cast<unsigned>(lane < warps ? places[lane] : x.length)));
}

}  // namespace fastalign::cuda
