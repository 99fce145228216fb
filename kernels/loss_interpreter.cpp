#include "loss_interpreter.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "parallel.h"

namespace fastalign {

namespace {

constexpr int kBlock = 64;       // tokens that a step is run on at a time: the switch is paid once a block
constexpr int64_t kRun = 512;    // tokens of a unit of work, where sequences do not matter
constexpr int64_t kShare = 512;  // tokens below which threads cost more than they bring

}  // namespace

// -------------------------------------------------------------------------------------------------------- running
class LossRun {
  public:
    LossRun(const LossProgram& p, const LossData& d) : p_(p), d_(d), length_(d.sequences ? d.tokens / d.sequences : 0) {
        int64_t size = 0;
        at_.assign(p.steps_.size(), 0);
        for (std::size_t i = 0; i < p.steps_.size(); ++i)
            if (p.steps_[i].level != Level::kToken) at_[i] = size, size += d.count(p.steps_[i].level);
        values_.reset(new double[size + 1]), gradients_.reset(new double[size + 1]());
    }

    void run() {
        for (std::size_t s = 0; s < p_.passes_.size(); ++s) {
            for (const int i : p_.passes_[s].before) small_forward(i);
            if (!p_.passes_[s].sums.empty()) pass_forward(p_.passes_[s]);
        }
        for (std::size_t k = 0; k < d_.outputs.size(); ++k) write(p_.outputs_[k], d_.outputs[k]);
        if (!p_.wanted_[p_.loss_] || !wants_slopes()) return;
        *gradient(p_.loss_) = 1;
        for (int s = static_cast<int>(p_.passes_.size()) - 1; s >= 0; --s) {
            if (!p_.passes_[s].loss_sums.empty()) pass_backward(p_.passes_[s]);
            const auto& before = p_.passes_[s].before;
            for (auto i = before.rbegin(); i != before.rend(); ++i)
                if (p_.wanted_[*i]) small_backward(*i);
        }
    }

  private:
    // ---------------------------------------------------------------------------------- where things are
    double* value(int i) { return values_.get() + at_[i]; }
    double* gradient(int i) { return gradients_.get() + at_[i]; }
    const LossStep& step(int i) const { return p_.steps_[i]; }

    bool wants_slopes() const {
        for (int k = 0; k < LossProgram::kStatistics; ++k)
            if (d_.slopes[k]) return true;
        return false;
    }

    void write(int i, float* to) {
        const int64_t n = d_.count(step(i).level);
        for (int64_t e = 0; e < n; ++e) to[e] = static_cast<float>(value(i)[e]);
    }

    int64_t group_of(int64_t sequence) const { return p_.lists_ ? sequence / d_.list_size : sequence % d_.groups; }

    // The element of level `from` to which element e of level `to` belongs.
    int64_t owner(int64_t e, Level to, Level from, Way how) const {
        if (from == to) return e;
        if (from == Level::kBatch) return 0;
        int64_t sequence = e;
        if (to == Level::kComparison) {
            const int64_t k = d_.list_size, b = e / (k * k);
            if (from == Level::kGroup) return b;
            return b * k + (how == Way::kOther ? e % k : e / k % k);
        }
        if (to == Level::kToken) sequence = e / length_;
        return from == Level::kSequence ? sequence : group_of(sequence);
    }

    // ---------------------------------------------------------------------------------- steps of other levels
    void small_forward(int i) {
        const LossStep& s = step(i);
        const int64_t n = d_.count(s.level);
        double* y = value(i);
        const int a = s.operands[0];
        if (s.op == Op::kInput) {
            const int input = static_cast<int>(s.value);
            const bool place = p_.kinds_[input] == LossProgram::kPosition;
            for (int64_t e = 0; e < n; ++e) y[e] = place ? static_cast<double>(e % d_.list_size) : d_.inputs[input][e];
        } else if (s.op == Op::kConst) {
            std::fill(y, y + n, s.value);
        } else if (s.op == Op::kSpread) {
            for (int64_t e = 0; e < n; ++e) y[e] = value(a)[owner(e, s.level, step(a).level, s.how)];
        } else if (s.op == Op::kPick) {
            const int64_t side = static_cast<int64_t>(s.how) * n;
            for (int64_t e = 0; e < n; ++e) y[e] = value(a)[e + side];
        } else if (reduces(s.op)) {
            reduce_small(i);
        } else {
            const double *x = value(a), *b = value(s.operands[1]), *c = value(s.operands[2]);
            with_operation(s.op, [&](auto op) {
                for (int64_t e = 0; e < n; ++e) y[e] = value_of<decltype(op)::value>(x[e], b[e], c[e]);
            });
        }
    }

