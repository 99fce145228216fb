// Token statistics on the CPU. Compiled once per instruction set with FA_ISA and its simd header chosen by the build.
//
// Forward: one read of the logits. There is no pass for the maximum: a pivot from the row's first elements is good
// unless some logit lies far above it, which the finished sum shows; that piece is then done
// again with its own maximum. Sums run in float32 lanes over a piece of 8192 elements and in float64 across pieces, so
// that long rows lose nothing. A row's numbers depend on the row alone: pieces are the same ones, merged in the same
// order, whether one thread takes the row or several share it.
#include "token_stats_cpu.h"

#include <cfloat>
#include <cstring>
#include <vector>

#include "parallel.h"
#include FA_SIMD_HEADER

namespace fastalign::FA_ISA {
namespace {

constexpr int64_t kPiece = 8192;       // elements summed in float32 before they go into float64
constexpr int64_t kPivotSample = 256;  // elements that the pivot is taken from
// A sum beyond this is done again with an exact pivot. Plain sums only have to stay finite; entropy and KL are
// differences of numbers of the size of log(sum), so theirs must stay near the maximum to keep its digits.
constexpr float kLimit[] = {0x1p96f, 0x1p12f, 0x1p12f};
constexpr int kUnit = 2 * Vec::kWidth;

// What the caller wants of a row decides the inner loop: plain (logps, lse), moments (entropy, mean), or a reference.
enum Mode { kPlain, kMoments, kReference };

// ------------------------------------------------------------------------------------------------- elements
struct Prepare {
    Vec inv_cap, cap, scale;  // scale = log2(e) / T
    explicit Prepare(const TokenArgs& a)
        : inv_cap(set1(a.softcap != 0 ? static_cast<float>(1 / a.softcap) : 0.0f)),
          cap(set1(static_cast<float>(a.softcap))),
          scale(set1(static_cast<float>(kLog2e / a.temperature))) {}
};

// tanh: its series below 0.6 (the quotient would cancel there), 1 - 2 / (e^2x + 1) beyond. Relative error below 3e-7.
inline Vec tanh(Vec x) {
    const Vec s = x * x;
    Vec p = fma(set1(-0.00589514058f), s, set1(0.0207959563f));
    p = fma(p, s, set1(-0.0537838265f));
    p = fma(p, s, set1(0.133319244f));
    p = fma(p, s, set1(-0.333332986f));
    const Vec series = fma(x * s, p, x), one = set1(1.0f);
    const Vec quotient = one - set1(2.0f) / (exp2(x * set1(static_cast<float>(2 * kLog2e))) + one);
    return select_small(x, 0.6f, series, quotient);
}

template <bool kCap>
inline Vec capped(Vec x, const Prepare& k) {
    if constexpr (kCap) return k.cap * tanh(x * k.inv_cap);
    else return x;
}

// The last, incomplete unit of a row, padded. Cold: once per row.
template <class T>
inline void load_tail(const T* p, int64_t n, float fill, Vec& a, Vec& b) {
    T unit[kUnit];
    for (T& e : unit) from_float(fill, e);
    std::memcpy(unit, p, n * sizeof(T));
    load2(unit, a, b);
}

// Largest prepared element. NaN may be lost here; the sums find it.
template <class T, bool kCap>
float maximum(const T* x, int64_t n, const Prepare& k) {
    Vec m = set1(-INFINITY), a, b;
    int64_t i = 0;
    for (; i + kUnit <= n; i += kUnit) {
        load2(x + i, a, b);
        m = max(m, max(a, b));
    }
    if (i < n) {
        load_tail(x + i, n - i, -INFINITY, a, b);
        m = max(m, max(a, b));
    }
    return reduce_max(capped<kCap>(m, k));  // capping keeps the order
}

// ------------------------------------------------------------------------------------------------- forward
template <Mode kMode>
struct Lanes {
    Vec s = set1(0), w = set1(0), k = set1(0), t = set1(0), total = set1(0);
};

// `pad` is 0, or -inf in lanes beyond the row's end, whose x and z are 0. It comes after capping, which would undo it.
template <bool kCap, bool kPad, Mode kMode>
inline void accumulate(Lanes<kMode>& acc, Vec x, Vec z, Vec pad, Vec pivot, Vec ref_pivot, const Prepare& k) {
    x = capped<kCap>(x, k);
    if constexpr (kMode != kPlain) acc.total = acc.total + x;
    if constexpr (kPad) x = x + pad;
    const Vec u = (x - pivot) * k.scale, e = exp2(u);
    acc.s = acc.s + e;
    if constexpr (kMode != kPlain) acc.w = acc.w + mul_nonzero(e, u);
    if constexpr (kMode == kReference) {
        z = capped<kCap>(z, k);
        if constexpr (kPad) z = z + pad;
        const Vec v = (z - ref_pivot) * k.scale;
        acc.t = acc.t + exp2(v);
        acc.k = acc.k + mul_nonzero(e, u - v);
    }
}

template <class T, bool kCap, Mode kMode>
Sums sum_piece(const T* x, const T* z, int64_t n, float pivot, float ref_pivot, const Prepare& k) {
    // How far ahead of the loads to ask for memory: the hardware stops at page ends, this does not.
    constexpr int64_t kAhead = 2048 / sizeof(T);
    constexpr int kLines = kUnit * sizeof(T) < 64 ? 1 : kUnit * sizeof(T) / 64;
    const Vec pv = set1(pivot), rv = set1(ref_pivot);
    Lanes<kMode> acc[4];
    Vec a, b, c = set1(0), d = set1(0);
    int64_t i = 0;
    for (; i + 2 * kUnit <= n; i += 2 * kUnit) {
        for (int h = 0; h < 2; ++h) {
            const int64_t at = i + h * kUnit;
            for (int l = 0; l < kLines; ++l) prefetch(x + at + kAhead + l * (64 / static_cast<int>(sizeof(T))));
            load2(x + at, a, b);
            if constexpr (kMode == kReference) {
                for (int l = 0; l < kLines; ++l) prefetch(z + at + kAhead + l * (64 / static_cast<int>(sizeof(T))));
                load2(z + at, c, d);
            }
            accumulate<kCap, false>(acc[2 * h], a, c, pv, pv, rv, k);
            accumulate<kCap, false>(acc[2 * h + 1], b, d, pv, pv, rv, k);
        }
    }
    for (; i + kUnit <= n; i += kUnit) {
        load2(x + i, a, b);
        if constexpr (kMode == kReference) load2(z + i, c, d);
        accumulate<kCap, false>(acc[0], a, c, pv, pv, rv, k);
        accumulate<kCap, false>(acc[1], b, d, pv, pv, rv, k);
    }
    if (i < n) {
        T zeros[kUnit];
        std::memset(static_cast<void*>(zeros), 0, sizeof zeros);
        Vec pad_a, pad_b;
        load_tail(zeros, n - i, -INFINITY, pad_a, pad_b);
        load_tail(x + i, n - i, 0.0f, a, b);
        if constexpr (kMode == kReference) load_tail(z + i, n - i, 0.0f, c, d);
        accumulate<kCap, true>(acc[0], a, c, pad_a, pv, rv, k);
        accumulate<kCap, true>(acc[1], b, d, pad_b, pv, rv, k);
    }
    const auto sum = [&](Vec Lanes<kMode>::* m) -> double {
        return reduce_add((acc[0].*m + acc[1].*m) + (acc[2].*m + acc[3].*m));
    };
    Sums o{pivot, sum(&Lanes<kMode>::s), 0, 0, ref_pivot, 0, 0};
    if constexpr (kMode != kPlain) o.w = sum(&Lanes<kMode>::w), o.total = sum(&Lanes<kMode>::total);
    if constexpr (kMode == kReference) o.k = sum(&Lanes<kMode>::k), o.t = sum(&Lanes<kMode>::t);
    return o;
}

// One row of the call, ready to be summed piece by piece.
template <class T, bool kCap, Mode kMode>
struct Row {
    const T *x, *z;
    int64_t vocab;
    float pivot, ref_pivot;

