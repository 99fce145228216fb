// What a call of the token kernels brings along, on any device: plain pointers and sizes, no torch.
#pragma once
#include <cstdint>

#include "objectives.h"
#include "token_stats.h"

namespace fastalign {

enum class DType { kFloat32, kBFloat16, kHalf };

// What the caller wants of a row decides the inner loop: plain (logps, lse), moments (entropy, mean), or a reference.
enum Mode { kPlain, kMoments, kReference };

// Where each row of a [..., V] tensor with dense rows starts, in elements. By value: it goes to devices as it is.
struct RowLayout {
    static constexpr int kMaxDims = 8;
    int ndim;
    int64_t sizes[kMaxDims], strides[kMaxDims];

    FA_MEMBER int64_t offset(int64_t row) const {
        if (ndim == 1) return row * strides[0];
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
    double temperature, inv_temperature, softcap;  // softcap 0: none
    int threads;

    FA_MEMBER int64_t label(int64_t row) const {
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
    float* saved;  // as the forward's; null: not wanted
    void* out_gradient;
    RowLayout out_layout;
    bool stream;
};

// What is not wanted of the statistics is 0.
FA_HD Stats wanted(Stats o, Mode mode) {
    if (mode != kReference) o.kl = o.ref_m = o.ref_r = 0;
    if (mode == kPlain) o.entropy = o.mean = 0;
    return o;
}

FA_HD void write_row(const PerRow<float>& out, float* saved, int64_t row, const Stats& o) {
    out.logps[row] = o.logps, out.lse[row] = o.lse;
    if (out.entropy) out.entropy[row] = o.entropy;
    if (out.kl) out.kl[row] = o.kl;
    if (out.mean) out.mean[row] = o.mean;
    if (!saved) return;
    saved += 4 * row;
    saved[0] = o.m, saved[1] = o.r, saved[2] = o.ref_m, saved[3] = o.ref_r;
}

FA_HD float at_row(const float* p, int64_t row) { return p ? p[row] : 0.0f; }

// The gradient of a live row from what the forward saved and the gradients of its statistics.
FA_HD Coefficients row_coefficients(const BackwardArgs& a, int64_t row) {
    const float* saved = a.saved + 4 * row;
    const Stats o{0, 0, at_row(a.entropy, row), at_row(a.kl, row), 0, saved[0], saved[1], saved[2], saved[3]};
    const Grads d{at_row(a.grads.logps, row), at_row(a.grads.lse, row), at_row(a.grads.entropy, row),
                  at_row(a.grads.kl, row), at_row(a.grads.mean, row)};
    return coefficients(o, d, a.temperature, a.inv_temperature, static_cast<double>(a.vocab));
}

// The same under an objective, from the statistics just found.
FA_HD Coefficients row_coefficients(const ObjectiveArgs& a, int64_t row, const Stats& o) {
    const TokenInputs t{a.weight[row], at_row(a.old_logps, row), at_row(a.advantages, row), at_row(a.ref_logps, row)};
    const Grads d = objective_gradient(a.options, o, t);
    return coefficients(o, d, a.temperature, a.inv_temperature, static_cast<double>(a.vocab));
}

// Tokens whose loss does not move (a clipped PPO ratio) are written without being read.
FA_HD bool no_gradient(const Coefficients& c) {
    return c.a == 0 && c.b == 0 && c.g == 0 && c.kappa == 0 && c.delta == 0;
}

}  // namespace fastalign
