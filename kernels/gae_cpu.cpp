// Generalised advantage estimation: one pass from the end of each row to its start.
//
// A step waits for the one before it (an addition and a product, some ten cycles), so one row alone leaves most of the
// processor idle: two rows go side by side (more would share their lines of the first cache). The order of operations
// is that of gae_eager.py, to the last bit.
#include "gae_cpu.h"

#include "parallel.h"

namespace fastalign {
namespace {

constexpr int64_t kRows = 1;

template <class T, int64_t kCount>
void group(const GaeArgs<T>& a, int64_t first) {
    T next_value[kCount] = {}, next_advantage[kCount] = {};
    const int64_t n = a.length, base = first * n;
    for (int64_t t = n - 1; t >= 0; --t) {
        for (int64_t i = 0; i < kCount; ++i) {
            const int64_t at = base + i * n + t;
            const bool real = a.mask[at];
            const T value = a.values[at];
            const T advantage = a.rewards[at] + a.gamma * next_value[i] - value + a.gamma_lam * next_advantage[i];
            // Selected, not branched on: what a mask hides may be NaN and goes nowhere.
            next_value[i] = real ? value : next_value[i];
            next_advantage[i] = real ? advantage : next_advantage[i];
            a.advantages[at] = real ? advantage : T(0);
        }
    }
}

}  // namespace

template <class T>
void gae(const GaeArgs<T>& a) {
    const int64_t groups = (a.rows + kRows - 1) / kRows;
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, kRows * a.length));
    parallel_for(groups, grain, a.threads, [&](int64_t g) {
        const int64_t first = g * kRows;
        if (first + kRows <= a.rows) return group<T, kRows>(a, first);
        for (int64_t row = first; row < a.rows; ++row) group<T, 1>(a, row);
    });
}

template void gae(const GaeArgs<float>&);
template void gae(const GaeArgs<double>&);

}  // namespace fastalign
