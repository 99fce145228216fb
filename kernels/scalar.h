// The number in a scalar tensor of any of the kernels' dtypes.
#pragma once
#include "cpu/simd_types.h"
#include "token_args.h"

namespace fastalign {

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

}  // namespace fastalign
