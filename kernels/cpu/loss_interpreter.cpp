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
        memory_.reset(new double[2 * size + 1]);
        values_ = memory_.get(), gradients_ = values_ + size;
        std::fill(gradients_, gradients_ + size, 0.0);
    }

    void run() {
        for (std::size_t s = 0; s < p_.passes_.size(); ++s) {
            for (const int i : p_.passes_[s].before) small_forward(i);
            if (!p_.passes_[s].sums.empty()) pass_forward(p_.passes_[s]);
        }
        for (std::size_t k = 0; k < d_.outputs.size(); ++k) write(p_.outputs_[k], d_.outputs[k]);
        if (!p_.wanted_[p_.loss_] || !wants_slopes()) return;
        // A loss for each sequence has its own tokens' derivatives: what reaches it is multiplied in by the caller.
        std::fill_n(gradient(p_.loss_), d_.count(step(p_.loss_).level), 1.0);
        for (int s = static_cast<int>(p_.passes_.size()) - 1; s >= 0; --s) {
            if (!p_.passes_[s].loss_sums.empty()) pass_backward(p_.passes_[s]);
            const auto& before = p_.passes_[s].before;
            for (auto i = before.rbegin(); i != before.rend(); ++i)
                if (p_.wanted_[*i]) small_backward(*i);
        }
    }

  private:
    // ---------------------------------------------------------------------------------- where things are
    double* value(int i) { return values_ + at_[i]; }
    double* gradient(int i) { return gradients_ + at_[i]; }
    const LossStep& step(int i) const { return p_.steps_[i]; }

    bool wants_slopes() const {
        for (int k = 0; k < LossProgram::kStatistics; ++k)
            if (d_.derivatives[k]) return true;
        return false;
    }

    template <class T>
    void copy(int i, void* to) {
        const int64_t n = d_.count(step(i).level);
        for (int64_t e = 0; e < n; ++e) static_cast<T*>(to)[e] = static_cast<T>(value(i)[e]);
    }

    void write(int i, const LossResult& to) {
        if (to.kind == LossResult::Kind::kFloat) copy<float>(i, to.at);
        else if (to.kind == LossResult::Kind::kDouble) copy<double>(i, to.at);
        else copy<int64_t>(i, to.at);
    }

    int64_t group_of(int64_t sequence) const { return p_.lists_ ? sequence / d_.list_size : sequence % d_.groups; }

    // Calls f(e, o) for the elements e of level `to` from `begin` to `end`, o being the element of level `from` that e
    // belongs to. Divisions, which cost more than most operations, are done once a sequence or list.
    template <class F>
    void each(int64_t begin, int64_t end, Level to, Level from, Way how, const F& f) const {
        if (from == to || from == Level::kBatch) {
            for (int64_t e = begin; e < end; ++e) f(e, from == to ? e : 0);
        } else if (to == Level::kComparison) {
            comparisons(begin, end, from, how, f);
        } else if (to == Level::kSequence) {  // from groups
            for (int64_t e = begin; e < end;) {
                const int64_t size = p_.lists_ ? d_.list_size : d_.groups, rest = e % size;
                const int64_t stop = std::min(end, e - rest + size), first = p_.lists_ ? e / size : rest - e;
                if (p_.lists_)
                    for (; e < stop; ++e) f(e, first);
                else
                    for (; e < stop; ++e) f(e, e + first);
            }
        } else {  // tokens
            for (int64_t e = begin; e < end;) {
                const int64_t sequence = e / length_, stop = std::min(end, (sequence + 1) * length_);
                const int64_t o = from == Level::kSequence ? sequence : group_of(sequence);
                for (; e < stop; ++e) f(e, o);
            }
        }
    }

    // The same of comparisons, whole lists of them.
    template <class F>
    void comparisons(int64_t e, int64_t end, Level from, Way how, const F& f) const {
        const int64_t size = d_.list_size;
        for (int64_t b = 0; e < end; ++b) {
            for (int64_t k = 0; k < size; ++k) {
                const int64_t first = b * size;
                if (from == Level::kGroup)
                    for (int64_t i = 0; i < size; ++i, ++e) f(e, b);
                else if (how == Way::kOther)
                    for (int64_t i = 0; i < size; ++i, ++e) f(e, first + i);
                else
                    for (int64_t i = 0; i < size; ++i, ++e) f(e, first + k);
            }
        }
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
            const double* x = value(a);
            each(0, n, s.level, step(a).level, s.how, [&](int64_t e, int64_t o) { y[e] = x[o]; });
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

    // Calls f(e, o) for the elements of a reduction's operand, o being where they go.
    template <class F>
    void each_reduced(const LossStep& s, const F& f) const {
        const Level from = step(s.operands[0]).level;
        const Way how = from == Level::kComparison && s.how != Way::kOther ? Way::kCompared : s.how;
        each(0, d_.count(from), from, s.level, how, f);
    }

    void reduce_small(int i) {
        const LossStep& s = step(i);
        const int64_t out = d_.count(s.level);
        double *y = value(i), *x = value(s.operands[0]);
        if (s.op == Op::kSum) {
            std::fill(y, y + out, 0.0);
            each_reduced(s, [&](int64_t e, int64_t o) { y[o] += x[e]; });
            return;
        }
        std::fill(y, y + out, -INFINITY);
        each_reduced(s, [&](int64_t e, int64_t o) { y[o] = value_of<Op::kMaximum>(x[e], y[o], 0.0); });
        if (s.op == Op::kMax) return;
        std::vector<double> sums(out, 0.0);
        each_reduced(s, [&](int64_t e, int64_t o) {
            if (x[e] != -INFINITY) sums[o] += x[e] == y[o] ? 1.0 : std::exp(x[e] - y[o]);
        });
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
            double* to = gradient(a);
            each(0, n, s.level, step(a).level, s.how, [&](int64_t e, int64_t o) { to[o] += g[e]; });
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
        const double *y = value(i), *x = value(a), *g = gradient(i);
        double* to = gradient(a);
        if (s.op == Op::kSum) {
            each_reduced(s, [&](int64_t e, int64_t o) { to[e] += g[o]; });
        } else if (s.op == Op::kMax) {
            std::vector<double> equal(d_.count(s.level), 0.0);  // how many share a maximum
            each_reduced(s, [&](int64_t e, int64_t o) { equal[o] += x[e] == y[o]; });
            each_reduced(s, [&](int64_t e, int64_t o) {
                if (g[o] != 0 && x[e] == y[o]) to[e] += g[o] / equal[o];
            });
        } else {
            each_reduced(s, [&](int64_t e, int64_t o) {
                if (g[o] != 0 && x[e] != -INFINITY) to[e] += g[o] * std::exp(x[e] - y[o]);
            });
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
            constexpr int kPulled = pulled_operands<kOp>();
            // Chosen and not branched on, so that a processor does several at a time.
            const auto add = [&](double* to, auto part) {
                for (int64_t e = 0; e < n; ++e) {
                    const double d = part(pulled_by<kOp>(g[e], a[e], b[e], c[e], y[e]));
                    to[e] += g[e] == 0 ? 0 : d;
                }
            };
            if ((kPulled & 1) && ga) add(ga, [](const Pulled<double>& d) { return d.a; });
            if ((kPulled & 2) && gb) add(gb, [](const Pulled<double>& d) { return d.b; });
            if ((kPulled & 4) && gc) add(gc, [](const Pulled<double>& d) { return d.c; });
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
                const double* from = values_ + at_[a];
                const Level level = step(a).level;
                each(begin, begin + m, Level::kToken, level, s.how,
                     [&](int64_t e, int64_t o) { out[e - begin] = from[o]; });
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
        block_forward(pass.values, begin, m, y);
        const auto slot = [&](double* from, int i) { return from + p_.slots_[i] * kBlock; };
        for (const int i : pass.backward)
            if (p_.wanted_[i]) std::fill_n(slot(g, i), m, 0.0);
        for (const int i : pass.loss_sums) {
            const int a = step(i).operands[0];
            if (!p_.wanted_[a]) continue;
            double* to = slot(g, a);
            const double* from = gradient(i);
            const Level level = step(i).level;
            each(begin, begin + m, Level::kToken, level, Way::kOwner, [&](int64_t e, int64_t o) {
                if (d_.real[e]) to[e - begin] += from[o];
            });
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
            float* to = d_.derivatives[p_.kinds_[static_cast<int>(s.value)]] + begin;
            for (int e = 0; e < m; ++e)
                if (d_.real[begin + e]) to[e] = static_cast<float>(to[e] + own[e]);
        } else if (s.op == Op::kSpread) {
            const int a = s.operands[0];
            double* to = gradient(a);
            each(begin, begin + m, Level::kToken, step(a).level, s.how, [&](int64_t e, int64_t o) {
                if (d_.real[e]) to[o] += own[e - begin];
            });
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
    std::unique_ptr<double[]> memory_;
    double *values_, *gradients_;  // of steps of other levels than tokens
};

void run_loss(const LossProgram& program, const LossData& data) { LossRun(program, data).run(); }

}  // namespace fastalign
