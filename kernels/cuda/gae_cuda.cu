// Generalised advantage estimation in CUDA: a warp per row, 32 tokens at a time, from the end to the start.
//
// A step is affine in what the token after it hands on: A_t = delta_t + g A_next with g = gamma lam at a real token,
// and at a hidden one nothing changes. Such steps compose, so a warp scans 32 of them in five rounds of shuffles, and
// each token's next value is one shuffle from the nearest real token after it.
#include "gae_cuda.h"
#include "launch_cuda.h"

namespace fastalign::cuda {

constexpr unsigned kEveryLane = 0xffffffffu;
constexpr int kWarps = 4;

// Lane l has token `last - l`, so that lanes run in the order of the recursion.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) gae_kernel(const __grid_constant__ GaeArgs<T> a) {
    const int lane = threadIdx.x % 32;
    const int64_t n = a.length, step = static_cast<int64_t>(gridDim.x) * kWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < a.rows; row += step) {
        T value_after = 0, advantage_after = 0;  // of the nearest real token beyond these 32
        for (int64_t last = n - 1; last >= 0; last -= 32) {
            const int64_t t = last - lane;
            const bool real = t >= 0 && a.mask[row * n + t];
            // What a mask hides is not read: it may be NaN and goes nowhere.
            const T value = real ? a.values[row * n + t] : 0, reward = real ? a.rewards[row * n + t] : 0;
            const unsigned reals = __ballot_sync(kEveryLane, real), before = reals & ((1u << lane) - 1);
            const int source = before ? 31 - __clz(before) : 0;  // the real token after this one
            const T neighbour = __shfl_sync(kEveryLane, value, source);
            const T next = before ? neighbour : value_after;
            // A_t = add + multiply * (what comes in from before lane 0), after the scan.
            T add = real ? reward + a.gamma * next - value : 0, multiply = real ? a.gamma_lam : 1;
            for (int distance = 1; distance < 32; distance *= 2) {
                const T earlier_add = __shfl_up_sync(kEveryLane, add, distance);
                const T earlier_multiply = __shfl_up_sync(kEveryLane, multiply, distance);
                if (lane >= distance) add += multiply * earlier_add, multiply *= earlier_multiply;
            }
            const T advantage = add + multiply * advantage_after;
            if (t >= 0) {
                a.advantages[row * n + t] = real ? advantage : 0;
                a.returns[row * n + t] = real ? advantage + value : 0;
            }
            advantage_after = __shfl_sync(kEveryLane, advantage, 31);
            const T latest = __shfl_sync(kEveryLane, value, reals ? 31 - __clz(reals) : 0);
            value_after = reals ? latest : value_after;
        }
    }
}

template <class T>
void gae(const GaeArgs<T>& a, const Place& place) {
    constexpr const char* kName = "fastalign gae";
    if (a.rows == 0 || a.length == 0) return;
    const OnDevice guard(kName, place);
    launch(kName, gae_kernel<T>, {(a.rows + kWarps - 1) / kWarps, 32 * kWarps}, place, a);
}

template void gae(const GaeArgs<float>&, const Place&);
template void gae(const GaeArgs<double>&, const Place&);

}  // namespace fastalign::cuda
