// Interface of the CPU kernels: plain pointers and sizes, no torch. Built once for each instruction set.
#pragma once
#include <cstdint>

#include "objectives.h"
#include "token_stats.h"

namespace fastalign {

enum class DType { kFloat32, kBFloat16, kHalf };

// Where each row of a [..., V] tensor with dense rows starts, in elements.
struct RowLayout {
    int ndim;
    const int64_t* sizes;
    const int64_t* strides;

    int64_t offset(int64_t row) const {
        int64_t at = 0;
        for (int d = ndim - 1; d >= 0; --d) {
            at += row % sizes[d] * strides[d];
            row /= sizes[d];
        }
        return at;
    }
};

// One statistic's output or gradient, one float per row; null where it is not wanted.
template <class F>
struct PerRow {
    F *logps, *lse, *entropy, *kl, *mean;
};

struct TokenArgs {
    DType dtype;
    const void* logits;
    const void* ref_logits;  // null: none
    RowLayout layout, ref_layout;
    const void* labels;  // dense, int64 or int32
    bool labels64;
    int64_t rows, vocab, ignore_index;
    double temperature, softcap;  // softcap 0: none
    int threads;

    int64_t label(int64_t row) const {
        return labels64 ? static_cast<const int64_t*>(labels)[row] : static_cast<const int32_t*>(labels)[row];
    }
};

struct ForwardArgs : TokenArgs {
    PerRow<float> out;
    float* saved;  // [rows, 4]: m, r of the policy and of the reference
};

struct BackwardArgs : TokenArgs {
    const float* saved;
    const float *entropy, *kl;
    PerRow<const float> grads;
    void* out_gradient;  // may be `logits`
    RowLayout out_layout;
    bool stream;  // the result is far larger than the caches: write past them
};

struct ObjectiveArgs : TokenArgs {
    ObjectiveOptions options;
    const float *weight, *old_logps, *advantages, *ref_logps;  // one per row; weight is needed, others may be null
    PerRow<float> out;
    void* out_gradient;
    RowLayout out_layout;
    bool stream;
};

struct CpuKernels {
    const char* isa;
    void (*forward)(const ForwardArgs&);
    void (*backward)(const BackwardArgs&);
    void (*objective)(const ObjectiveArgs&);
    float (*read)(const void* data, int64_t bytes, int threads);
    void (*copy)(void* to, const void* from, int64_t bytes, int threads);
};

// The best table that this processor can run, or the one chosen by `set_isa`; null: unknown or not available.
const CpuKernels& cpu_kernels();
const CpuKernels* find_cpu_kernels(const char* isa);
const CpuKernels* const* all_cpu_kernels();  // best first, null-terminated; those that this processor can run
void set_cpu_kernels(const CpuKernels* kernels);

// Flat position of the first label that is neither in [0, vocab) nor ignored, or -1.
int64_t find_bad_label(const TokenArgs& args);

// Asks for huge pages under a large buffer that nothing has touched yet: filling 4 KiB pages costs more than the
// kernel.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace fastalign
