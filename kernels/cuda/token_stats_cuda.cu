// Token statistics in CUDA: forward, backward, and both in one launch with an objective between them.
//
// One template per kernel, for every element type, with or without soft-capping, in three modes (see token_args.h).
// Forward and backward give a row to a block and read it once; short rows go to warps, see token_short_cuda.cuh. The
// one-launch objective keeps the row in shared memory between its forward and its backward, spread over a cluster of
// blocks that exchange their sums through distributed shared memory; where a row does not fit, a forward and a backward
// do its work in two reads.
#include <type_traits>

#include "launch_cuda.h"
#include "token_largest_cuda.cuh"
#include "token_objective_cuda.cuh"
#include "token_short_cuda.cuh"

namespace fastalign::cuda {

// ------------------------------------------------------------------------------------------------- forward
template <class T, bool kCap, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads, kMode == kReference || kMode == kDiagnostics ? 3 : 4)
    forward_kernel(const __grid_constant__ ForwardArgs a, const __grid_constant__ Prepare k) {
    __shared__ SharedSums parts[kMaxThreads / 32];
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const int64_t label = a.label(row);
        const Row kind = row_kind(a, label);
        if (kind != Row::kValid) {
            if (threadIdx.x == 0) {
                write_row(a.out, a.saved, row, empty_stats(kind));
                if constexpr (kMode == kDiagnostics) a.write_diagnostics(row, empty_stats(kind));
            }
            continue;
        }
        const Source<T> x = row_of<T>(a.logits, a.layout, row, a.vocab), z = reference_of<T, kMode>(a, row);
        const float logit = threadIdx.x == 0 ? x.at(static_cast<int>(label)) : 0.0f;
        const auto mine = thread_sums<BlockTeam, T, kCap, kMode, true>(x, z, k);
        const FloatSums sums = block_sums<kMode>(mine, parts, k.scale);
        bool sure = false;
        int best = -1;
        if constexpr (kMode == kDiagnostics) {
            __shared__ float tops[kMaxThreads / 32];
            __shared__ int places[kMaxThreads / 32];
            best = first_largest<T>(x, mine.largest, tops, places);
        }
        if (threadIdx.x == 0) {
            Stats o = row_stats<kCap, kMode>(a, sums, logit, k);
            if constexpr (kMode == kDiagnostics) {
                if (isfinite(o.lse)) o.argmax = best;
                a.write_diagnostics(row, o);
            }
            write_row(a.out, a.saved, row, o, kMode);
            sure = is_sure(o);
        }
        // The first warp has read `parts` before the next row's are written.
        if (!__syncthreads_or(sure)) continue;
        finish_sure<BlockTeam, T, kCap, kMode>(a, row, mine, x, parts, k);
        __syncthreads();  // as above
    }
}

// ------------------------------------------------------------------------------------------------- backward
// A row is shared by `splits` blocks, each of which writes `span` elements.
template <class T, bool kCap, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads, kMode != kPlain ? 2 : 3)
    backward_kernel(const __grid_constant__ Slopes a, const __grid_constant__ Prepare k, int splits, int span) {
    __shared__ Slope shared;
    const int64_t items = a.rows * splits;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int64_t row = splits == 1 ? item : item / splits, label = a.label(row);
        const int begin = splits == 1 ? 0 : static_cast<int>(item % splits) * span;
        const int rest = static_cast<int>(a.vocab) - begin, count = rest < span ? rest : span;
        T* out = static_cast<T*>(a.out_gradient) + a.out_layout.offset(row) + begin;
        const Row kind = row_kind(a, label);
        if (kind != Row::kValid) {
            fill<BlockTeam>(out, count, kind == Row::kBad ? NAN : 0.0f);
            continue;
        }
        if (threadIdx.x == 0) shared = a.of<kMode>(row, k);
        __syncthreads();  // `shared` is written before the block reads it
        const Source<T> x = row_of<T>(a.logits, a.layout, row, a.vocab).part(begin, count);
        Source<T> z = reference_of<T, kMode>(a, row);
        if constexpr (kMode == kReference) z = z.part(begin, count);
        const int at = static_cast<int>(label) - begin;
        write_gradient<BlockTeam, T, kCap, kMode>(x, z, out, count, 0 <= at && at < count ? at : -1, shared, k);
        __syncthreads();  // the block has read `shared` before the next row's is written
    }
}

