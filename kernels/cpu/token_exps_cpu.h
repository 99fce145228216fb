// One launch of a plain objective with one exponential an element: the forward's exps 2^u are kept, and a row's
// gradient is a multiple of them. Where they are kept decides how much of a core's cache a row takes, and so the speed.
// Included after token_gradient_cpu.h.
#pragma once
#include <type_traits>
#include <vector>

#include "fresh_pages.h"
#include "token_gradient_cpu.h"

namespace fastalign::FA_ISA {
namespace {

// They are kept, in the order of the loads, padded to whole units.
struct Keep {
    float* to;
    void operator()(int64_t at, Vec e, Vec f) const { store2<false>(to + at, e, f); }
    void tail(int64_t at, int64_t, Vec e, Vec f) const { (*this)(at, e, f); }
    Keep again() const { return *this; }
};

// They are kept in place of another row's, whose gradient is written as its exps leave: a multiple of them.
template <class T, bool kStream>
struct Exchange {
    float* keep;
    T* out;
    Vec a, kappa;
    void operator()(int64_t at, Vec e, Vec f) const {
        Vec p, q;
        load2(keep + at, p, q);
        store2<false>(keep + at, e, f);
        store2<kStream>(out + at, fma(p, a, kappa), fma(q, a, kappa));
    }
    void tail(int64_t at, int64_t n, Vec e, Vec f) const {
        T unit[kUnit];
        const Exchange<T, false> last{keep + at, unit, a, kappa};
        last(0, e, f);
        std::memcpy(out + at, unit, n * sizeof(T));
    }
    Keep again() const { return {keep}; }
};

// What both ways of keeping them share.
template <class T, class CoefficientsOf>
struct ExpsWorker {
    const ObjectiveArgs& a;
    const CoefficientsOf& coefficients_of;
    const Prepare& k;
    double scale = kLog2e / a.temperature;

    T* gradient_of(int64_t row) const { return static_cast<T*>(a.out_gradient) + a.out_layout.offset(row); }
    void no_gradient_of(int64_t row) const {
        std::memset(static_cast<void*>(gradient_of(row)), 0, a.vocab * sizeof(T));
    }

    // True where the row is ignored and done with.
    bool ignored(int64_t row) const {
        if (a.label(row) != a.ignore_index) return false;
        coefficients_of(row, Stats{});
        no_gradient_of(row);
        return true;
    }

    // From exps relative to `shift` to the gradient, whose coefficients are relative to the row's own.
    Vec factor(const Coefficients& c, double shift) const {
        return set1(static_cast<float>(c.a * std::exp2((shift - c.shift) * scale)));
    }
};

// 16-bit rows: their exps in float32 lie apart. A thread has two rows in hand: while one's logits come from memory
// and are summed, its exps take the place of the row before, whose gradient leaves for memory. So neither the
// arithmetic nor the memory waits for the other.
template <class T, class CoefficientsOf>
class ExpsApart : ExpsWorker<T, CoefficientsOf> {
    using Base = ExpsWorker<T, CoefficientsOf>;
    using Base::a, Base::k;

  public:
    ExpsApart(const ObjectiveArgs& args, const CoefficientsOf& coefficients_of, const Prepare& prepare)
        : Base{args, coefficients_of, prepare},
          shifts_((args.vocab + kChunk - 1) / kChunk),
          exps_(buffer(args.vocab + kUnit)) {}

    void operator()(int64_t row) {
        if (this->ignored(row)) return;
        const Row<T, false, kPlain> r(a, row, k);
        Parted sums = exchange(r, 0);
        for (size_t p = 1; p < shifts_.size(); ++p) sums.add(exchange(r, p), this->scale);
        close();
        const Coefficients c = this->coefficients_of(row, r.finish(a, sums, k));
        if (no_gradient(c)) return this->no_gradient_of(row);
        T* out = this->gradient_of(row);
        const bool past = a.fresh && a.fresh->before(out, a.vocab * sizeof(T));
        const bool long_enough = a.vocab * static_cast<int64_t>(sizeof(T)) >= kStreamed;
        const bool stream = past && long_enough && reinterpret_cast<uintptr_t>(out) % kStreamAlign == 0;
        before_ = {out, c, r.label, label_gradient<T, false, kPlain>(r.x, nullptr, r.label, c, k), stream};
    }

