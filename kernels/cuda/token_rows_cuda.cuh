// Sums over a row in CUDA: a thread's own, relative to its own shift, then merged over warp, block and cluster.
//
// There is no pass for the maximum. A thread's shift is the maximum of its first tile, and moves only when a tile lies
// far above it: one comparison per tile in the usual case.
#pragma once
#include <type_traits>

#include "../token_args.h"
#include "token_memory_cuda.cuh"

namespace fastalign::cuda {

using FloatSums = SumsOf<float>;

// In shared memory, where neighbours' sums lie an odd number of words apart, and so in banks of their own.
struct SharedSums : FloatSums {
    float unused;
};

constexpr int kMaxThreads = 256;

// Vectors that a thread has in flight. A reference brings as many again.
template <Mode kMode>
constexpr int kTile = kMode == kReference ? 2 : 4;

// How far, in powers of two, an element may lie above the shift. Plain sums only have to stay finite; entropy and KL
// are differences of numbers of the size of log(sum), so theirs must stay near the maximum to keep its digits.
template <Mode kMode>
constexpr float kHeadroom = kMode == kPlain ? 32.0f : 8.0f;

// Of every eight elements in 16 bits one is a polynomial's: then the special-function unit keeps ahead of the memory.
// Not under a soft-cap, which leaves that unit idle for longer.
template <class T, bool kCap, Mode kMode>
__device__ constexpr bool by_polynomial(int element) {
    return sizeof(T) == 2 && !kCap && kMode == kPlain && element == 7;
}

__device__ inline FloatSums no_sums() { return {-FLT_MAX, 0, 0, 0, -FLT_MAX, 0, 0, 0}; }

// `floor`: the shift when its chunk has nothing but -inf, so that differences from it are -inf and not NaN.
template <class T, bool kCap, int kCount>
__device__ inline float lifted(float shift, const Pack (&v)[kCount], float headroom, const Prepare& k) {
    const float largest = capped<kCap>(maximum<T>(v), k);  // capping keeps the order
    return largest > shift + headroom ? largest : shift;
}

// A thread's largest element, not prepared, for diagnostics, and where the tile begins that had it first.
struct Largest {
    float top = -INFINITY;
    int at = 0;
};

// A thread's sums, and what its elements' exps are relative to.
struct ThreadSums : FloatSums {
    Exponent u, v;
    Largest largest;

    __device__ ThreadSums(const FloatSums& sums, const Prepare& k)
        : FloatSums(sums), u(exponent(shift, k.scale)), v(exponent(ref_shift, k.scale)) {}