// ------------------------------------------------------------------------------------------------- scale
template <class T>
__global__ void __launch_bounds__(kMaxThreads) scale_kernel(T* data, int64_t count, const float* factor) {
    const float by = *factor;
    if (by == 1) return;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int head = first_aligned(data, static_cast<int>(count < 16 ? count : 16));
    const int64_t vectors = (count - head) / kWidth<T>, tail = head + vectors * kWidth<T>;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const auto one = [&](int64_t i) { Words<T>::store(data + i, Words<T>::load(data + i) * by); };
    if (thread < head) one(thread);
    if (thread < count - tail) one(tail + thread);
    for (int64_t i = thread; i < vectors; i += step) {
        T* p = data + head + i * kWidth<T>;
        float x[kWidth<T>];
        unpack<T>(load_pack(p), x);
#pragma unroll
        for (int e = 0; e < kWidth<T>; ++e) x[e] *= by;
        store_pack(p, pack<T>(x));
    }
}

// ------------------------------------------------------------------------------------------------- host
namespace {

Prepare prepare(const TokenArgs& a, const float* mean = nullptr) {
    const float scale = static_cast<float>(kLog2e / a.temperature);
    Prepare k{};
    k.mean = mean != nullptr;
    k.scale = scale, k.inv_scale = static_cast<float>(a.temperature / kLog2e), k.exact_inv_scale = 1.0 / scale;
    if (a.softcap == 0) return k;
    const double most = a.softcap * scale;
    k.cap = static_cast<float>(a.softcap), k.inv_cap = static_cast<float>(1 / a.softcap);
    k.per_cap = static_cast<float>(2 * kLog2e / a.softcap);
    k.exponent = tanh_series(a.softcap, most);
    // Where the series' last coefficients and exps are ordinary numbers.
    k.near = 1e-3 < a.softcap && a.softcap < 1e3 && most < 1e3 ? TanhSeries::kEnd * k.cap : -1.0f;
    k.centred = most < 100;
    return k;
}

template <class Element, bool kCapped, Mode kWanted>
struct Variant {
    using T = Element;
    static constexpr bool kCap = kCapped;
    static constexpr Mode kMode = kWanted;
};

// Calls `run` with the Variant that serves the call: the one place where kernels are instantiated.
template <class T, class Run>
void with_mode(const TokenArgs& a, Mode mode, const Run& run) {
    const bool cap = a.softcap != 0;
    if (mode == kPlain) return cap ? run(Variant<T, true, kPlain>{}) : run(Variant<T, false, kPlain>{});
    if (mode == kMoments) return cap ? run(Variant<T, true, kMoments>{}) : run(Variant<T, false, kMoments>{});
    return cap ? run(Variant<T, true, kReference>{}) : run(Variant<T, false, kReference>{});
}

template <class Run>
void with_variant(const TokenArgs& a, Mode mode, const Run& run) {
    if (a.dtype == DType::kFloat32) return with_mode<float>(a, mode, run);
    if (a.dtype == DType::kBFloat16) return with_mode<BFloat16>(a, mode, run);
    return with_mode<Half>(a, mode, run);
}

// The same for the mode that only a forward has.
template <class Run>
void with_diagnostics(const TokenArgs& a, const Run& run) {
    const auto with_cap = [&](auto element) {
        using T = decltype(element);
        return a.softcap != 0 ? run(Variant<T, true, kDiagnostics>{}) : run(Variant<T, false, kDiagnostics>{});
    };
    if (a.dtype == DType::kFloat32) return with_cap(float{});
    if (a.dtype == DType::kBFloat16) return with_cap(BFloat16{});
    return with_cap(Half{});
}

// A block's threads for a row: enough for all its vectors at once, as far as there are so many. By the vocabulary
// alone, so that a row's numbers do not depend on how many rows there are.
int threads_for(int64_t elements, int size, int tile) {
    const int64_t vectors = (elements * size + kBytes - 1) / kBytes;
    int threads = 32;  // a power of two
    while (threads < kMaxThreads && threads * tile < vectors) threads *= 2;
    return threads;
}

int element_size(const TokenArgs& a) { return a.dtype == DType::kFloat32 ? 4 : 2; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The variants that have kernels for short rows.
template <class V>
constexpr bool kHasShort = V::kMode == kPlain && !V::kCap;
static_assert(kOneTile == 32 * kBytes * kTile<kPlain>);

// Blocks of as many rows as leave a block for each multiprocessor. A row's numbers do not depend on it.
Shape short_shape(int64_t rows, int64_t shared_per_row) {
    constexpr int64_t kEnough = 128;
    int64_t held = 1;
    while (held < kMaxThreads / 32 && rows >= 2 * held * kEnough) held *= 2;
    return {ceil_div(rows, held), static_cast<int>(32 * held), held * shared_per_row};
}

// Calls run(whether a row is one tile of a warp) if rows are short; returns whether they are.
template <class V, class Run>
bool if_short(const TokenArgs& a, const Run& run) {
    const int64_t bytes = a.vocab * element_size(a);
    if constexpr (kHasShort<V>) {
        if (bytes <= kOneTile) return run(std::true_type{}), true;
        if (bytes <= kShort) return run(std::false_type{}), true;
    }
    return false;
}

int attribute(cudaDeviceAttr which, const char* name, const Place& place) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, place.device), name, place);
    return value;
}

