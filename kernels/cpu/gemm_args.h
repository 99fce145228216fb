// What a matrix product is called with: plain pointers and sizes, no torch.
#pragma once
#include <cstdint>

#include "../token_args.h"

namespace fastalign {

// A factor, in any of the kernels' dtypes; strides in elements, one of them 1 if it is to be quick.
struct GemmFactor {
    const void* at;
    DType dtype;
    int64_t row, column;
};

// out [m, n] (+)= a [m, k] @ b [k, n], summed in float32 whatever the factors are.
struct GemmArgs {
    GemmFactor a, b;
    float* out;
    int64_t out_row;  // stride; columns are dense
    int64_t m, n, k;
    bool add;  // to what is there; else it is overwritten
    int threads;
};

}  // namespace fastalign
