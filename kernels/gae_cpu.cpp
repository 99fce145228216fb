// Generalised advantage estimation: one pass from the end of each row to its start, in the order of operations of
// gae_eager.py, to the last bit. A step waits for the one before it. Several rows side by side would hide that, but
// measured slower: rows whose length is a power of two fight for the same cache lines, and copying them apart costs
// more.
#include "gae_cpu.h"

#include "parallel.h"

namespace fastalign {

template <class T>
void gae(const GaeArgs<T>& a) {
    const int64_t n = a.length;
    parallel_for(a.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n)), a.threads, [&](int64_t row) {
        const T *rewards = a.rewards + row * n, *values = a.values + row * n;
        const bool* mask = a.mask + row * n;
        T *advantages = a.advantages + row * n, *returns = a.returns + row * n;
        T next_value = 0, next_advantage = 0;
        for (int64_t t = n - 1; t >= 0; --t) {
            const T value = values[t];
            const T advantage = rewards[t] + a.gamma * next_value - value + a.gamma_lam * next_advantage;
            // Selected, not branched on: what a mask hides may be NaN and goes nowhere.
            next_value = mask[t] ? value : next_value;
            next_advantage = mask[t] ? advantage : next_advantage;
            advantages[t] = mask[t] ? advantage : T(0);
            returns[t] = mask[t] ? advantage + value : T(0);
        }
    });
}

template void gae(const GaeArgs<float>&);
template void gae(const GaeArgs<double>&);

}  // namespace fastalign