    Row(const TokenArgs& a, int64_t row, const Prepare& k)
        : x(static_cast<const T*>(a.logits) + a.layout.offset(row)),
          z(kMode == kReference ? static_cast<const T*>(a.ref_logits) + a.ref_layout.offset(row) : nullptr),
          vocab(a.vocab),
          pivot(sample(x, k)),
          ref_pivot(z ? sample(z, k) : 0.0f) {}

    float sample(const T* p, const Prepare& k) const {
        return finite(maximum<T, kCap>(p, vocab < kPivotSample ? vocab : kPivotSample, k));
    }

    // All -inf: a pivot below everything, so that differences from it are -inf and not NaN.
    static float finite(float m) { return m == -INFINITY ? -FLT_MAX : m; }

    Sums piece(int64_t index, const Prepare& k) const {
        const int64_t begin = index * kPiece, n = vocab - begin < kPiece ? vocab - begin : kPiece;
        const T *px = x + begin, *pz = z ? z + begin : nullptr;
        Sums o = sum_piece<T, kCap, kMode>(px, pz, n, pivot, ref_pivot, k);
        if (o.s < kLimit[kMode] && o.t < kLimit[kMode]) return o;
        const float exact = finite(maximum<T, kCap>(px, n, k));
        const float ref_exact = pz ? finite(maximum<T, kCap>(pz, n, k)) : 0.0f;
        return sum_piece<T, kCap, kMode>(px, pz, n, exact, ref_exact, k);
    }
};

template <bool kCap>
float prepared(float x, const Prepare& k) {
    return reduce_max(capped<kCap>(set1(x), k));  // by the vector code: the same bits as in the sums
}

void write_row(const ForwardArgs& a, int64_t row, const Stats& o) {
    a.out.logps[row] = o.logps, a.out.lse[row] = o.lse;
    if (a.out.entropy) a.out.entropy[row] = o.entropy;
    if (a.out.kl) a.out.kl[row] = o.kl;
    if (a.out.mean) a.out.mean[row] = o.mean;
    float* saved = a.saved + 4 * row;
    saved[0] = o.m, saved[1] = o.r, saved[2] = o.ref_m, saved[3] = o.ref_r;
}

template <class T, bool kCap, Mode kMode>
struct Forward {
    static void run(const ForwardArgs& a) {
        const Prepare k(a);
        const int64_t pieces = (a.vocab + kPiece - 1) / kPiece;
        if (a.rows >= 2 * a.threads || pieces == 1) {
            parallel_for(a.rows, std::max<int64_t>(1, 2 * kPiece / a.vocab), a.threads, [&](int64_t row) {
                if (a.label(row) == a.ignore_index) return write_row(a, row, Stats{});
                const Row<T, kCap, kMode> r(a, row, k);
                Sums sums = r.piece(0, k);
                for (int64_t p = 1; p < pieces; ++p) merge(sums, r.piece(p, k), kLog2e / a.temperature);
                finish_row(a, row, r, sums, k);
            });
            return;
        }
        // Few long rows: threads share them, piece by piece.
        std::vector<Sums> parts(a.rows * pieces);
        parallel_for(a.rows * pieces, 1, a.threads, [&](int64_t i) {
            if (a.label(i / pieces) == a.ignore_index) return;
            parts[i] = Row<T, kCap, kMode>(a, i / pieces, k).piece(i % pieces, k);
        });
        for (int64_t row = 0; row < a.rows; ++row) {
            if (a.label(row) == a.ignore_index) {
                write_row(a, row, Stats{});
                continue;
            }
            Sums sums = parts[row * pieces];
            for (int64_t p = 1; p < pieces; ++p) merge(sums, parts[row * pieces + p], kLog2e / a.temperature);
            finish_row(a, row, Row<T, kCap, kMode>(a, row, k), sums, k);
        }
    }

