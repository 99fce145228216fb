// Matrix products of 16-bit or float32 factors whose sums are float32, in and out: what the platform's own products of
// 16-bit factors round before anybody can add to it. Included per instruction set.
//
// The factors are packed, some hundred steps of the inner dimension at a time, into panels as wide as a tile of
// registers; a tile then takes one vector of b and one number of a per multiplication. Every element of the result is
// summed by one thread in one order, whatever the sizes and the number of threads.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "gemm_args.h"
#include "parallel.h"

namespace fastalign::FA_ISA {
namespace {

constexpr int kTileColumns = 2 * Vec::kWidth;  // of a tile of registers, beside kTileRows
constexpr int kBlockPanels = 8;                // panels of a that a thread packs for itself, into its second cache
constexpr int kColumnPanels = 128;             // of b that are packed at a time: 1 to 6 MB

// One number at a time, in float32.
struct DotFloats {
    using Packed = float;
    static constexpr int kGroup = 1, kDepth = 256;  // numbers of the inner dimension in one step; in one packing

    template <class T>
    static Packed pack(const T* from, int64_t, int64_t) {
        return to_float(*from);
    }
    static void load(const Packed* b, Vec& first, Vec& second) { load2(b, first, second); }
    static Vec same(Packed a) { return set1(a); }
    static Vec dot(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
};

#ifdef __AVX512BF16__
// Two numbers of bfloat16 at a time.
struct DotPairs {
    using Packed = uint32_t;
    static constexpr int kGroup = 2, kDepth = 384;
    struct Two {
        __m512bh v;
    };

    static Packed pack(const BFloat16* from, int64_t step, int64_t left) {
        return from->bits | (left > 1 ? static_cast<uint32_t>(from[step].bits) << 16 : 0);
    }
    static void load(const Packed* b, Two& first, Two& second) {
        first.v = (__m512bh)_mm512_loadu_si512(b), second.v = (__m512bh)_mm512_loadu_si512(b + 16);
    }
    static Two same(Packed a) { return {(__m512bh)_mm512_set1_epi32(static_cast<int>(a))}; }
    static Vec dot(Vec sum, Two a, Two b) { return {_mm512_dpbf16_ps(sum.v, a.v, b.v)}; }
};
template <class A, class B>
using Dot = std::conditional_t<std::is_same_v<A, BFloat16> && std::is_same_v<B, BFloat16>, DotPairs, DotFloats>;
#else
template <class A, class B>
using Dot = DotFloats;
#endif

// `count` lines of `depth` numbers, `across` and `along` apart, as a panel [steps][width]; what is missing is 0.
template <class D, class T>
void pack_panel(const T* from, int64_t across, int64_t along, int64_t count, int width, int64_t depth,
                typename D::Packed* to) {
    const int64_t steps = (depth + D::kGroup - 1) / D::kGroup;
    if (count < width) std::fill(to, to + steps * width, typename D::Packed{});
    const auto put = [&](int64_t i, int64_t s) {
        const int64_t at = s * D::kGroup;
        to[s * width + i] = D::pack(from + i * across + at * along, along, depth - at);
    };
    if (across == 1) {
        for (int64_t s = 0; s < steps; ++s)
            for (int64_t i = 0; i < count; ++i) put(i, s);
    } else {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t s = 0; s < steps; ++s) put(i, s);
    }
}

// A tile of the result from a panel of each factor.
template <class D>
void tile_product(int64_t steps, const typename D::Packed* a, const typename D::Packed* b, float* out, int64_t out_row,
                  bool add) {
    Vec sums[kTileRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) sums[r][0] = sums[r][1] = set1(0);
    for (int64_t s = 0; s < steps; ++s, a += kTileRows, b += kTileColumns) {
        decltype(D::same(*a)) first, second;
        D::load(b, first, second);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
            const auto one = D::same(a[r]);
            sums[r][0] = D::dot(sums[r][0], one, first), sums[r][1] = D::dot(sums[r][1], one, second);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r, out += out_row) {
        if (add) {
            Vec first, second;
            load2(out, first, second);
            sums[r][0] = first + sums[r][0], sums[r][1] = second + sums[r][1];
        }
        store2<false>(out, sums[r][0], sums[r][1]);
    }
}

// The same where the result ends within the tile.
template <class D>
void edge_product(int64_t steps, const typename D::Packed* a, const typename D::Packed* b, float* out, int64_t out_row,
                  bool add, int64_t rows, int64_t columns) {
    float whole[kTileRows * kTileColumns];
    tile_product<D>(steps, a, b, whole, kTileColumns, false);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            float& to = out[r * out_row + c];
            to = add ? to + whole[r * kTileColumns + c] : whole[r * kTileColumns + c];
        }
}

template <class A, class B>
class Gemm {
  public:
    using D = Dot<A, B>;
    using Packed = typename D::Packed;
    static constexpr int64_t kSteps = D::kDepth / D::kGroup, kPanel = kTileColumns * kSteps;
    static constexpr int64_t kBlockRows = kTileRows * kBlockPanels, kBlockColumns = kTileColumns * kColumnPanels;

