// Interface of the CUDA kernels. Rows, labels and results lie on `device`; the work is queued on `stream`, and nothing
// waits for it. Throws std::runtime_error with the kernel's name when a launch fails.
#pragma once
#include "../token_args.h"

namespace fastalign::cuda {

struct Place {
    int device;
    void* stream;  // a cudaStream_t
};

constexpr int64_t kMaxVocab = int64_t{1} << 30;  // positions within a row are 32-bit

// Rows up to kShort bytes get a warp each, in the variants that have kernels for it; up to kOneTile bytes, what a warp
// loads at once, they stay in its registers.
constexpr int64_t kShort = 8192, kOneTile = 2048;

void forward(const ForwardArgs& args, const Place& place);
void backward(const BackwardArgs& args, const Place& place);
void objective(const ObjectiveArgs& args, const Place& place);

// Multiplies `count` elements by *factor; where that is 1, nothing is read or written.
void scale(DType dtype, void* data, int64_t count, const float* factor, const Place& place);

}  // namespace fastalign::cuda
