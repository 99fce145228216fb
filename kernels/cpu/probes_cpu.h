// The machine's read and copy rates: loops that do nothing else, to measure kernels against. Included per instruction
// set.
#pragma once
#include <vector>

#include "parallel.h"
#include "token_rows_cpu.h"

namespace fastalign::FA_ISA {
namespace {

// Reads everything and does next to nothing with it: the rate that no kernel can beat.
float read(const void* data, int64_t bytes, int threads) {
    constexpr int64_t kBlock = 1 << 18;
    const int64_t blocks = bytes / kBlock;
    std::vector<float> sums(blocks);
    parallel_for(blocks, 1, threads, [&](int64_t i) {
        const float* p = reinterpret_cast<const float*>(static_cast<const char*>(data) + i * kBlock);
        Vec acc[8] = {set1(0), set1(0), set1(0), set1(0), set1(0), set1(0), set1(0), set1(0)};
        for (int64_t j = 0; j < kBlock / 4; j += 4 * kUnit) {
            for (int h = 0; h < 4; ++h) {
                Vec a, b;
                prefetch(p + j + h * kUnit + 512);
                prefetch(p + j + h * kUnit + 512 + 16);
                load2(p + j + h * kUnit, a, b);
                acc[2 * h] = acc[2 * h] + a, acc[2 * h + 1] = acc[2 * h + 1] + b;
            }
        }
        Vec total = acc[0];
        for (int h = 1; h < 8; ++h) total = total + acc[h];
        sums[i] = reduce_add(total);
    });
    float total = 0;
    for (float s : sums) total += s;
    return total;
}

void copy(void* to, const void* from, int64_t bytes, int threads) {
    constexpr int64_t kBlock = 1 << 18;
    parallel_for((bytes + kBlock - 1) / kBlock, 1, threads, [&](int64_t i) {
        const int64_t n = std::min(kBlock, bytes - i * kBlock);
        const char* src = static_cast<const char*>(from) + i * kBlock;
        char* dst = static_cast<char*>(to) + i * kBlock;
        int64_t j = 0;
        if (reinterpret_cast<uintptr_t>(dst) % kStreamAlign == 0) {
            for (; j + kUnit * 4 <= n; j += kUnit * 4) {
                Vec a, b;
                load2(reinterpret_cast<const float*>(src + j), a, b);
                store2<true>(reinterpret_cast<float*>(dst + j), a, b);
            }
        }
        std::memcpy(dst + j, src + j, n - j);
        stream_fence();
    });
}

}  // namespace
}  // namespace fastalign::FA_ISA