    // Carries the sums to shifts not below their own.
    template <Mode kMode>
    __device__ void lift(float to, float ref_to, float scale) {
        const Exponent next = exponent(to, scale), ref_next = kMode == kReference ? exponent(ref_to, scale) : v;
        move_sums<kMode != kPlain, kMode == kReference, kMode == kDiagnostics>(
            static_cast<FloatSums&>(*this), to, ref_to, shift == to ? 0 : exponent_move(u, next),
            kMode != kReference || ref_shift == ref_to ? 0 : exponent_move(v, ref_next));
        u = next, v = ref_next;
    }
};

// The power of two, relative to u, of a logit that is yet to be capped.
template <bool kCap, bool kNear>
__device__ inline float power_in_sum(float x, const Exponent& u, const Prepare& k) {
    if constexpr (kCap && kNear) return fmaf(x, k.exponent(x), -u.at);
    else return u.of(capped<kCap>(x, k));
}

// How a tile is taken. kWhole: all its elements are logits above -inf; kNear: and within Prepare::near; kHoles:
// probabilities may be 0 because of -inf and weigh nothing, which kWhole would turn into NaN; kEdge: as well, and
// elements from the row's length on are padding of -inf, which capping must not see.
enum Tile { kNear, kWhole, kHoles, kEdge };
template <Tile kTaken>
using Taken = std::integral_constant<Tile, kTaken>;

// Adds a tile to a thread's sums, whose shifts are not far below its elements. `at`: the first element of v[0]; v[u]
// lies 32 vectors after v[u - 1].
template <class T, bool kCap, Mode kMode, Tile kTaken, bool kPolynomial, int kCount>
__device__ inline void add_exps(ThreadSums& a, const Pack (&v)[kCount], const Pack (&z)[kCount], int at, int length,
                                const Prepare& k) {
    constexpr bool kClamps = kTaken == kHoles || kTaken == kEdge;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        float x[kWidth<T>], y[kWidth<T>], s, w = 0, squares = 0, kl = 0, t;
        unpack<T>(v[u], x);
        if constexpr (kMode == kReference) unpack<T>(z[u], y);
        const auto add = [](float& sum, float x, int i) { sum = i == 0 ? x : sum + x; };
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) {
            const bool real = kTaken != kEdge || at + 32 * u * kWidth<T> + i < length;
            const float power = power_in_sum<kCap, kTaken == kNear>(x[i], a.u, k);
            float p = kCap && !real ? -INFINITY : power;
            if constexpr (kMode == kPlain) {
                add(s, kPolynomial && by_polynomial<T, kCap, kMode>(i) ? exp2_polynomial(p) : power_of_two(p), i);
            } else {
                if constexpr (kClamps) p = max_or_nan(p, -256.0f);  // its power is 0 as well
                const float e = power_of_two(p);
                add(s, e, i);
                w = fmaf(e, p, w);
                if constexpr (kMode == kDiagnostics) squares = fmaf(e, e, squares);
                if constexpr (kMode == kReference) {
                    const float ref = power_in_sum<kCap, kTaken == kNear>(y[i], a.v, k);
                    const float q = kCap && !real ? -INFINITY : ref;
                    add(t, power_of_two(q), i);
                    kl = fmaf(e, kClamps && e == 0 ? 0 : p - q, kl);
                }
            }
        }
        a.s += s;
        if constexpr (kMode != kPlain) a.w += w;
        if constexpr (kMode == kDiagnostics) a.squares += squares;
        if constexpr (kMode == kReference) a.k += kl, a.t += t;
    }
}

// The sum of a tile's logits that lie before `length`, for the mean, which few calls ask for.
template <class T, bool kCap, int kCount>
__device__ inline float total_of(const Pack (&v)[kCount], int at, int length, const Prepare& k) {
    float total = 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        float x[kWidth<T>], part = 0;
        unpack<T>(v[u], x);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) part += at + 32 * u * kWidth<T> + i < length ? capped<kCap>(x[i], k) : 0;
        total += part;
    }
    return total;
}

// The exps and, where it is asked for, the total of a tile within a row; after lifting the shifts where it lies far
// above them. Holes are rare: a tile is taken for whole, and once more if its sums say otherwise. Capped logits have
// none.
template <class T, bool kCap, Mode kMode, bool kAtEdge, bool kPolynomial, int kCount>
__device__ inline void add_tile(ThreadSums& a, const Pack (&v)[kCount], const Pack (&z)[kCount], int at, int length,
                                const Prepare& k) {
    if (kMode != kPlain && k.mean) a.total += total_of<T, kCap>(v, at, length, k);
    if constexpr (kMode == kDiagnostics) {
        const float top = maximum<T>(v);
        if (top > a.largest.top) a.largest = {top, at};
    }
    const auto add = [&](auto taken) { add_exps<T, kCap, kMode, taken.value, kPolynomial>(a, v, z, at, length, k); };
    if (!(kCap && kMode == kPlain && k.centred)) {
        const float headroom = kHeadroom<kMode> * k.inv_scale;
        const float shift = lifted<T, kCap>(a.shift, v, headroom, k);
        const float ref_shift = kMode == kReference ? lifted<T, kCap>(a.ref_shift, z, headroom, k) : a.ref_shift;
        if (shift != a.shift || ref_shift != a.ref_shift) a.lift<kMode>(shift, ref_shift, k.scale);
    }
    if constexpr (kCap) {  // by the tile's numbers alone, so that a row's do not depend on its alignment
        if (all_near<T>(v, k) && (kMode != kReference || all_near<T>(z, k))) add(Taken<kNear>{});
        else add(Taken<kAtEdge ? kEdge : kWhole>{});
    } else if constexpr (kAtEdge) {
        add(Taken<kEdge>{});
    } else if constexpr (kMode == kPlain) {
        add(Taken<kHoles>{});  // they add nothing
    } else {
        const ThreadSums before = a;
        add(Taken<kWhole>{});
        const float check = kMode == kReference ? a.w + a.k : a.w;
        if (check == check) return;
        a = before;
        add(Taken<kHoles>{});
    }
}

