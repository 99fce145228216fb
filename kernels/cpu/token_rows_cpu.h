// One row of logits on the CPU: its sums and its statistics. Included once per instruction set (FA_ISA) after its simd
// header.
//
// There is no pass for the maximum: a shift from the row's first elements is good unless some logit lies far above it,
// which the finished sum shows; that chunk is then done again with its own maximum. Sums run in float32 lanes over a
// chunk of 16384 elements and in float64 across chunks, so that long rows lose nothing. A row's numbers depend on the
// row alone: chunks are the same ones, merged in the same order, whether one thread takes the row or several share it.
// The target's segment of its chunk is summed apart: of a sure row (see token_stats.h) only that has to be summed
// again.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cstring>

#include "token_stats_cpu.h"

namespace fastalign::FA_ISA {
namespace {

constexpr int64_t kChunk = 16384;      // elements summed in float32 before they go into float64
constexpr int64_t kSegment = 1024;     // elements summed apart from the others, and anew where the row is sure
constexpr int64_t kShiftSample = 256;  // elements that the shift is taken from
// A sum beyond this is done again with an exact shift. The power 2^32 is known to 1e-6, as its exponent is rounded to
// 24 bits; entropy and KL are differences of numbers of the size of log(sum), so theirs must stay near the maximum.
constexpr float kLimit[] = {0x1p32f, 0x1p12f, 0x1p12f, 0x1p12f};
constexpr int64_t kStreamed = 4096;  // bytes of a row that may go past the caches: the fence behind it takes as long
constexpr int kUnit = 2 * Vec::kWidth;

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
    Vec p = fma(set1(kTanh11), s, set1(kTanh9));
    p = fma(p, s, set1(kTanh7));
    p = fma(p, s, set1(kTanh5));
    p = fma(p, s, set1(kTanh3));
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
    Vec s = set1(0), w = set1(0), k = set1(0), t = set1(0), total = set1(0), squares = set1(0), top = set1(-INFINITY);
};

// `pad` is 0, or -inf in lanes beyond the row's end, whose x and z are 0. It comes after capping, which would undo it.
// Adds one vector and returns its exps. `kFused`: `shift` is -shift * scale, and the difference and the product are
// one instruction.
template <bool kCap, bool kPad, bool kFused, Mode kMode>
inline Vec accumulate(Lanes<kMode>& acc, Vec x, Vec z, Vec pad, Vec shift, Vec ref_shift, const Prepare& k) {
    if constexpr (kMode == kDiagnostics) acc.top = max(acc.top, kPad ? x + pad : x);
    x = capped<kCap>(x, k);
    if constexpr (kMode != kPlain) acc.total = acc.total + x;
    if constexpr (kPad) x = x + pad;
    const Vec u = kFused ? fma(x, k.scale, shift) : (x - shift) * k.scale, e = exp2(u);
    acc.s = acc.s + e;
    if constexpr (kMode != kPlain) acc.w = acc.w + mul_nonzero(e, u);
    if constexpr (kMode == kDiagnostics) acc.squares = fma(e, e, acc.squares);
    if constexpr (kMode == kReference) {
        z = capped<kCap>(z, k);
        if constexpr (kPad) z = z + pad;
        const Vec v = (z - ref_shift) * k.scale;
        acc.t = acc.t + exp2(v);
        acc.k = acc.k + mul_nonzero(e, u - v);
    }
    return e;
}

// What becomes of a chunk's exps: nothing.
struct Drop {
    void operator()(int64_t, Vec, Vec) const {}
    void tail(int64_t, int64_t, Vec, Vec) const {}
    Drop again() const { return {}; }
};

// The four chains of sums that a chunk runs in.
template <Mode kMode>
struct Accumulators {
    Lanes<kMode> lanes[4];

    Sums close(double shift, double ref_shift) const {
        const auto sum = [&](Vec Lanes<kMode>::* m) -> double {
            return reduce_add((lanes[0].*m + lanes[1].*m) + (lanes[2].*m + lanes[3].*m));
        };
        Sums o{shift, sum(&Lanes<kMode>::s), 0, 0, ref_shift, 0, 0, 0};
        if constexpr (kMode != kPlain) o.w = sum(&Lanes<kMode>::w), o.total = sum(&Lanes<kMode>::total);
        if constexpr (kMode == kReference) o.k = sum(&Lanes<kMode>::k), o.t = sum(&Lanes<kMode>::t);
        if constexpr (kMode == kDiagnostics) o.squares = sum(&Lanes<kMode>::squares);
        return o;
    }

