// Token statistics on the CPU: forward, backward, and both in one launch with an objective between them. Compiled once
// per instruction set, with FA_ISA and its simd header chosen by the build.
#include "token_stats_cpu.h"

#include <vector>

#include "fresh_pages.h"
#include "parallel.h"
#include FA_SIMD_HEADER
#include "gemm_cpu.h"
#include "probes_cpu.h"
#include "token_rows_cpu.h"
#include "token_gradient_cpu.h"
#include "divergence_cpu.h"
#include "token_exps_cpu.h"

// Where the build names another instruction set that differs from this one in what it writes of bfloat16 alone, and in
// products of it, the rest is that one's: nothing is compiled twice.
#ifdef FA_BASE_ISA
namespace fastalign::FA_BASE_ISA {
extern const CpuKernels kernels;
}
#endif

namespace fastalign::FA_ISA {
namespace {

// Rows are handed out whole, or, where there are fewer of them than threads could use, chunk by chunk.
struct Plan {
    int64_t chunks;
    bool shared;
    explicit Plan(const TokenArgs& a)
        : chunks((a.vocab + kChunk - 1) / kChunk), shared(a.rows < 2 * a.threads && chunks > 1) {}
    int64_t grain(const TokenArgs& a) const { return std::max<int64_t>(1, 2 * kChunk / a.vocab); }
};

// The statistics of a valid row, by one thread.
template <class T, bool kCap, Mode kMode>
Stats row_stats(const TokenArgs& a, int64_t row, int64_t chunks, const Prepare& k) {
    const Row<T, kCap, kMode> r(a, row, k);
    Parted sums = r.chunk(0, k);
    for (int64_t p = 1; p < chunks; ++p) sums.add(r.chunk(p, k), kLog2e / a.temperature);
    return r.finish(a, sums, k);
}

// The same for few long rows, which threads share; `done(row, stats)` is called in order, ignored rows with zeros.
template <class T, bool kCap, Mode kMode, class Done>
void shared_stats(const TokenArgs& a, int64_t chunks, const Prepare& k, const Done& done) {
    std::vector<Parted> parts(a.rows * chunks);
    parallel_for(a.rows * chunks, 1, a.threads, [&](int64_t i) {
        if (a.label(i / chunks) == a.ignore_index) return;
        parts[i] = Row<T, kCap, kMode>(a, i / chunks, k).chunk(i % chunks, k);
    });
    for (int64_t row = 0; row < a.rows; ++row) {
        if (a.label(row) == a.ignore_index) {
            done(row, Stats{});
            continue;
        }
        Parted sums = parts[row * chunks];
        for (int64_t p = 1; p < chunks; ++p) sums.add(parts[row * chunks + p], kLog2e / a.temperature);
        done(row, Row<T, kCap, kMode>(a, row, k).finish(a, sums, k));
    }
}

template <class T, bool kCap, Mode kMode>
struct Forward {
    static void run(const ForwardArgs& a) {
        const Prepare k(a);
        const Plan plan(a);
        const auto write = [&](int64_t row, const Stats& o) {
            write_row(a.out, a.saved, row, o);
            if constexpr (kMode == kDiagnostics) a.write_diagnostics(row, o);
        };
        if (plan.shared) return shared_stats<T, kCap, kMode>(a, plan.chunks, k, write);
        parallel_for(a.rows, plan.grain(a), a.threads, [&](int64_t row) {
            const bool valid = a.label(row) != a.ignore_index;
            write(row, valid ? row_stats<T, kCap, kMode>(a, row, plan.chunks, k) : Stats{});
        });
    }
};

Coefficients valid_coefficients(const BackwardArgs& a, int64_t row) {
    return a.label(row) == a.ignore_index ? Coefficients{} : row_coefficients(a, row);
}

// Elements [begin, end) of a row's gradient.
template <class T, bool kCap, Mode kMode, class Args>
void row_gradient(const Args& a, int64_t row, int64_t begin, int64_t end, const Coefficients& c, const Prepare& k) {
    const T* x = static_cast<const T*>(a.logits) + a.layout.offset(row);
    const T* z = kMode == kReference ? static_cast<const T*>(a.ref_logits) + a.ref_layout.offset(row) : nullptr;
    T* out = static_cast<T*>(a.out_gradient) + a.out_layout.offset(row);
    const int64_t bytes = (end - begin) * sizeof(T);
    const bool stream = a.fresh && a.fresh->before(out + begin, bytes) && bytes >= kStreamed;
    write_gradient<T, kCap, kMode>(x, z, out, begin, end, a.label(row), c, k, stream);
}

template <class T, bool kCap, Mode kMode>
struct Backward {
    static void run(const BackwardArgs& a) {
        const Prepare k(a);
        const Plan plan(a);
        const int64_t per_row = plan.shared ? plan.chunks : 1, span = plan.shared ? kChunk : a.vocab;
        parallel_for(a.rows * per_row, plan.shared ? 1 : plan.grain(a), a.threads, [&](int64_t i) {
            const int64_t row = i / per_row, begin = i % per_row * span;
            row_gradient<T, kCap, kMode>(a, row, begin, std::min(a.vocab, begin + span), valid_coefficients(a, row), k);
        });
    }
};

// Forward, the objective's slope and backward while the row is in cache: one read and one write of main memory.
template <class T, bool kCap, Mode kMode>
struct Objective {
    static void run(const ObjectiveArgs& a) {
        const Prepare k(a);
        const Plan plan(a);
        const auto coefficients_of = [&](int64_t row, const Stats& o) {
            write_row(a.out, nullptr, row, o);
            return a.label(row) == a.ignore_index ? Coefficients{} : row_coefficients(a, row, o);
        };
        if (plan.shared) {
            std::vector<Coefficients> c(a.rows);
            shared_stats<T, kCap, kMode>(a, plan.chunks, k,
                                         [&](int64_t row, const Stats& o) { c[row] = coefficients_of(row, o); });
            parallel_for(a.rows * plan.chunks, 1, a.threads, [&](int64_t i) {
                const int64_t row = i / plan.chunks, begin = i % plan.chunks * kChunk;
                row_gradient<T, kCap, kMode>(a, row, begin, std::min(a.vocab, begin + kChunk), c[row], k);
            });
            return;
        }
        if constexpr (kMode == kPlain && !kCap) {
            // In float32 the exps pay where they need no memory of their own; beside a row they outgrow the cache.
            using CoefficientsOf = decltype(coefficients_of);
            using Worker =
                std::conditional_t<sizeof(T) == 2, ExpsApart<T, CoefficientsOf>, ExpsInPlace<CoefficientsOf>>;
            if (sizeof(T) == 2 || a.out_gradient == a.logits) {
                return parallel_workers(a.rows, plan.grain(a), a.threads,
                                        [&] { return Worker(a, coefficients_of, k); });
            }
        }
        parallel_for(a.rows, plan.grain(a), a.threads, [&](int64_t row) {
            const bool valid = a.label(row) != a.ignore_index;
            const Stats o = valid ? row_stats<T, kCap, kMode>(a, row, plan.chunks, k) : Stats{};
            row_gradient<T, kCap, kMode>(a, row, 0, a.vocab, coefficients_of(row, o), k);
        });
    }
};

// ------------------------------------------------------------------------------------------------- dispatch
template <template <class, bool, Mode> class Kernel, class T, class Args>
void with_mode(const Args& a, Mode mode) {
    const bool cap = a.softcap != 0;
    if (mode == kPlain) return cap ? Kernel<T, true, kPlain>::run(a) : Kernel<T, false, kPlain>::run(a);
    if (mode == kMoments) return cap ? Kernel<T, true, kMoments>::run(a) : Kernel<T, false, kMoments>::run(a);
    return cap ? Kernel<T, true, kReference>::run(a) : Kernel<T, false, kReference>::run(a);
}

template <template <class, bool, Mode> class Kernel, class Args>
void with_dtype(const Args& a, Mode mode) {
    if (a.dtype == DType::kBFloat16) return with_mode<Kernel, BFloat16>(a, mode);
#ifndef FA_BASE_ISA
    if (a.dtype == DType::kFloat32) return with_mode<Kernel, float>(a, mode);
    with_mode<Kernel, Half>(a, mode);
#endif
}

#ifndef FA_BASE_ISA
template <class T, bool kCap, Mode>
struct Diagnose : Forward<T, kCap, kDiagnostics> {};
#endif

void forward(const ForwardArgs& a) {
#ifdef FA_BASE_ISA
    FA_BASE_ISA::kernels.forward(a);
#else
    if (a.log_sum_sq) with_dtype<Diagnose>(a, kPlain);
    if (a.log_sum_sq && !a.ref_logits) return;  // a KL has a loop of its own
    with_dtype<Forward>(a, a.ref_logits ? kReference : a.out.entropy || a.out.mean ? kMoments : kPlain);
#endif
}

void objective(const ObjectiveArgs& a) {
#ifdef FA_BASE_ISA
    if (a.dtype != DType::kBFloat16) return FA_BASE_ISA::kernels.objective(a);
#endif
    const bool moments = a.out.entropy || a.out.mean;
    with_dtype<Objective>(a, a.ref_logits ? kReference : moments ? kMoments : kPlain);
}

void backward(const BackwardArgs& a) {
#ifdef FA_BASE_ISA
    if (a.dtype != DType::kBFloat16) return FA_BASE_ISA::kernels.backward(a);
#endif
    with_dtype<Backward>(a, a.ref_logits && a.grads.kl ? kReference : a.grads.entropy ? kMoments : kPlain);
}

void divergences(const DivergenceArgs& a) {
#ifdef FA_BASE_ISA
    if (a.dtype != DType::kBFloat16) return FA_BASE_ISA::kernels.divergence(a);
#endif
    divergence(a);
}

void product(const GemmArgs& g) {
#ifdef FA_BASE_ISA
    if (g.a.dtype != DType::kBFloat16 || g.b.dtype != DType::kBFloat16) return FA_BASE_ISA::kernels.gemm(g);
#endif
    gemm(g);
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels{FA_ISA_NAME, forward, backward, objective, product, read, copy, divergences};

}  // namespace fastalign::FA_ISA
