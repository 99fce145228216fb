// What a call of the token kernels brings along, on any device: plain pointers and sizes, no torch.
#pragma once
#include <cstdint>

#include "loss_program.h"
#include "token_stats.h"

namespace fastalign {

enum class DType { kFloat32, kBFloat16, kHalf };

class FreshPages;  // of the CPU only

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
    float* saved;       // [rows, 4]: m, r of the policy and of the reference, see token_stats.h
    float* log_sum_sq;  // [rows], and so is the next; both, or null
    int64_t* argmax;

    FA_MEMBER void write_diagnostics(int64_t row, const Stats& o) const {
        log_sum_sq[row] = o.log_sum_sq, argmax[row] = o.argmax;
    }
};

struct BackwardArgs : TokenArgs {
    const float* saved;
    const float *entropy, *kl;
    PerRow<const float> grads;
    void* out_gradient;  // may be `logits`
    RowLayout out_layout;
    FreshPages* fresh;  // not null: the result is far larger than the caches, and perhaps untouched
};

struct ObjectiveArgs : TokenArgs {
    TokenProgram program;                           // of the loss of a row
    const float* weight;                            // what that counts for, one per row
    const float* inputs[TokenProgram::kMaxInputs];  // what the program is given, one per row
    PerRow<float> out;
    float* saved;  // as the forward's; null: not wanted
    void* out_gradient;
    RowLayout out_layout;
    FreshPages* fresh;
};

// What is not wanted of the gradients is 0.
FA_HD Grads wanted(Grads d, Mode mode) {
    if (mode != kReference) d.kl = 0;
    if (mode == kPlain) d.entropy = d.mean = 0;
    return d;
}

// What the forward keeps of a row for the backward; one access on devices.
struct alignas(16) Saved {
    float m, r, ref_m, ref_r;
};

FA_HD Saved& saved_row(float* saved, int64_t row) { return reinterpret_cast<Saved*>(saved)[row]; }
FA_HD const Saved& saved_row(const float* saved, int64_t row) { return reinterpret_cast<const Saved*>(saved)[row]; }

// `mode`: the least that has all outputs that are not null.
FA_HD void write_row(const PerRow<float>& out, float* saved, int64_t row, const Stats& o, Mode mode = kReference) {
    out.logps[row] = o.logps, out.lse[row] = o.lse;
    if (mode != kPlain && out.entropy) out.entropy[row] = o.entropy;
    if (mode == kReference && out.kl) out.kl[row] = o.kl;
    if (mode != kPlain && out.mean) out.mean[row] = o.mean;
    if (saved) saved_row(saved, row) = {o.m, o.r, o.ref_m, o.ref_r};
}

// What a sure row has otherwise than from its sums.
FA_HD void write_sure(const PerRow<float>& out, float* saved, int64_t row, const Stats& o) {
    out.logps[row] = o.logps, out.lse[row] = o.lse;
    if (saved) saved_row(saved, row).m = o.m, saved_row(saved, row).r = o.r;
}

FA_HD float at_row(const float* p, int64_t row) { return p ? p[row] : 0.0f; }

// The gradient of a valid row from what the forward saved and the gradients of its statistics, of which `mode` says
// what there may be: plain has a mean's all the same, as it costs nothing.
template <class Exact = AsGiven>
FA_HD Coefficients row_coefficients(const BackwardArgs& a, int64_t row, Mode mode = kReference, Exact exact = {}) {
    const bool moments = mode != kPlain, ref = mode == kReference;
    const Saved saved = saved_row(a.saved, row);
    const Stats o{
        0,           0,          moments ? at_row(a.entropy, row) : 0, ref ? at_row(a.kl, row) : 0, 0, saved.m, saved.r,
        saved.ref_m, saved.ref_r};
    const Grads d{at_row(a.grads.logps, row), at_row(a.grads.lse, row), moments ? at_row(a.grads.entropy, row) : 0,
                  ref ? at_row(a.grads.kl, row) : 0, at_row(a.grads.mean, row)};
    return coefficients(o, d, a.inv_temperature, static_cast<double>(a.vocab), exact);
}

// The gradients of a row's statistics under an objective. One thread finds them, in memory of its own, so on devices it
// is a function apart, or its registers would be every kernel's.
FA_HD FA_APART Grads objective_gradient(const ObjectiveArgs& a, int64_t row, Stats o) {
    const auto input = [&](int i) { return a.inputs[i][row]; };
    return token_slopes(a.program, o, input, a.weight[row]);
}

// The same under an objective, from the statistics just found.
template <class Exact = AsGiven>
FA_HD Coefficients row_coefficients(const ObjectiveArgs& a, int64_t row, const Stats& o, Mode mode = kReference,
                                    Exact exact = {}) {
    const Grads d = wanted(objective_gradient(a, row, o), mode);
    return coefficients(o, d, a.inv_temperature, static_cast<double>(a.vocab), exact);
}

// Tokens whose loss does not move (a clipped PPO ratio) are written without being read.
FA_HD bool no_gradient(const Coefficients& c) {
    return c.a == 0 && c.b == 0 && c.g == 0 && c.kappa == 0 && c.delta == 0;
}

}  // namespace fastalign