    // The largest element, not prepared.
    float top() const { return reduce_max(max(max(lanes[0].top, lanes[1].top), max(lanes[2].top, lanes[3].top))); }
};

// Adds elements [i, n).
template <class T, bool kCap, Mode kMode, bool kFused, class Sink>
void add_range(Accumulators<kMode>& sums, const T* x, const T* z, int64_t i, int64_t n, float shift, float ref_shift,
               const Sink& sink, const Prepare& k) {
    // How far ahead of the loads to ask for memory: the hardware stops at page ends, this does not.
    constexpr int64_t kAhead = 2048 / sizeof(T);
    constexpr int kLines = kUnit * sizeof(T) < 64 ? 1 : kUnit * sizeof(T) / 64;
    const Vec pv = set1(kFused ? -shift * first(k.scale) : shift), rv = set1(ref_shift);
    Lanes<kMode> acc[4] = {sums.lanes[0], sums.lanes[1], sums.lanes[2], sums.lanes[3]};  // in registers
    Vec a, b, c = set1(0), d = set1(0);
    for (; i + 2 * kUnit <= n; i += 2 * kUnit) {
        for (int h = 0; h < 2; ++h) {
            const int64_t at = i + h * kUnit;
            for (int l = 0; l < kLines; ++l) prefetch(x + at + kAhead + l * (64 / static_cast<int>(sizeof(T))));
            load2(x + at, a, b);
            if constexpr (kMode == kReference) {
                for (int l = 0; l < kLines; ++l) prefetch(z + at + kAhead + l * (64 / static_cast<int>(sizeof(T))));
                load2(z + at, c, d);
            }
            const Vec e = accumulate<kCap, false, kFused>(acc[2 * h], a, c, pv, pv, rv, k);
            const Vec f = accumulate<kCap, false, kFused>(acc[2 * h + 1], b, d, pv, pv, rv, k);
            sink(at, e, f);
        }
    }
    for (; i + kUnit <= n; i += kUnit) {
        load2(x + i, a, b);
        if constexpr (kMode == kReference) load2(z + i, c, d);
        const Vec e = accumulate<kCap, false, kFused>(acc[0], a, c, pv, pv, rv, k);
        const Vec f = accumulate<kCap, false, kFused>(acc[1], b, d, pv, pv, rv, k);
        sink(i, e, f);
    }
    if (i < n) {
        T zeros[kUnit];
        std::memset(static_cast<void*>(zeros), 0, sizeof zeros);
        Vec pad_a, pad_b;
        load_tail(zeros, n - i, -INFINITY, pad_a, pad_b);
        load_tail(x + i, n - i, 0.0f, a, b);
        if constexpr (kMode == kReference) load_tail(z + i, n - i, 0.0f, c, d);
        const Vec e = accumulate<kCap, true, kFused>(acc[0], a, c, pad_a, pv, rv, k);
        const Vec f = accumulate<kCap, true, kFused>(acc[1], b, d, pad_b, pv, rv, k);
        sink.tail(i, n - i, e, f);
    }
    for (int h = 0; h < 4; ++h) sums.lanes[h] = acc[h];
}

// Whether a shift may be fused: rounding -shift * scale moves it, far out by more than a float32's exps reach.
inline bool may_fuse(float shift, const Prepare& k) { return kHasFma && std::fabs(shift * first(k.scale)) < 0x1p20f; }

// Fused sums are exactly those at the moved shift.
template <bool kFused>
double moved(float shift, const Prepare& k) {
    const float scale = first(k.scale), offset = -shift * scale;
    return kFused ? -static_cast<double>(offset) / scale : shift;
}

// The elements that are summed apart: the target's neighbours, or none (n..n) where it is not among the n.
struct Segment {
    int64_t begin, end;
    Segment(int64_t label, int64_t n)
        : begin(0 <= label && label < n ? label / kSegment * kSegment : n), end(std::min(n, begin + kSegment)) {}
};

// Where elements are that have the largest of a row: somewhere in [begin, end), and nowhere before. Of -inf alone there
// is none.
struct Largest {
    float top = -INFINITY;
    int64_t begin = 0, end = 0;

