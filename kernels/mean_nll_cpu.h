// Sums of log-probabilities, and the mean negative log-likelihood: what is left to do around the token kernels where a
// loss needs no more of a token. Sums are in double, in the order of the rows, whatever the threads.
#pragma once
#include <cmath>
#include <memory>
#include <vector>

#include "simd_types.h"
#include "token_stats_cpu.h"

namespace fastalign {

// The number in a scalar tensor.
struct Scalar {
    void* at;
    DType dtype;

    float get() const {
        if (dtype == DType::kFloat32) return *static_cast<const float*>(at);
        return dtype == DType::kHalf ? to_float(*static_cast<const Half*>(at)) : to_float(*static_cast<BFloat16*>(at));
    }

    void set(float x) const {
        if (dtype == DType::kFloat32) *static_cast<float*>(at) = x;
        else if (dtype == DType::kHalf) from_float(x, *static_cast<Half*>(at));
        else from_float(x, *static_cast<BFloat16*>(at));
    }
};

inline double sum_of(const float* x, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += x[i];
    return total;
}

// What a sum over tokens is divided by.
inline int64_t divisor(int64_t live, int64_t over, int64_t least) { return over ? over : live < least ? least : live; }

// Writes -sum of logps / over; over 0: over the live rows, `least` at least, and NaN where that is 0. The per-row
// results are nobody's, `saved` is filled.
inline void mean_nll(ForwardArgs a, int64_t live, int64_t over, int64_t least, Scalar loss) {
    const std::unique_ptr<float[]> scratch(new float[2 * a.rows + 1]);
    a.out = {scratch.get(), scratch.get() + a.rows, nullptr, nullptr, nullptr};
    cpu_kernels().forward(a);
    const double total = 0 - sum_of(scratch.get(), a.rows);  // 0, not -0, for none
    const int64_t count = divisor(live, over, least);
    // Rounded before it is divided, as tensors would be.
    loss.set(count ? static_cast<float>(total) / static_cast<float>(count) : NAN);
}

// Writes the sums of logps over `count` runs of equally many rows, into one array after the other.
struct Room {
    float* at;
    int64_t count;
};
inline void sum_logps(ForwardArgs a, const std::vector<Room>& sums, int64_t count) {
    const std::unique_ptr<float[]> scratch(new float[2 * a.rows + 1]);
    a.out = {scratch.get(), scratch.get() + a.rows, nullptr, nullptr, nullptr};
    cpu_kernels().forward(a);
    const int64_t length = count ? a.rows / count : 0;
    const float* from = scratch.get();
    for (const Room& part : sums)
        for (int64_t i = 0; i < part.count; ++i) {
            part.at[i] = static_cast<float>(sum_of(from, length));
            from += length;
        }
}

// The gradients of the log-probs under that mean: one number, written for each of the rows.
inline std::unique_ptr<float[]> mean_nll_slopes(int64_t rows, int64_t count, float gradient) {
    const float slope = count ? -(gradient / static_cast<float>(count)) : 0;
    std::unique_ptr<float[]> slopes(new float[rows + 1]);
    for (int64_t i = 0; i < rows; ++i) slopes[i] = slope;
    return slopes;
}

}  // namespace fastalign
