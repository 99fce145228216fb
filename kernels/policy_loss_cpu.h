// Values and metrics of the policy objectives whose tokens are independent (losses/_policy_kinds.py and _kl.py have the
// formulas and their sources), beside the slopes of objectives.h. In double, rounded once.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "token_stats_cpu.h"

namespace fastalign {

struct PolicyTerm {
    double loss, ratio;
    bool cut;
};

inline PolicyTerm policy_term(const ObjectiveOptions& o, double logp, const TokenInputs& t) {
    constexpr double kMaxLogRatio = 60;
    const double d = logp - t.old_logp, a = t.advantage;
    const double ratio = std::exp(d < -kMaxLogRatio ? -kMaxLogRatio : d > kMaxLogRatio ? kMaxLogRatio : d);
    const double low = 1.0 - o.low, high = 1.0 + o.high;
    const double kept = ratio < low ? low : ratio > high ? high : ratio;
    switch (o.kind) {
        case Kind::kReinforce:
            return {-a * logp, ratio, false};
        case Kind::kSurrogate:
            return {-a * ratio, ratio, false};
        case Kind::kCispo:
            return {-kept * a * logp, ratio, kept != ratio};
        case Kind::kClip: {
            const double plain = -a * ratio, clipped = -a * kept, most = -o.dual_clip * a;
            const double loss = plain < clipped ? clipped : plain;
            const bool over = a < 0 && loss > most;
            return {over ? most : loss, ratio, clipped > plain || over};
        }
        case Kind::kSft:
            break;
    }
    return {-logp, ratio, false};
}

inline double kl_term(const ObjectiveOptions& o, double logp, const TokenInputs& t) {
    const double d = o.kl_reversed ? t.ref_logp - logp : logp - t.ref_logp;
    switch (o.kl) {
        case KlTerm::kK1:
            return d;
        case KlTerm::kK2:
            return 0.5 * d * d;
        case KlTerm::kK3:
            return std::expm1(-d) + d;
        default:
            return 0;
    }
}

// Sums over the tokens that count.
struct PolicySums {
    double loss = 0, kl = 0, square = 0, cut = 0, ratio = 0;

    void add(const ObjectiveOptions& o, float logp, const TokenInputs& t) {
        const PolicyTerm term = policy_term(o, logp, t);
        const double d = static_cast<double>(logp) - t.old_logp;
        loss += term.loss, kl += kl_term(o, logp, t), square += d * d, cut += term.cut, ratio += term.ratio;
    }

    void add(const PolicySums& o) { loss += o.loss, kl += o.kl, square += o.square, cut += o.cut, ratio += o.ratio; }

    // loss, policy term, KL, half the mean squared log-ratio, share that was cut, mean ratio. The first two are divided
    // by `over`, the others by how many tokens there are.
    void write(const ObjectiveOptions& o, double over, double tokens, float* out) const {
        const double n = tokens < 1 ? 1 : tokens;
        const double whole[6] = {
            (loss + o.kl_coef * kl) / over, loss / over, kl / n, 0.5 * square / n, cut / n, ratio / n};
        for (int i = 0; i < 6; ++i) out[i] = static_cast<float>(whole[i]);
    }
};

// From the log-probabilities that a forward wrote: the six numbers of `PolicySums`, and the gradient of the first for
// each of them. `of(row)`: what its token brings along; not asked for ignored ones, which may hold anything. Sums are
// taken run by run, whatever the threads.
template <class Inputs>
void policy_loss(const ForwardArgs& a, const ObjectiveOptions& o, std::int64_t live, double over, const Inputs& of,
                 float* results, float* slopes) {
    constexpr std::int64_t kRun = 512;
    std::vector<PolicySums> sums((a.rows + kRun - 1) / kRun);
    parallel_for(static_cast<std::int64_t>(sums.size()), 1, a.threads, [&](std::int64_t run) {
        const std::int64_t end = std::min(a.rows, (run + 1) * kRun);
        for (std::int64_t i = run * kRun; i < end; ++i) {
            slopes[i] = 0;
            if (a.label(i) == a.ignore_index) continue;
            const TokenInputs t = of(i);
            Stats s{};
            s.logps = a.out.logps[i];
            slopes[i] = objective_gradient(o, s, t).logps;
            sums[run].add(o, s.logps, t);
        }
    });
    PolicySums whole;
    for (const PolicySums& part : sums) whole.add(part);
    whole.write(o, over, static_cast<double>(live), results);
}

}  // namespace fastalign
