// Interface of the CPU kernels: plain pointers and sizes, no torch. Built once for each instruction set.
#pragma once
#include <cstdint>

#include "../divergence_args.h"
#include "gemm_args.h"
#include "../token_args.h"

namespace fastalign {

struct CpuKernels {
    const char* isa;
    void (*forward)(const ForwardArgs&);
    void (*backward)(const BackwardArgs&);
    void (*objective)(const ObjectiveArgs&);
    void (*gemm)(const GemmArgs&);
    float (*read)(const void* data, int64_t bytes, int threads);
    void (*copy)(void* to, const void* from, int64_t bytes, int threads);
    void (*divergence)(const DivergenceArgs&);
};

const CpuKernels* const* all_cpu_kernels();  // best first, null-terminated; those that this processor can run

// The table that this thread uses: the best one, until `set_cpu_kernels` is called in the thread.
const CpuKernels& cpu_kernels();
void set_cpu_kernels(const CpuKernels* kernels);

// How many labels are not ignored; where one is neither that nor in [0, vocab), -1 less the flat position of the first.
int64_t count_labels(const TokenArgs& args);

}  // namespace fastalign