    void finish() {
        for (size_t p = 0; before_.out && p < shifts_.size(); ++p) {
            const int64_t n = std::min(kChunk, a.vocab - static_cast<int64_t>(p) * kChunk);
            if (before_.stream) drain(leaving<true>(p), n);
            else drain(leaving<false>(p), n);
        }
        close();
    }

  private:
    // The row whose exps are kept, if any.
    struct Before {
        T* out = nullptr;
        Coefficients c{};
        int64_t label = 0;
        float at_label = 0;
        bool stream = false;
    };

    static float* buffer(int64_t size) {
        static thread_local std::vector<float> exps;  // kept from call to call: fresh pages cost more than the work
        if (static_cast<int64_t>(exps.size()) < size) exps.resize(size);
        return exps.data();
    }

    Parted exchange(const Row<T, false, kPlain>& r, size_t p) {
        const Parted o = !before_.out     ? r.chunk(p, k, Keep{exps_ + p * kChunk})
                         : before_.stream ? r.chunk(p, k, leaving<true>(p))
                                          : r.chunk(p, k, leaving<false>(p));
        shifts_[p] = o.others.shift;
        return o;
    }

    template <bool kStream>
    Exchange<T, kStream> leaving(size_t p) const {
        return {exps_ + p * kChunk, before_.out + p * kChunk, this->factor(before_.c, shifts_[p]),
                set1(before_.c.kappa)};
    }

    template <bool kStream>
    static void drain(const Exchange<T, kStream>& chunk, int64_t n) {
        int64_t i = 0;
        for (; i + kUnit <= n; i += kUnit) chunk(i, set1(0), set1(0));
        if (i < n) chunk.tail(i, n - i, set1(0), set1(0));
    }

    void close() {
        if (!before_.out) return;
        if (before_.stream) stream_fence();
        from_float(before_.at_label, before_.out[before_.label]);
        before_ = {};
    }

    std::vector<double> shifts_;
    float* exps_;
    Before before_;
};

// float32 rows in place: the exps overwrite the logits, so that nothing but the row itself has to stay in cache. A
// chunk cannot be summed anew with a better shift then, so no power is stored before it is known to be small enough;
// where one is not, the rest of the chunk takes another shift.
template <class CoefficientsOf>
class ExpsInPlace : ExpsWorker<float, CoefficientsOf> {
    using Base = ExpsWorker<float, CoefficientsOf>;
    using Base::a, Base::k;

    static constexpr float kHeadroom = 32;  // of a power, in bits, as in kLimit[kPlain]
    static constexpr int64_t kStep = 2 * kUnit;

  public:
    ExpsInPlace(const ObjectiveArgs& args, const CoefficientsOf& coefficients_of, const Prepare& prepare)
        : Base{args, coefficients_of, prepare} {}

    void operator()(int64_t row) {
        if (this->ignored(row)) return;
        const Row<float, false, kPlain> r(a, row, k);
        float* out = this->gradient_of(row);
        const Segment own(r.label, a.vocab);
        const float at_label = r.x[r.label];
        const Parted sums = overwrite(r, own, out);
        const auto neighbours = [&](float logit) {
            out[r.label] = 0;
            return sum_exps(out, own, logit);
        };
        const Coefficients c = this->coefficients_of(row, r.finish(a, at_label, sums, k, neighbours));
        if (no_gradient(c)) return this->no_gradient_of(row);
        for (size_t s = 0; s < runs_.size(); ++s)
            multiply(out + runs_[s].begin, end_of(s) - runs_[s].begin, this->factor(c, runs_[s].shift), set1(c.kappa));
        out[r.label] = label_gradient<float, false, kPlain>(&at_label, nullptr, 0, c, k);
    }

    void finish() {}

  private:
    // Exps from `begin` on are relative to this shift.
    struct Run {
        int64_t begin;
        double shift;
    };

    int64_t end_of(size_t run) const { return run + 1 < runs_.size() ? runs_[run + 1].begin : a.vocab; }