// Calls inner(first) and edge(first) for this warp's tiles of x, in order; inner for those that x (and z, of the same
// length) hold as whole vectors of memory.
template <class Team, class T, int kSpan, bool kBoth, class Rows, class Inner, class Edge>
__device__ inline void for_tiles(const Rows& x, const Rows& z, const Inner& inner, const Edge& edge) {
    const int step = Team::threads() / 32 * kSpan, vectors = vectors_of<T>(x.length);
    int first = Team::thread() / 32 * kSpan, end = x.end();
    bool at_edge = x.cut_at_start();
    if constexpr (kBoth) end = min(end, z.end()), at_edge = at_edge || z.cut_at_start();
    at_edge = at_edge && first == 0;
    for (; first < vectors; first += step) {
        if (!at_edge) {
            for (; first + kSpan <= end; first += step) inner(first);
            if (first >= vectors) break;
        }
        edge(first);
        at_edge = false;
    }
}

// The sums of a thread over its tiles of a row. `Rows` is a Source or a Staged. `kPolynomial`: where the logits are
// only read, and the special-function unit would be the next to run out.
template <class Team, class T, bool kCap, Mode kMode, bool kPolynomial, class Rows>
__device__ inline ThreadSums thread_sums(const Rows& x, const Rows& z, const Prepare& k) {
    constexpr int kCount = kTile<kMode>;
    constexpr bool kReads = kMode == kReference;
    constexpr bool kPaddingShows = kCap || kMode != kPlain;  // a plain sum takes -inf for what it is
    const int lane = threadIdx.x % 32;
    FloatSums start = no_sums();
    if (kCap && kMode == kPlain && k.centred) start.shift = 0;
    ThreadSums a(start, k);
    const auto inner = [&](int first) {
        Pack v[kCount], y[kCount];
        x.load(v, first);
        if constexpr (kReads) z.load(y, first);
        add_tile<T, kCap, kMode, false, kPolynomial>(a, v, y, (first + lane) * kWidth<T>, x.length, k);
    };
    const auto edge = [&](int first) {
        Pack v[kCount], y[kCount];
        x.load_edge(v, first);
        if constexpr (kReads) z.load_edge(y, first);
        add_tile<T, kCap, kMode, kPaddingShows, kPolynomial>(a, v, y, (first + lane) * kWidth<T>, x.length, k);
    };
    for_tiles<Team, T, 32 * kCount, kReads>(x, z, inner, edge);
    return a;
}

template <class T>
__device__ inline Source<T> row_of(const void* p, const RowLayout& layout, int64_t row, int64_t vocab) {
    return {static_cast<const T*>(p) + layout.offset(row), static_cast<int>(vocab)};
}

template <class T, Mode kMode>
__device__ inline Source<T> reference_of(const TokenArgs& a, int64_t row) {
    if constexpr (kMode == kReference) return row_of<T>(a.ref_logits, a.ref_layout, row, a.vocab);
    else return {nullptr, 0};
}

