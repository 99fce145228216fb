// Token-level objectives: the gradient of a token's loss with respect to its statistics, for the one-launch path.
//
// The losses themselves (value, metrics, every option) are fastalign/losses/sft.py and policy.py; a kernel that reads
// the logits once needs only their slopes, between the sums over a row and the row's gradient. Each formula here is the
// derivative of the row of that name in losses/_policy_kinds.py and _kl.py, and the tests hold the two together.
#pragma once
#include "token_stats.h"

namespace fastalign {

enum class Kind { kSft, kReinforce, kSurrogate, kClip, kCispo };
enum class KlTerm { kNone, kK1, kK2, kK3, kExact };

struct ObjectiveOptions {
    Kind kind;
    float low, high;  // the ratio is cut to [1 - low, 1 + high]
    float dual_clip;  // the loss of a token with A < 0 is at most -dual_clip * A; infinity: no bound
    KlTerm kl;
    float kl_coef;
    bool kl_reversed;  // the estimate is of KL(ref, pi), from ref's samples
    float entropy_coef, label_smoothing, z_loss;
};

// What a token brings along. `weight` is the normalisation's: 1 / tokens, 1 / (tokens of its sequence * sequences), ..
struct TokenInputs {
    float weight, old_logp, advantage, ref_logp;
};

FA_HD float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// d policy term / d log pi.
FA_HD float policy_slope(const ObjectiveOptions& o, float logp, const TokenInputs& t) {
    constexpr float kMaxLogRatio = 60;
    const float d = logp - t.old_logp;
    const float ratio = expf(clamp(d, -kMaxLogRatio, kMaxLogRatio));
    const float cut = clamp(ratio, 1 - o.low, 1 + o.high);
    // The clamp's own slope: where it holds, the ratio no longer moves.
    const float moving = d < -kMaxLogRatio || d > kMaxLogRatio ? 0 : ratio;
    switch (o.kind) {
        case Kind::kReinforce:
            return -t.advantage;
        case Kind::kSurrogate:
            return -t.advantage * moving;
        case Kind::kCispo:
            return -t.advantage * cut;
        case Kind::kClip: {
            const float plain = -t.advantage * ratio, clipped = -t.advantage * cut;
            const bool over = t.advantage < 0 && plain > -o.dual_clip * t.advantage;
            return clipped > plain || over ? 0 : -t.advantage * moving;
        }
        case Kind::kSft:
            return -1;
    }
    return 0;
}

// d KL estimate / d log pi.
FA_HD float kl_slope(const ObjectiveOptions& o, float logp, float ref_logp) {
    const float d = o.kl_reversed ? ref_logp - logp : logp - ref_logp, sign = o.kl_reversed ? -1.0f : 1.0f;
    switch (o.kl) {
        case KlTerm::kK1:
            return sign;
        case KlTerm::kK2:
            return sign * d;
        case KlTerm::kK3:
            return sign * -expm1f(-d);
        default:
            return 0;
    }
}

// Gradient of weight * (policy + kl_coef * KL - entropy_coef * entropy + z_loss * lse^2); under label smoothing e the
// policy term's log pi is (1 - e) logps + e (mean - lse).
FA_HD Grads objective_gradient(const ObjectiveOptions& o, const Stats& s, const TokenInputs& t) {
    const float slope = policy_slope(o, s.logps, t) + o.kl_coef * kl_slope(o, s.logps, t.ref_logp);
    Grads g;
    g.logps = t.weight * (1 - o.label_smoothing) * slope;
    g.mean = t.weight * o.label_smoothing * slope;
    g.lse = 2 * t.weight * o.z_loss * s.lse - g.mean;
    g.entropy = -t.weight * o.entropy_coef;
    g.kl = o.kl == KlTerm::kExact ? t.weight * o.kl_coef : 0;
    return g;
}

}  // namespace fastalign