    void add(const Largest& later) {
        if (later.top > top) *this = later;
    }
    void move(int64_t by) { begin += by, end += by; }
};

// Sums over a row or a chunk of it, of the target's segment and of all else; for diagnostics, its largest element too.
struct Parted {
    Sums others, segment;
    Largest largest = {};

    double s() const { return others.s + segment.s; }
    double t() const { return others.t + segment.t; }
    void add(const Parted& b, double scale) {
        merge(others, b.others, scale), merge(segment, b.segment, scale);
        largest.add(b.largest);
    }
};

inline Sums nothing_at(double shift, double ref_shift) { return {shift, 0, 0, 0, ref_shift, 0, 0, 0}; }

template <class T, bool kCap, Mode kMode, bool kFused, class Sink>
Parted sum_chunk_at(const T* x, const T* z, int64_t n, int64_t label, float shift, float ref_shift, const Sink& sink,
                    const Prepare& k) {
    const Segment segment(label, n);
    const double at = moved<kFused>(shift, k);
    Parted o{nothing_at(at, ref_shift), nothing_at(at, ref_shift)};
    const int64_t ends[] = {segment.begin, segment.end, n};
    for (int64_t begin = 0, run = 0; run < 3; begin = ends[run++]) {
        if (begin == ends[run]) continue;
        Accumulators<kMode> sums;
        add_range<T, kCap, kMode, kFused>(sums, x, z, begin, ends[run], shift, ref_shift, sink, k);
        const Sums part = sums.close(at, ref_shift);
        if (run == 1) o.segment = part;
        else merge(o.others, part, 1.0);
        if constexpr (kMode == kDiagnostics) o.largest.add({sums.top(), begin, ends[run]});
    }
    return o;
}

// The sum of the exps, relative to `shift`, of n elements but for the one at `hole`.
template <class T, bool kCap>
[[gnu::noinline]] double sum_but_for(const T* x, int64_t n, int64_t hole, float shift, const Prepare& k) {
    const Vec pv = set1(shift), none = set1(0);
    Vec s = none, t = none, a, b;
    const auto add = [&](const T* from, Vec pad_a, Vec pad_b) {
        load2(from, a, b);
        s = s + exp2((capped<kCap>(a, k) + pad_a - pv) * k.scale);
        t = t + exp2((capped<kCap>(b, k) + pad_b - pv) * k.scale);
    };
    // A unit that has the hole or is not complete: pads of -inf for what does not count.
    const auto add_some = [&](int64_t begin) {
        T unit[kUnit], pads[kUnit];
        std::memset(static_cast<void*>(unit), 0, sizeof unit);
        std::memset(static_cast<void*>(pads), 0, sizeof pads);
        const int64_t count = std::min<int64_t>(kUnit, n - begin);
        std::memcpy(unit, x + begin, count * sizeof(T));
        for (int64_t i = count; i < kUnit; ++i) from_float(-INFINITY, pads[i]);
        if (begin <= hole && hole < begin + count) from_float(-INFINITY, pads[hole - begin]);
        Vec pad_a, pad_b;
        load2(pads, pad_a, pad_b);
        add(unit, pad_a, pad_b);
    };
    const int64_t holed = hole / kUnit * kUnit, whole = n / kUnit * kUnit;
    for (int64_t i = 0; i < std::min(holed, whole); i += kUnit) add(x + i, none, none);
    for (int64_t i = holed + kUnit; i < whole; i += kUnit) add(x + i, none, none);
    add_some(holed);
    if (whole < n && holed < whole) add_some(whole);
    return reduce_add(s + t);
}

// The first of n elements that is as large as the largest of them.
template <class T>
int64_t find(const T* x, int64_t n, float largest) {
    const float below = std::nextafter(largest, -INFINITY);
    Vec a, b, c, d;
    int64_t i = 0;
    for (; i + 2 * kUnit <= n; i += 2 * kUnit) {
        load2(x + i, a, b), load2(x + i + kUnit, c, d);
        if (any_above(max(max(a, b), max(c, d)), below)) break;
    }
    while (i + 1 < n && to_float(x[i]) != largest) ++i;
    return i;
}

template <bool kCap>
float prepared(float x, const Prepare& k) {
    if constexpr (kCap)
        return reduce_max(capped<kCap>(set1(x), k));  // by the vector code: the same bits as in the sums
    else return x;
}

// One row of the call, ready to be summed chunk by chunk.
template <class T, bool kCap, Mode kMode>
struct Row {
    const T *x, *z;
    int64_t vocab, label;
    float shift, ref_shift;