    static void finish_row(const ForwardArgs& a, int64_t row, const Row<T, kCap, kMode>& r, const Sums& s,
                           const Prepare& k) {
        const float label = prepared<kCap>(to_float(r.x[a.label(row)]), k);
        Stats o = finish(s, label, 1 / a.temperature, static_cast<double>(a.vocab));
        if (kMode != kReference) o.ref_m = o.ref_r = 0;
        write_row(a, row, o);
    }
};

// ------------------------------------------------------------------------------------------------- backward
template <bool kCap, Mode kMode>
inline Vec gradient(Vec x, Vec z, const Coefficients& c, const Prepare& k) {
    Vec slope = set1(c.a), squash = set1(1.0f);
    if constexpr (kCap) {
        const Vec th = tanh(x * k.inv_cap);
        squash = set1(1.0f) - th * th;
        x = k.cap * th;
    }
    const Vec u = (x - set1(c.pivot)) * k.scale, e = exp2(u);
    Vec dx;
    if constexpr (kMode == kPlain) {
        dx = fma(e, slope, set1(c.kappa));
    } else {
        slope = fma(set1(c.b), u, slope);
        if constexpr (kMode == kReference) {
            const Vec v = (capped<kCap>(z, k) - set1(c.ref_pivot)) * k.scale;
            slope = slope - set1(c.g) * v;
        }
        dx = mul_nonzero(e, slope) + set1(c.kappa);
    }
    return kCap ? dx * squash : dx;
}

template <class T, bool kCap, Mode kMode>
void gradient_tail(const T* x, const T* z, T* out, int64_t n, const Coefficients& c, const Prepare& k) {
    Vec a, b, p = set1(0), q = set1(0);
    T unit[kUnit];
    load_tail(x, n, 0.0f, a, b);
    if constexpr (kMode == kReference) load_tail(z, n, 0.0f, p, q);
    store2<false>(unit, gradient<kCap, kMode>(a, p, c, k), gradient<kCap, kMode>(b, q, c, k));
    std::memcpy(out, unit, n * sizeof(T));
}

template <class T, bool kCap, Mode kMode, bool kStream>
void gradient_piece(const T* x, const T* z, T* out, int64_t n, const Coefficients& c, const Prepare& k) {
    constexpr int64_t kAhead = 2048 / sizeof(T);
    constexpr int kLines = kUnit * sizeof(T) < 64 ? 1 : kUnit * sizeof(T) / 64;
    Vec a, b, p = set1(0), q = set1(0);
    int64_t i = 0;
    if (kStream) {  // a streaming store must be aligned: the first few elements go by the ordinary way
        const int64_t past = reinterpret_cast<uintptr_t>(out) % kStreamAlign / sizeof(T);
        i = past ? std::min<int64_t>(n, kStreamAlign / sizeof(T) - past) : 0;
        if (i) gradient_tail<T, kCap, kMode>(x, z, out, i, c, k);
    }
    for (; i + kUnit <= n; i += kUnit) {
        for (int l = 0; l < kLines; ++l) prefetch(x + i + kAhead + l * (64 / static_cast<int>(sizeof(T))));
        load2(x + i, a, b);
        if constexpr (kMode == kReference) {
            for (int l = 0; l < kLines; ++l) prefetch(z + i + kAhead + l * (64 / static_cast<int>(sizeof(T))));
            load2(z + i, p, q);
        }
        store2<kStream>(out + i, gradient<kCap, kMode>(a, p, c, k), gradient<kCap, kMode>(b, q, c, k));
    }
    if (i < n) gradient_tail<T, kCap, kMode>(x + i, kMode == kReference ? z + i : z, out + i, n - i, c, k);
}

Coefficients row_coefficients(const BackwardArgs& a, int64_t row) {
    const auto at = [row](const float* p) { return p ? p[row] : 0.0f; };
    const float* saved = a.saved + 4 * row;
    const Stats o{0, 0, at(a.entropy), at(a.kl), 0, saved[0], saved[1], saved[2], saved[3]};
    const Grads d{at(a.grads.logps), at(a.grads.lse), at(a.grads.entropy), at(a.grads.kl), at(a.grads.mean)};
    return coefficients(o, d, a.temperature, static_cast<double>(a.vocab));
}

bool no_gradient(const Coefficients& c) { return c.a == 0 && c.b == 0 && c.g == 0 && c.kappa == 0 && c.delta == 0; }

template <class T, bool kCap, Mode kMode>
struct Backward {
    static void run(const BackwardArgs& a) {
        const Prepare k(a);
        const int64_t pieces = (a.vocab + kPiece - 1) / kPiece;
        const bool split = a.rows < 2 * a.threads && pieces > 1;
        const int64_t per_row = split ? pieces : 1;
        parallel_for(a.rows * per_row, std::max<int64_t>(1, split ? 1 : 2 * kPiece / a.vocab), a.threads,
                     [&](int64_t i) {
                         const int64_t row = i / per_row, begin = i % per_row * kPiece;
                         range(a, row, begin, split ? std::min(a.vocab, begin + kPiece) : a.vocab, k);
                     });
    }