// How a row is spread over a cluster; no blocks: it does not fit.
struct Spread {
    int blocks, log_blocks, span;
    int64_t shared;
};

// The smallest cluster whose blocks leave room for others beside them on a multiprocessor, else the largest one.
Spread spread(const TokenArgs& a, int rows_held, int most_blocks, int64_t most_shared) {
    constexpr int64_t kGood = 68 * 1024;  // three blocks in 227 KiB
    for (int log_blocks = 0; 1 << log_blocks <= most_blocks; ++log_blocks) {
        const int blocks = 1 << log_blocks;
        const int64_t span = ceil_div(ceil_div(a.vocab, blocks), 16) * 16;
        const int64_t shared = rows_held * staged_bytes(span, element_size(a));
        if (shared <= (blocks < most_blocks && kGood < most_shared ? kGood : most_shared))
            return {blocks, log_blocks, static_cast<int>(span), shared};
    }
    return {};
}

}  // namespace

void forward(const ForwardArgs& a, const Place& place) {
    constexpr const char* kName = "fastalign token_stats forward";
    if (a.rows == 0) return;
    const OnDevice guard(kName, place);
    if (a.log_sum_sq) {
        with_diagnostics(a, [&](auto v) {
            using V = decltype(v);
            const Shape shape{a.rows, threads_for(a.vocab, element_size(a), kTile<V::kMode>)};
            launch(kName, forward_kernel<typename V::T, V::kCap, V::kMode>, shape, place, a, prepare(a, a.out.mean));
        });
        if (!a.ref_logits) return;  // a KL has a loop of its own
    }
    with_variant(a,
                 a.ref_logits                  ? kReference
                 : a.out.entropy || a.out.mean ? kMoments
                                               : kPlain,
                 [&](auto v) {
                     using V = decltype(v);
                     if (if_short<V>(a, [&](auto one) {
                             launch(kName, short_forward_kernel<typename V::T, V::kCap, V::kMode, one.value>,
                                    short_shape(a.rows, 0), place, a, prepare(a, a.out.mean));
                         }))
                         return;
                     const Shape shape{a.rows, threads_for(a.vocab, element_size(a), kTile<V::kMode>)};
                     launch(kName, forward_kernel<typename V::T, V::kCap, V::kMode>, shape, place, a,
                            prepare(a, a.out.mean));
                 });
}