    // Where element e of the operand of a reduction goes.
    int64_t reduced_to(int64_t e, Level from, Level to, Way how) const {
        if (from != Level::kComparison) return owner(e, from, to, Way::kOwner);
        return owner(e, from, to, how == Way::kOther ? Way::kOther : Way::kCompared);
    }

    void reduce_small(int i) {
        const LossStep& s = step(i);
        const int a = s.operands[0];
        const Level from = step(a).level;
        const int64_t n = d_.count(from), out = d_.count(s.level);
        double *y = value(i), *x = value(a);
        if (s.op == Op::kSum) {
            std::fill(y, y + out, 0.0);
            for (int64_t e = 0; e < n; ++e) y[reduced_to(e, from, s.level, s.how)] += x[e];
            return;
        }
        std::fill(y, y + out, -INFINITY);
        for (int64_t e = 0; e < n; ++e) {
            double& most = y[reduced_to(e, from, s.level, s.how)];
            most = value_of<Op::kMaximum>(x[e], most, 0.0);
        }
        if (s.op == Op::kMax) return;
        std::vector<double> sums(out, 0.0);
        for (int64_t e = 0; e < n; ++e) {
            const int64_t o = reduced_to(e, from, s.level, s.how);
            sums[o] += x[e] == y[o] ? 1.0 : std::exp(x[e] - y[o]);
        }
        for (int64_t o = 0; o < out; ++o)
            if (std::isfinite(y[o])) y[o] += std::log(sums[o]);
    }

    void small_backward(int i) {
        const LossStep& s = step(i);
        const int64_t n = d_.count(s.level);
        const double* g = gradient(i);
        const int a = s.operands[0];
        if (s.op == Op::kInput || s.op == Op::kConst) return;
        if (s.op == Op::kSpread) {
            for (int64_t e = 0; e < n; ++e) gradient(a)[owner(e, s.level, step(a).level, s.how)] += g[e];
        } else if (s.op == Op::kPick) {
            const int64_t side = static_cast<int64_t>(s.how) * n;
            for (int64_t e = 0; e < n; ++e) gradient(a)[e + side] += g[e];
        } else if (reduces(s.op)) {
            pull_reduced(i);
        } else {
            pull(
                s, value(i), g, n, [&](int o) { return value(o); },
                [&](int o) { return p_.wanted_[o] ? gradient(o) : nullptr; });
        }
    }

    void pull_reduced(int i) {
        const LossStep& s = step(i);
        const int a = s.operands[0];
        const Level from = step(a).level;
        const int64_t n = d_.count(from);
        const double *y = value(i), *x = value(a), *g = gradient(i);
        double* to = gradient(a);
        std::vector<double> equal;  // how many share a maximum
        if (s.op == Op::kMax) {
            equal.assign(d_.count(s.level), 0.0);
            for (int64_t e = 0; e < n; ++e) {
                const int64_t o = reduced_to(e, from, s.level, s.how);
                equal[o] += x[e] == y[o];
            }
        }
        for (int64_t e = 0; e < n; ++e) {
            const int64_t o = reduced_to(e, from, s.level, s.how);
            if (g[o] == 0) continue;
            if (s.op == Op::kSum) to[e] += g[o];
            else if (s.op == Op::kMax) to[e] += x[e] == y[o] ? g[o] / equal[o] : 0;
            else if (x[e] != -INFINITY) to[e] += g[o] * std::exp(x[e] - y[o]);
        }
    }

