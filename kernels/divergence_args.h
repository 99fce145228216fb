// What a call on the logits of two models brings along: plain pointers and sizes, no torch. See divergence_eager.py.
#pragma once
#include <cstdint>

#include "token_args.h"

namespace fastalign {

// One model's logits [rows, vocab]: x = scale[row] * (softcap tanh(logit / softcap)).
struct DivergenceSide {
    const void* logits;
    int64_t row;         // stride, in elements
    const float* scale;  // one per row
    float softcap;       // 0: none
};

// D = forward KL(q || m) + reverse KL(p || m), m = share q + (1 - share) p: q the teacher's, p the student's.
struct DivergenceArgs {
    DType dtype;
    DivergenceSide student, teacher;
    const int64_t* labels;  // -1: the row is not read
    int64_t rows, vocab;
    float forward, reverse, share, difference;  // a, b, w, c
    float *divergence, *logps;                  // results, one per row
    const float *g_divergence, *g_logps;        // their gradients; null: 0
    void* out;                                  // the student's gradient; null: not wanted; may be its logits
    int64_t out_row;
    int threads;
};

}  // namespace fastalign
