// Chooses among the instruction sets that were built, and the few things that need none of them.
#include "token_stats_cpu.h"

#if defined(FA_HAVE_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace fastalign {

#ifdef FA_HAVE_X86
namespace avx512_bf16 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
#endif
#ifdef FA_HAVE_NEON
namespace neon {
extern const CpuKernels kernels;
}
#endif
namespace portable {
extern const CpuKernels kernels;
}

namespace {

#if defined(FA_HAVE_X86) && defined(_MSC_VER)
// cpuid leaf 7 ebx bits, and xgetbv's word that the system saves the registers.
bool has(int leaf7_ebx_bits, unsigned long long xcr0_bits) {
    int r[4];
    __cpuid(r, 1);
    if (!(r[2] & 1 << 27) || !(r[2] & 1 << 12) || !(r[2] & 1 << 29)) return false;
    if ((_xgetbv(0) & xcr0_bits) != xcr0_bits) return false;
    __cpuidex(r, 7, 0);
    return (r[1] & leaf7_ebx_bits) == leaf7_ebx_bits;
}
bool has_avx2() { return has(1 << 5, 6); }
bool has_avx512() { return has(1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | static_cast<int>(1u << 31), 0xe6); }
bool has_avx512_bf16() {
    int r[4];
    __cpuidex(r, 7, 1);
    return has_avx512() && r[0] & 1 << 5;
}
#elif defined(FA_HAVE_X86)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Each thread its own: who calls in one thread does not change what another one runs. OpenMP's threads never ask: they
// run code of the table that their caller took.
thread_local const CpuKernels* chosen = nullptr;

}  // namespace

const CpuKernels* const* all_cpu_kernels() {
    static const CpuKernels* list[5] = {};
    static const bool filled = [] {
        int n = 0;
#ifdef FA_HAVE_X86
        if (has_avx512_bf16()) list[n++] = &avx512_bf16::kernels;
        if (has_avx512()) list[n++] = &avx512::kernels;
        if (has_avx2()) list[n++] = &avx2::kernels;
#endif
#ifdef FA_HAVE_NEON
        list[n++] = &neon::kernels;
#endif
        list[n] = &portable::kernels;
        return true;
    }();
    (void)filled;
    return list;
}

const CpuKernels& cpu_kernels() { return chosen ? *chosen : **all_cpu_kernels(); }

void set_cpu_kernels(const CpuKernels* kernels) { chosen = kernels; }

int64_t count_labels(const TokenArgs& args) {
    int64_t valid = 0;
    for (int64_t i = 0; i < args.rows; ++i) {
        const int64_t label = args.label(i);
        if (label == args.ignore_index) continue;
        if (label < 0 || label >= args.vocab) return -1 - i;
        ++valid;
    }
    return valid;
}

}  // namespace fastalign
