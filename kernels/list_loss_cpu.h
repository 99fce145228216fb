// Losses of ranked lists without ties, best first (losses/listwise.py has the formula and its sources): Plackett-Luce,
// sum_k log sum_{i >= k} exp(s_i - s_k), or its first term alone; s a response's log-probability, in all or by token.
// In double, rounded once.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastalign {

struct ListLoss {
    bool first_alone, average, sft_average;
    double sft_weight;
};

// One list: from its scores to its loss and the gradient for them.
inline double one_list(const ListLoss& f, const std::vector<double>& s, std::vector<double>& slope) {
    const auto size = static_cast<std::int64_t>(s.size());
    const auto log_add = [](double a, double b) {
        const double top = a > b ? a : b;
        return top == -INFINITY ? top : top + std::log1p(std::exp((a > b ? b : a) - top));
    };
    // tails[k] = log sum_{i >= k} exp s_i
    std::vector<double> tails(s);
    for (std::int64_t k = size - 2; k >= 0; --k) tails[k] = log_add(tails[k + 1], s[k]);
    double loss = 0, shares = -INFINITY;  // log sum_{k <= i} exp -tails[k], of the terms there are
    for (std::int64_t i = 0; i < size; ++i) {
        const bool term = i + 1 < size && !(f.first_alone && i > 0);
        if (term) loss += tails[i] - s[i], shares = log_add(shares, -tails[i]);
        slope[i] = std::exp(s[i] + shares) - (term ? 1 : 0);
    }
    return loss;
}

// `sums` and `lengths` (above 0) of every response's labels. Results: loss, ranking term, supervised term, accuracy,
// top-1 accuracy, margin; and the gradient of the loss for every sum. False: a score is not finite.
inline bool list_loss(const ListLoss& f, std::int64_t lists, std::int64_t size, const std::vector<double>& sums,
                      const std::vector<std::int64_t>& lengths, float* results, float* slopes) {
    double ranking = 0, supervised = 0, right = 0, top = 0, margin = 0;
    const double scale = static_cast<double>(size - 1) * static_cast<double>(size - 1);
    std::vector<double> s(size), slope(size);
    for (std::int64_t b = 0; b < lists; ++b) {
        const double* sum = sums.data() + b * size;
        const std::int64_t* length = lengths.data() + b * size;
        for (std::int64_t k = 0; k < size; ++k) {
            s[k] = f.average ? sum[k] / static_cast<double>(length[k]) : sum[k];
            if (!std::isfinite(s[k])) return false;
        }
        ranking += one_list(f, s, slope);
        const double per = f.sft_average ? 1 / static_cast<double>(length[0]) : 1;
        supervised -= scale * per * sum[0];
        bool first = true;
        for (std::int64_t k = 0; k < size; ++k) {
            for (std::int64_t i = k + 1; i < size; ++i) right += s[k] > s[i], margin += s[k] - s[i];
            first = first && (k == 0 || s[0] > s[k]);
            const double of_sum = f.average ? slope[k] / static_cast<double>(length[k]) : slope[k];
            const double own = k == 0 ? f.sft_weight * scale * per : 0;
            slopes[b * size + k] = static_cast<float>((of_sum - own) / static_cast<double>(lists));
        }
        top += first;
    }
    const double n = static_cast<double>(lists), pairs = n * static_cast<double>(size * (size - 1) / 2);
    const double whole[6] = {
        (ranking + f.sft_weight * supervised) / n, ranking / n, supervised / n, right / pairs, top / n, margin / pairs};
    for (int i = 0; i < 6; ++i) results[i] = static_cast<float>(whole[i]);
    return true;
}

}  // namespace fastalign