    // Gradient of elements [begin, end) of a row.
    static void range(const BackwardArgs& a, int64_t row, int64_t begin, int64_t end, const Prepare& k) {
        const T* x = static_cast<const T*>(a.logits) + a.layout.offset(row);
        const T* z = kMode == kReference ? static_cast<const T*>(a.ref_logits) + a.ref_layout.offset(row) : nullptr;
        T* out = static_cast<T*>(a.out) + a.out_layout.offset(row);
        const int64_t label = a.label(row);
        const bool live = label != a.ignore_index;
        const Coefficients c = live ? row_coefficients(a, row) : Coefficients{};
        // Ignored tokens, and tokens whose loss does not move (a clipped PPO ratio), are not read at all.
        if (!live || no_gradient(c)) {
            std::memset(static_cast<void*>(out + begin), 0, (end - begin) * sizeof(T));
            return;
        }
        const bool has_label = begin <= label && label < end;
        float at_label = 0;  // taken before the row is written: `out` may be `logits`
        if (has_label) at_label = label_gradient(to_float(x[label]), z ? to_float(z[label]) : 0.0f, c, k);
        const T* zb = z ? z + begin : nullptr;
        if (a.stream && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0) {
            gradient_piece<T, kCap, kMode, true>(x + begin, zb, out + begin, end - begin, c, k);
            stream_fence();
        } else {
            gradient_piece<T, kCap, kMode, false>(x + begin, zb, out + begin, end - begin, c, k);
        }
        if (has_label) from_float(at_label, out[label]);
    }

