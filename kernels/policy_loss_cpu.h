// Values and metrics of the policy objectives whose tokens are independent (losses/_policy_kinds.py and _kl.py have the
// formulas and their sources), beside the slopes of objectives.h. In double, rounded once.
#pragma once
#include <cmath>
#include <cstdint>

#include "objectives.h"

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

    // loss, policy term, KL, half the mean squared log-ratio, share that was cut, mean ratio. The first two are divided
    // by `over`, the others by how many tokens there are.
    void write(const ObjectiveOptions& o, double over, double tokens, float* out) const {
        const double n = tokens < 1 ? 1 : tokens;
        const double whole[6] = {
            (loss + o.kl_coef * kl) / over, loss / over, kl / n, 0.5 * square / n, cut / n, ratio / n};
        for (int i = 0; i < 6; ++i) out[i] = static_cast<float>(whole[i]);
    }
};

}  // namespace fastalign