// ------------------------------------------------------------------------------------------------- merging
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
}

__device__ inline float warp_add(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
}

// Every lane gets the sum over the warp, to the same bits.
template <Mode kMode>
__device__ inline FloatSums warp_sums(FloatSums a, float scale) {
    const float shift = warp_max(a.shift), ref_shift = kMode == kReference ? warp_max(a.ref_shift) : a.ref_shift;
    const auto move = [&](float from, float to) {
        return from == to ? 0 : exponent_move(exponent(from, scale), exponent(to, scale));
    };
    move_sums<kMode != kPlain, kMode == kReference, kMode == kDiagnostics>(a, shift, ref_shift, move(a.shift, shift),
                                                                           move(a.ref_shift, ref_shift));
    a.s = warp_add(a.s);
    if constexpr (kMode != kPlain) a.w = warp_add(a.w), a.total = warp_add(a.total);
    if constexpr (kMode == kReference) a.k = warp_add(a.k), a.t = warp_add(a.t);
    if constexpr (kMode == kDiagnostics) a.squares = warp_add(a.squares);
    return a;
}

// A lane's sums of a row that is one tile of its warp, relative to the row's maximum; for modes without a reference.
template <class T, bool kCap, Mode kMode>
__device__ inline FloatSums tile_sums(const Pack (&v)[kTile<kMode>], int length, const Prepare& k) {
    FloatSums start = no_sums();
    start.shift = fmaxf(start.shift, warp_max(capped<kCap>(maximum<T>(v), k)));
    ThreadSums a(start, k);
    const int at = static_cast<int>(threadIdx.x % 32) * kWidth<T>;
    add_exps<T, kCap, kMode, kCap || kMode != kPlain ? kEdge : kHoles, false>(a, v, v, at, length, k);
    return a;
}

// The sum over the warp of sums relative to one shift.
template <Mode kMode>
__device__ inline FloatSums add_lanes(FloatSums a) {
    a.s = warp_add(a.s);
    if constexpr (kMode != kPlain) a.w = warp_add(a.w), a.total = warp_add(a.total);
    return a;
}

// Leaves what a mode has of the sums in shared memory.
template <Mode kMode>
__device__ inline void keep_sums(FloatSums& to, const FloatSums& a) {
    to.shift = a.shift, to.s = a.s;
    if constexpr (kMode != kPlain) to.w = a.w, to.total = a.total;
    if constexpr (kMode == kReference) to.k = a.k, to.ref_shift = a.ref_shift, to.t = a.t;
    if constexpr (kMode == kDiagnostics) to.squares = a.squares;
}

template <Mode kMode>
__device__ inline FloatSums kept_sums(const FloatSums& from) {
    FloatSums a = no_sums();
    keep_sums<kMode>(a, from);
    return a;
}

// The first warp's lanes get the sum over the block. `parts` is shared, one place per warp.
template <Mode kMode>
__device__ inline FloatSums block_sums(FloatSums a, SharedSums* parts, float scale) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    a = warp_sums<kMode>(a, scale);
    if (warps == 1) return a;
    if (lane == 0) keep_sums<kMode>(parts[warp], a);
    __syncthreads();  // every warp's part is written before the first warp reads them
    if (warp == 0) a = warp_sums<kMode>(lane < warps ? kept_sums<kMode>(parts[lane]) : no_sums(), scale);
    return a;
}

// The statistics of a valid row from the sums over all of it. `logit` is the target's, as it lies in memory.
template <bool kCap, Mode kMode, class Args>
__device__ inline Stats row_stats(const Args& a, const FloatSums& s, float logit, const Prepare& k) {
    const ExactShift exact = k.exact();
    const Sums sums{exact(s.shift), s.s, s.w, s.k, exact(s.ref_shift), s.t, s.total, s.squares};
    return finish(sums, capped<kCap>(logit, k), a.temperature, a.inv_temperature, static_cast<double>(a.vocab), kMode);
}