    // The target's gradient with its `delta`, added before the one rounding to T.
    static float label_gradient(float x, float z, Coefficients c, const Prepare& k) {
        c.kappa += c.delta;
        return reduce_max(gradient<kCap, kMode>(set1(x), set1(z), c, k));
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
    if (a.dtype == DType::kFloat32) return with_mode<Kernel, float>(a, mode);
    if (a.dtype == DType::kBFloat16) return with_mode<Kernel, BFloat16>(a, mode);
    return with_mode<Kernel, Half>(a, mode);
}

void forward(const ForwardArgs& a) {
    with_dtype<Forward>(a, a.ref_logits ? kReference : a.out.entropy || a.out.mean ? kMoments : kPlain);
}

void backward(const BackwardArgs& a) {
    with_dtype<Backward>(a, a.ref_logits && a.grads.kl ? kReference : a.grads.entropy ? kMoments : kPlain);
}

// Reads everything and does next to nothing with it: the rate that no kernel can beat.
float read(const void* data, int64_t bytes, int threads) {
    constexpr int64_t kBlock = 1 << 18;
    const int64_t blocks = bytes / kBlock;
    std::vector<float> sums(blocks);
    parallel_for(blocks, 1, threads, [&](int64_t i) {
        const float* p = reinterpret_cast<const float*>(static_cast<const char*>(data) + i * kBlock);
        Vec acc[8] = {set1(0), set1(0), set1(0), set1(0), set1(0), set1(0), set1(0), set1(0)};
        for (int64_t j = 0; j < kBlock / 4; j += 4 * kUnit) {
            for (int h = 0; h < 4; ++h) {
                Vec a, b;
                prefetch(p + j + h * kUnit + 512);
                prefetch(p + j + h * kUnit + 512 + 16);
                load2(p + j + h * kUnit, a, b);
                acc[2 * h] = acc[2 * h] + a, acc[2 * h + 1] = acc[2 * h + 1] + b;
            }
        }
        Vec total = acc[0];
        for (int h = 1; h < 8; ++h) total = total + acc[h];
        sums[i] = reduce_add(total);
    });
    float total = 0;
    for (float s : sums) total += s;
    return total;
}

void copy(void* to, const void* from, int64_t bytes, int threads) {
    constexpr int64_t kBlock = 1 << 18;
    parallel_for((bytes + kBlock - 1) / kBlock, 1, threads, [&](int64_t i) {
        const int64_t n = std::min(kBlock, bytes - i * kBlock);
        const char* src = static_cast<const char*>(from) + i * kBlock;
        char* dst = static_cast<char*>(to) + i * kBlock;
        int64_t j = 0;
        if (reinterpret_cast<uintptr_t>(dst) % kStreamAlign == 0) {
            for (; j + kUnit * 4 <= n; j += kUnit * 4) {
                Vec a, b;
                load2(reinterpret_cast<const float*>(src + j), a, b);
                store2<true>(reinterpret_cast<float*>(dst + j), a, b);
            }
        }
        std::memcpy(dst + j, src + j, n - j);
        stream_fence();
    });
}

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels{FA_ISA_NAME, forward, backward, read, copy};

}  // namespace fastalign::FA_ISA