    // Adds to the gradients of a step's operands; `to` may be null for one that needs none.
    template <class Values, class Gradients>
    static void pull(const LossStep& s, const double* y, const double* g, int64_t n, const Values& values,
                     const Gradients& to) {
        const double *a = values(s.operands[0]), *b = values(s.operands[1]), *c = values(s.operands[2]);
        double *ga = to(s.operands[0]), *gb = to(s.operands[1]), *gc = to(s.operands[2]);
        with_operation(s.op, [&](auto op) {
            constexpr Op kOp = decltype(op)::value;
            for (int64_t e = 0; e < n; ++e) {
                const Pulled<double> d = g[e] == 0 ? Pulled<double>{} : pulled_by<kOp>(g[e], a[e], b[e], c[e], y[e]);
                if (ga) ga[e] += d.a;
                if (gb) gb[e] += d.b;
                if (gc) gc[e] += d.c;
            }
        });
    }

    // ---------------------------------------------------------------------------------- passes over the tokens
    int64_t units(const LossProgram::Pass& pass) const {
        return pass.by_sequences ? d_.sequences : (d_.tokens + kRun - 1) / kRun;
    }
    // Tokens [first, second) of a unit.
    std::pair<int64_t, int64_t> unit(const LossProgram::Pass& pass, int64_t u) const {
        if (pass.by_sequences) return {u * length_, (u + 1) * length_};
        return {u * kRun, std::min(d_.tokens, (u + 1) * kRun)};
    }
    int threads() const { return d_.tokens <= kShare ? 1 : d_.threads; }

    // The steps of a block of m tokens from `begin` on.
    void block_forward(const std::vector<int>& steps, int64_t begin, int m, double* y) const {
        for (const int i : steps) {
            const LossStep& s = step(i);
            double* out = y + p_.slots_[i] * kBlock;
            if (s.op == Op::kInput) {
                load(static_cast<int>(s.value), begin, m, out);
            } else if (s.op == Op::kConst) {
                std::fill(out, out + m, s.value);
            } else if (s.op == Op::kSpread) {
                const int a = s.operands[0];
                const double* from = values_.get() + at_[a];
                const Level level = step(a).level;
                if (level == Level::kBatch) std::fill(out, out + m, *from);
                else
                    for (int e = 0; e < m; ++e) out[e] = from[owner(begin + e, Level::kToken, level, s.how)];
            } else {
                const auto slot = [&](int k) { return y + p_.slots_[s.operands[k]] * kBlock; };
                const double *a = slot(0), *b = slot(1), *c = slot(2);
                with_operation(s.op, [&](auto op) {
                    for (int e = 0; e < m; ++e) out[e] = value_of<decltype(op)::value>(a[e], b[e], c[e]);
                });
            }
        }
    }

    void load(int input, int64_t begin, int m, double* out) const {
        const int kind = p_.kinds_[input];
        if (kind >= 0) {
            const float* from = d_.statistics[kind] + begin;
            for (int e = 0; e < m; ++e) out[e] = from[e];
        } else if (kind == LossProgram::kMask) {
            for (int e = 0; e < m; ++e) out[e] = d_.real[begin + e];
        } else {
            const LossNumbers& numbers = d_.inputs[input];
            for (int e = 0; e < m; ++e) out[e] = numbers[begin + e];
        }
    }

    void pass_forward(const LossProgram::Pass& pass) {
        const int64_t parts = units(pass), wide = static_cast<int64_t>(pass.sums.size());
        std::vector<double> sums(parts * wide, 0.0);
        parallel_workers(parts, 1, threads(), [&] {
            return worker(this, [this, &pass, &sums, wide](int64_t u, double* y, double*) {
                const auto [begin, end] = unit(pass, u);
                for (int64_t at = begin; at < end; at += kBlock) {
                    const int m = static_cast<int>(std::min<int64_t>(kBlock, end - at));
                    block_forward(pass.forward, at, m, y);
                    for (int64_t k = 0; k < wide; ++k) {
                        const double* x = y + p_.slots_[step(pass.sums[k]).operands[0]] * kBlock;
                        double& sum = sums[u * wide + k];
                        for (int e = 0; e < m; ++e) sum += d_.real[at + e] ? x[e] : 0;
                    }
                }
            });
        });
        for (int64_t k = 0; k < wide; ++k) {
            const int i = pass.sums[k];
            const Level level = step(i).level;
            double* y = value(i);
            std::fill(y, y + d_.count(level), 0.0);
            for (int64_t u = 0; u < parts; ++u) {
                const int64_t to = level == Level::kBatch ? 0 : level == Level::kSequence ? u : group_of(u);
                y[to] += sums[u * wide + k];
            }
        }
    }