namespace {

void launch_backward(const char* name, const Slopes& a, Mode mode, const Place& place) {
    constexpr int64_t kEnough = 1024, kLeast = 16384;  // blocks that fill a device; elements worth a block
    int64_t splits = ceil_div(a.vocab, kLeast);
    if (splits > ceil_div(kEnough, a.rows)) splits = ceil_div(kEnough, a.rows);
    const int64_t span = ceil_div(ceil_div(a.vocab, splits), 16) * 16;
    splits = ceil_div(a.vocab, span);
    with_variant(a, mode, [&](auto v) {
        using V = decltype(v);
        if (if_short<V>(a, [&](auto one) {
                launch(name, short_backward_kernel<typename V::T, V::kCap, V::kMode, one.value>, short_shape(a.rows, 0),
                       place, a, prepare(a));
            }))
            return;
        const Shape shape{a.rows * splits, threads_for(span, element_size(a), kTile<V::kMode>)};
        launch(name, backward_kernel<typename V::T, V::kCap, V::kMode>, shape, place, a, prepare(a),
               static_cast<int>(splits), static_cast<int>(span));
    });
}

}  // namespace

void backward(const BackwardArgs& a, const Place& place) {
    constexpr const char* kName = "fastalign token_stats backward";
    if (a.rows == 0) return;
    const OnDevice guard(kName, place);
    launch_backward(kName, {a, false, {}},
                    a.ref_logits && a.grads.kl ? kReference
                    : a.grads.entropy          ? kMoments
                                               : kPlain,
                    place);
}

void objective(const ObjectiveArgs& a, const Place& place) {
    constexpr const char* kName = "fastalign token_objective";
    if (a.rows == 0) return;
    const OnDevice guard(kName, place);
    const Mode mode = a.ref_logits ? kReference : a.out.entropy || a.out.mean ? kMoments : kPlain;
    const int most_blocks = attribute(cudaDevAttrComputeCapabilityMajor, kName, place) >= 9 ? 8 : 1;
    const int64_t most_shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kName, place) - 1024;
    const Spread s = spread(a, mode == kReference ? 2 : 1, most_blocks, most_shared);
    if (s.blocks == 0) {
        ForwardArgs f{};
        static_cast<TokenArgs&>(f) = a;
        f.out = a.out, f.saved = a.saved;
        forward(f, place);
        BackwardArgs b{};
        static_cast<TokenArgs&>(b) = a;
        b.saved = a.saved, b.out_gradient = a.out_gradient, b.out_layout = a.out_layout;
        return launch_backward(kName, {b, true, a}, mode, place);
    }
    with_variant(a, mode, [&](auto v) {
        using V = decltype(v);
        if (if_short<V>(a, [&](auto one) {
                const int64_t bytes = one.value ? 0 : staged_bytes(a.vocab, element_size(a));
                launch(kName, short_objective_kernel<typename V::T, V::kCap, V::kMode, one.value>,
                       short_shape(a.rows, bytes), place, a, prepare(a, a.out.mean), static_cast<int>(bytes));
            }))
            return;
        const Shape shape{a.rows * s.blocks, threads_for(s.span, element_size(a), kTile<V::kMode>), s.shared, s.blocks};
        launch(kName, objective_kernel<typename V::T, V::kCap, V::kMode>, shape, place, a, prepare(a, a.out.mean),
               s.log_blocks, s.span);
    });
}

void scale(DType dtype, void* data, int64_t count, const float* factor, const Place& place) {
    constexpr const char* kName = "fastalign scale";
    if (count == 0) return;
    const OnDevice guard(kName, place);
    const int64_t blocks = ceil_div(count, kMaxThreads * 8), most = 4096;
    const Shape shape{blocks < most ? blocks : most, kMaxThreads};
    if (dtype == DType::kFloat32)
        launch(kName, scale_kernel<float>, shape, place, static_cast<float*>(data), count, factor);
    else if (dtype == DType::kBFloat16)
        launch(kName, scale_kernel<BFloat16>, shape, place, static_cast<BFloat16*>(data), count, factor);
    else launch(kName, scale_kernel<Half>, shape, place, static_cast<Half*>(data), count, factor);
}

}  // namespace fastalign::cuda