    Row(const TokenArgs& a, int64_t row, const Prepare& k)
        : x(static_cast<const T*>(a.logits) + a.layout.offset(row)),
          z(kMode == kReference ? static_cast<const T*>(a.ref_logits) + a.ref_layout.offset(row) : nullptr),
          vocab(a.vocab),
          label(a.label(row)),
          shift(sample(x, k)),
          ref_shift(z ? sample(z, k) : 0.0f) {}

    float sample(const T* p, const Prepare& k) const {
        return finite(maximum<T, kCap>(p, vocab < kShiftSample ? vocab : kShiftSample, k));
    }

    // All -inf: a shift below everything, so that differences from it are -inf and not NaN.
    static float finite(float m) { return m == -INFINITY ? -FLT_MAX : m; }

    template <class Sink = Drop>
    Parted chunk(int64_t index, const Prepare& k, const Sink& sink = {}) const {
        const int64_t begin = index * kChunk, n = vocab - begin < kChunk ? vocab - begin : kChunk;
        const T *px = x + begin, *pz = z ? z + begin : nullptr;
        // Plain sums are bound by instructions in 16 bits, so one fewer counts. Entropy and KL want differences that
        // are exactly 0 for equal logits.
        constexpr bool kFused = kMode == kPlain ? kHasFma : false;
        const int64_t at = label - begin;
        Parted o = kFused && may_fuse(shift, k)
                       ? sum_chunk_at<T, kCap, kMode, kFused>(px, pz, n, at, shift, ref_shift, sink, k)
                       : sum_chunk_at<T, kCap, kMode, false>(px, pz, n, at, shift, ref_shift, sink, k);
        if (!(o.s() < kLimit[kMode] && o.t() < kLimit[kMode])) o = again(px, pz, n, at, sink, k);
        if constexpr (kMode == kDiagnostics) o.largest.move(begin);
        return o;
    }

    // A chunk with its own maximum as the shift.
    template <class Sink>
    [[gnu::noinline]] static Parted again(const T* px, const T* pz, int64_t n, int64_t label, const Sink& sink,
                                          const Prepare& k) {
        const float exact = finite(maximum<T, kCap>(px, n, k));
        const float ref_exact = pz ? finite(maximum<T, kCap>(pz, n, k)) : 0.0f;
        return sum_chunk_at<T, kCap, kMode, false>(px, pz, n, label, exact, ref_exact, sink.again(), k);
    }

    // `neighbours(logit)`: the sum of the exps, relative to the target's prepared logit, of the others in its
    // segment.
    template <class Neighbours>
    Stats finish(const TokenArgs& a, float at_label, const Parted& s, const Prepare& k,
                 const Neighbours& neighbours) const {
        const float logit = prepared<kCap>(at_label, k);
        const double scale = kLog2e * a.inv_temperature;
        Sums all = s.others;
        merge(all, s.segment, scale);
        Stats o = fastalign::finish(all, logit, a.temperature, a.inv_temperature, static_cast<double>(vocab), kMode);
        if (is_sure(o)) {
            const double far = s.others.s != 0 ? s.others.s * std::exp2((s.others.shift - logit) * scale) : 0;
            make_sure(o, logit, far + neighbours(logit), a.inv_temperature);
        }
        if constexpr (kMode == kDiagnostics) {
            const Largest& l = s.largest;
            if (std::isfinite(o.lse)) o.argmax = static_cast<int>(l.begin + find(x + l.begin, l.end - l.begin, l.top));
        }
        return o;
    }

    // The same from logits that still lie where they were.
    Stats finish(const TokenArgs& a, const Parted& s, const Prepare& k) const {
        return finish(a, to_float(x[label]), s, k, [&](float logit) {
            const Segment own(label, vocab);
            return sum_but_for<T, kCap>(x + own.begin, own.end - own.begin, label - own.begin, logit, k);
        });
    }
};

}  // namespace
}  // namespace fastalign::FA_ISA