// The same, with the target's logit from memory.
template <class T, bool kCap, Mode kMode, class Args>
__device__ inline Stats stats_of(const Args& a, int64_t row, int64_t label, const FloatSums& s, const Prepare& k) {
    const float logit = row_of<T>(a.logits, a.layout, row, a.vocab).at(static_cast<int>(label));
    return row_stats<kCap, kMode>(a, s, logit, k);
}

// ------------------------------------------------------------------------------------------------- sure rows
// This thread's share of the sum of a row's exps, relative to the target's prepared logit, but for the target's own;
// `label` may lie outside x. `mine` are the thread's sums. The target is in those of one thread alone, whose elements
// are summed again, from a cache, by its warp.
template <class Team, class T, bool kCap, Mode kMode, class Rows>
__device__ inline float thread_others(const FloatSums& mine, const Rows& x, int label, float logit, const Prepare& k) {
    constexpr int kCount = kTile<kMode>, kSpan = 32 * kCount;
    const float up = exponent(mine.shift, k.scale).of(logit);  // of the target, relative to `mine`
    float s = mine.s * power_of_two(-up);
    const int warp = Team::thread() / 32, warps = Team::threads() / 32, lane = threadIdx.x % 32;
    const int vector = label / kWidth<T>;
    if (label < 0 || label >= x.length || vector / kSpan % warps != warp) return s;
    if (vector % 32 == lane) s = 0;
    for (int j = lane;; j += 32) {
        const int tile = warp + j / kCount * warps;
        const int first = (tile * kSpan + j % kCount * 32 + vector % 32) * kWidth<T>;
        if (first >= x.length) break;
#pragma unroll 1
        for (int i = first; i < x.length && i < first + kWidth<T>; ++i) {
            const float power = power_of_two((capped<kCap>(x.at(i), k) - logit) * k.scale);
            s += i == label ? 0 : power;
        }
    }
    return s;
}

// The first warp's lanes get the sum over the team. `parts` is shared, one place per warp.
template <class Team>
__device__ inline float team_add(float x, SharedSums* parts) {
    const int warp = Team::thread() / 32, lane = threadIdx.x % 32, warps = Team::threads() / 32;
    x = warp_add(x);
    if (warps == 1) return x;
    if (lane == 0) parts[warp].s = x;
    __syncthreads();  // every warp's part is written before the first warp reads them
    if (warp == 0) x = warp_add(lane < warps ? parts[lane].s : 0);
    return x;
}

// Writes what a sure row has otherwise than from its sums. Called by the whole team.
template <class Team, class T, bool kCap, Mode kMode>
__device__ inline void finish_sure(const ForwardArgs& a, int64_t row, const FloatSums& mine, const Source<T>& x,
                                   SharedSums* parts, const Prepare& k) {
    const int label = static_cast<int>(a.label(row));
    const float logit = capped<kCap>(x.at(label), k);
    const float others = team_add<Team>(thread_others<Team, T, kCap, kMode>(mine, x, label, logit, k), parts);
    if (Team::thread() != 0) return;
    Stats o;
    make_sure(o, logit, others, a.inv_temperature);
    write_sure(a.out, a.saved, row, o);
}

// What a label asks for. One that is neither a row's element nor ignored cannot be reported from here without stopping
// the host: its statistics and gradient are NaN, and nothing outside the row is read.
enum class Row { kValid, kIgnored, kBad };

template <class Args>
__device__ inline Row row_kind(const Args& a, int64_t label) {
    if (label == a.ignore_index) return Row::kIgnored;
    return label >= 0 && label < a.vocab ? Row::kValid : Row::kBad;
}

__device__ inline Stats empty_stats(Row kind) {
    const float x = kind == Row::kBad ? NAN : 0.0f;
    return {x, x, x, x, x, x, x, x, x};
}

}  // namespace fastalign::cuda