    void pass_backward(const LossProgram::Pass& pass) {
        const int used = pass.alone ? 1 : threads();
        parallel_workers(units(pass), 1, used, [&] {
            return worker(this, [this, &pass](int64_t u, double* y, double* g) {
                const auto [begin, end] = unit(pass, u);
                for (int64_t at = begin; at < end; at += kBlock)
                    block_backward(pass, at, static_cast<int>(std::min<int64_t>(kBlock, end - at)), y, g);
            });
        });
    }

    void block_backward(const LossProgram::Pass& pass, int64_t begin, int m, double* y, double* g) {
        block_forward(pass.backward, begin, m, y);
        const auto slot = [&](double* from, int i) { return from + p_.slots_[i] * kBlock; };
        for (const int i : pass.backward) std::fill_n(slot(g, i), m, 0.0);
        for (const int i : pass.loss_sums) {
            const int a = step(i).operands[0];
            if (!p_.wanted_[a]) continue;
            double* to = slot(g, a);
            const double* from = gradient(i);
            const Level level = step(i).level;
            for (int e = 0; e < m; ++e)
                if (d_.real[begin + e]) to[e] += from[owner(begin + e, Level::kToken, level, Way::kOwner)];
        }
        for (auto i = pass.backward.rbegin(); i != pass.backward.rend(); ++i)
            if (p_.wanted_[*i]) token_backward(*i, begin, m, y, g);
    }

    void token_backward(int i, int64_t begin, int m, double* y, double* g) {
        const LossStep& s = step(i);
        const auto slot = [&](double* from, int k) { return from + p_.slots_[k] * kBlock; };
        const double* own = slot(g, i);
        if (s.op == Op::kConst) return;
        if (s.op == Op::kInput) {
            float* to = d_.slopes[p_.kinds_[static_cast<int>(s.value)]] + begin;
            for (int e = 0; e < m; ++e)
                if (d_.real[begin + e]) to[e] = static_cast<float>(to[e] + own[e]);
        } else if (s.op == Op::kSpread) {
            const int a = s.operands[0];
            for (int e = 0; e < m; ++e)
                if (d_.real[begin + e]) gradient(a)[owner(begin + e, Level::kToken, step(a).level, s.how)] += own[e];
        } else {
            pull(
                s, slot(y, i), own, m, [&](int o) { return slot(y, o); },
                [&](int o) { return p_.wanted_[o] ? slot(g, o) : nullptr; });
        }
    }

    // A thread's own memory around a unit of work.
    template <class Work>
    struct WorkerOf {
        LossRun* run;
        Work work;
        std::unique_ptr<double[]> y, g;

        WorkerOf(LossRun* r, Work w)
            : run(r),
              work(std::move(w)),
              y(new double[r->p_.token_steps_ * kBlock + 1]),
              g(new double[r->p_.token_steps_ * kBlock + 1]) {}
        void operator()(int64_t u) { work(u, y.get(), g.get()); }
        void finish() {}
    };
    template <class Work>
    static WorkerOf<Work> worker(LossRun* run, Work work) {
        return {run, std::move(work)};
    }

    const LossProgram& p_;
    const LossData& d_;
    int64_t length_;
    std::vector<int64_t> at_;
    std::unique_ptr<double[]> values_, gradients_;
};

void run_loss(const LossProgram& program, const LossData& data) { LossRun(program, data).run(); }

}  // namespace fastalign