    Parted overwrite(const Row<float, false, kPlain>& r, const Segment& own, float* out) {
        float shift = r.shift;
        runs_.assign(1, {0, at(shift)});
        Parted total{nothing_at(at(shift), 0), nothing_at(at(shift), 0)};
        for (int64_t begin = 0, end; begin < a.vocab; begin = end) {
            end = std::min(a.vocab, (begin / kChunk + 1) * kChunk);
            if (begin < own.begin) end = std::min(end, own.begin);
            else if (begin < own.end) end = own.end;
            for (int64_t i = begin; i < end;) {
                Accumulators<kPlain> sums;
                const int64_t from = i;
                i += may_fuse(shift, k) ? add<kHasFma>(sums, r.x + i, out + i, end - i, shift)
                                        : add<false>(sums, r.x + i, out + i, end - i, shift);
                if (i > from) {
                    merge(begin == own.begin ? total.segment : total.others, sums.close(at(shift), 0), this->scale);
                }
                if (i == end) break;
                shift = r.finite(maximum<float, false>(r.x + i, end - i, k));
                runs_.push_back({i, at(shift)});
            }
        }
        return total;
    }

    // The sum of a segment's exps relative to the target's logit.
    double sum_exps(const float* exps, const Segment& own, float logit) const {
        double sum = 0;
        for (size_t run = 0; run < runs_.size(); ++run) {
            int64_t i = std::max(runs_[run].begin, own.begin);
            const int64_t end = std::min(end_of(run), own.end);
            if (i >= end) continue;
            Vec s = set1(0), t = set1(0), e, f;
            for (; i + kUnit <= end; i += kUnit) load2(exps + i, e, f), s = s + e, t = t + f;
            double part = reduce_add(s + t);
            for (; i < end; ++i) part += exps[i];
            sum += part * std::exp2((runs_[run].shift - logit) * this->scale);
        }
        return sum;
    }

    // Sums and stores exps until one would be too large; returns how many.
    template <bool kFused>
    int64_t add(Accumulators<kPlain>& sums, const float* x, float* out, int64_t n, float shift) const {
        constexpr int64_t kAhead = 2048 / sizeof(float);
        const Vec pv = set1(kFused ? -shift * first(k.scale) : shift);
        const auto bits = [&](Vec v) { return kFused ? fma(v, k.scale, pv) : (v - pv) * k.scale; };
        Vec s[4] = {sums.lanes[0].s, sums.lanes[1].s, sums.lanes[2].s, sums.lanes[3].s}, u[4];
        int64_t i = 0;
        for (; i + kStep <= n; i += kStep) {
            for (int64_t l = 0; l < kStep; l += 16) prefetch(x + i + kAhead + l);
            load2(x + i, u[0], u[1]);
            load2(x + i + kUnit, u[2], u[3]);
            for (Vec& v : u) v = bits(v);
            if (any_above(max(max(u[0], u[1]), max(u[2], u[3])), kHeadroom)) break;
            for (int h = 0; h < 4; ++h) u[h] = exp2(u[h]), s[h] = s[h] + u[h];
            store2<false>(out + i, u[0], u[1]);
            store2<false>(out + i + kUnit, u[2], u[3]);
        }
        for (int h = 0; h < 4; ++h) sums.lanes[h].s = s[h];
        if (n - i >= kStep || (maximum<float, false>(x + i, n - i, k) - shift) * first(k.scale) > kHeadroom) return i;
        add_range<float, false, kPlain, kFused>(sums, x + i, nullptr, 0, n - i, shift, 0, Overwrite{out + i}, k);
        return n;
    }

    // What lies behind the row's end is not ours.
    struct Overwrite {
        float* to;
        void operator()(int64_t i, Vec e, Vec f) const { store2<false>(to + i, e, f); }
        void tail(int64_t i, int64_t n, Vec e, Vec f) const {
            float unit[kUnit];
            store2<false>(unit, e, f);
            std::memcpy(to + i, unit, n * sizeof(float));
        }
    };

    double at(float shift) const { return may_fuse(shift, k) ? moved<true>(shift, k) : shift; }

    static void multiply(float* out, int64_t n, Vec factor, Vec kappa) {
        Vec e, f;
        int64_t i = 0;
        for (; i + kUnit <= n; i += kUnit) {
            load2(out + i, e, f);
            store2<false>(out + i, fma(e, factor, kappa), fma(f, factor, kappa));
        }
        for (; i < n; ++i) out[i] = first(fma(set1(out[i]), factor, kappa));
    }

    std::vector<Run> runs_;
};

}  // namespace
}  // namespace fastalign::FA_ISA
