// Losses of pairs of sequences that are weighted sums of -log sigmoid(z) and -log sigmoid(-z), where
// z = beta ((w - ref_w) - (l - ref_l)) and w, l are the sums of the chosen and the rejected sequence's
// log-probabilities: DPO (Rafailov et al. 2023, eq. 7), with label smoothing conservative DPO, and robust DPO. In
// double, rounded once.
#pragma once
#include <cmath>
#include <cstdint>

namespace fastalign {

struct PairLoss {
    double beta, right, wrong;  // weights of -log sigmoid(z) and of -log sigmoid(-z)

    static double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }
    static double sigmoid(double x) {
        const double small = std::exp(-std::fabs(x));
        return (x < 0 ? small : 1) / (1 + small);
    }
    // A weight of 0 is no term: 0 times infinity would be NaN.
    double loss(double z) const { return (right ? right * softplus(-z) : 0) + (wrong ? wrong * softplus(z) : 0); }
    double slope(double z) const { return wrong * sigmoid(z) - right * sigmoid(-z); }
};

// Where results go: the mean; rewards of both sides, margins, accuracies and sums of both sides, [6, pairs]; and the
// gradient of the mean for the sums, [2 pairs].
struct PairResults {
    float *mean, *rows, *slopes;
};

// `sum(i)`: of sequence i, the chosen ones first, and `ref(i)` of the reference.
template <class Sum, class Ref>
void pair_loss(const PairLoss& f, std::int64_t pairs, Sum sum, Ref ref, const PairResults& out) {
    double total = 0;
    for (std::int64_t i = 0; i < pairs; ++i) {
        const double w = sum(i), l = sum(i + pairs), h_w = w - ref(i), h_l = l - ref(i + pairs);
        const double z = f.beta * (h_w - h_l), slope = f.beta * f.slope(z) / static_cast<double>(pairs);
        const double won = f.beta * h_w, lost = f.beta * h_l;
        total += f.loss(z);
        const double row[6] = {won, lost, won - lost, won > lost ? 1.0 : 0.0, w, l};
        for (int k = 0; k < 6; ++k) out.rows[k * pairs + i] = static_cast<float>(row[k]);
        out.slopes[i] = static_cast<float>(slope), out.slopes[i + pairs] = static_cast<float>(-slope);
    }
    *out.mean = static_cast<float>(pairs ? total / static_cast<double>(pairs) : 0);
}

}  // namespace fastalign