    explicit Gemm(const GemmArgs& g)
        : g_(g),
          blocks_((g.m + kBlockRows - 1) / kBlockRows),
          b_(new Packed[(std::min(g.n, kBlockColumns) + kTileColumns - 1) / kTileColumns * kPanel]) {}

    void run() {
        for (first_ = 0; first_ < g_.n; first_ += kBlockColumns) {
            columns_ = std::min(kBlockColumns, g_.n - first_), panels_ = (columns_ + kTileColumns - 1) / kTileColumns;
            // Few rows: threads share the columns of a block, which each of them packs for itself.
            cuts_ = blocks_ < 2 * g_.threads ? std::min(panels_, 2 * g_.threads / blocks_) : 1;
            for (int64_t from = 0; from < g_.k; from += D::kDepth) {
                const int64_t depth = std::min<int64_t>(D::kDepth, g_.k - from);
                parallel_for(panels_, 4, g_.threads, [&](int64_t p) { pack_columns(p, from, depth); });
                parallel_workers(blocks_ * cuts_, 1, g_.threads, [&] { return Worker{this, from, depth, {}}; });
            }
        }
    }

  private:
    struct Worker {
        Gemm* gemm;
        int64_t from, depth;
        std::unique_ptr<Packed[]> a;

        void operator()(int64_t task) {
            if (!a) a.reset(new Packed[kBlockRows * kSteps]);
            gemm->block(task / gemm->cuts_, task % gemm->cuts_, from, depth, a.get());
        }
        void finish() {}
    };

    void pack_columns(int64_t p, int64_t from, int64_t depth) {
        const int64_t at = first_ + p * kTileColumns, count = std::min<int64_t>(kTileColumns, g_.n - at);
        const B* b = static_cast<const B*>(g_.b.at) + from * g_.b.row + at * g_.b.column;
        pack_panel<D>(b, g_.b.column, g_.b.row, count, kTileColumns, depth, b_.get() + p * kPanel);
    }

    void block(int64_t at, int64_t cut, int64_t from, int64_t depth, Packed* a) const {
        const int64_t first = at * kBlockRows, rows = std::min(kBlockRows, g_.m - first);
        const int64_t steps = (depth + D::kGroup - 1) / D::kGroup;
        for (int64_t r = 0; r < rows; r += kTileRows) {
            const A* x = static_cast<const A*>(g_.a.at) + (first + r) * g_.a.row + from * g_.a.column;
            const int64_t count = std::min<int64_t>(kTileRows, rows - r);
            pack_panel<D>(x, g_.a.row, g_.a.column, count, kTileRows, depth, a + r * kSteps);
        }
        const bool add = g_.add || from > 0;
        for (int64_t p = panels_ * cut / cuts_; p < panels_ * (cut + 1) / cuts_; ++p) {
            const int64_t columns = std::min<int64_t>(kTileColumns, columns_ - p * kTileColumns);
            const Packed* b = b_.get() + p * kPanel;
            for (int64_t r = 0; r < rows; r += kTileRows) {
                float* out = g_.out + (first + r) * g_.out_row + first_ + p * kTileColumns;
                const int64_t count = std::min<int64_t>(kTileRows, rows - r);
                if (count == kTileRows && columns == kTileColumns)
                    tile_product<D>(steps, a + r * kSteps, b, out, g_.out_row, add);
                else edge_product<D>(steps, a + r * kSteps, b, out, g_.out_row, add, count, columns);
            }
        }
    }

    const GemmArgs& g_;
    int64_t blocks_, panels_ = 0, cuts_ = 1, first_ = 0, columns_ = 0;
    std::unique_ptr<Packed[]> b_;
};

template <class A>
void gemm_of(const GemmArgs& g) {
    if (g.b.dtype == DType::kBFloat16) return Gemm<A, BFloat16>(g).run();
#ifndef FA_BASE_ISA  // whose products these are, see token_stats_cpu.cpp
    if (g.b.dtype == DType::kFloat32) return Gemm<A, float>(g).run();
    Gemm<A, Half>(g).run();
#endif
}

void gemm(const GemmArgs& g) {
    if (g.m == 0 || g.n == 0) return;
    if (g.k == 0) {
        for (int64_t r = 0; r < g.m && !g.add; ++r) std::fill_n(g.out + r * g.out_row, g.n, 0.0f);
        return;
    }
    if (g.a.dtype == DType::kBFloat16) return gemm_of<BFloat16>(g);
#ifndef FA_BASE_ISA
    if (g.a.dtype == DType::kFloat32) return gemm_of<float>(g);
    gemm_of<Half>(g);
#endif
}

}  // namespace
}  // namespace fastalign::FA_ISA
