// Generalised advantage estimation: one pass from the end of each row to its start, in the order of operations of
// gae_eager.py, to the last bit. A step waits for the one before it, so a thread has two rows in hand. The second lags
// behind the first: rows whose length is a power of two would fight for the same cache lines side by side.
#include "gae_cpu.h"

#include "parallel.h"

namespace fastalign {

namespace {

template <class T>
class Row {
  public:
    Row(const GaeArgs<T>& a, int64_t row)
        : rewards_(a.rewards + row * a.length),
          values_(a.values + row * a.length),
          mask_(a.mask + row * a.length),
          advantages_(a.advantages + row * a.length),
          returns_(a.returns + row * a.length),
          gamma_(a.gamma),
          gamma_lam_(a.gamma_lam) {}

    void step(int64_t t) {
        const T value = values_[t];
        const T advantage = rewards_[t] + gamma_ * next_value_ - value + gamma_lam_ * next_advantage_;
        // Selected, not branched on: what a mask hides may be NaN and goes nowhere.
        next_value_ = mask_[t] ? value : next_value_;
        next_advantage_ = mask_[t] ? advantage : next_advantage_;
        advantages_[t] = mask_[t] ? advantage : T(0);
        returns_[t] = mask_[t] ? advantage + value : T(0);
    }

  private:
    const T* __restrict rewards_, * __restrict values_;
    const bool* __restrict mask_;
    T* __restrict advantages_, * __restrict returns_;
    T gamma_, gamma_lam_, next_value_ = 0, next_advantage_ = 0;
};

constexpr int64_t kLag = 128;

}  // namespace

template <class T>
void gae(const GaeArgs<T>& a) {
    const int64_t n = a.length, pairs = (a.rows + 1) / 2;
    parallel_for(pairs, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, n)), a.threads, [&](int64_t pair) {
        Row<T> first(a, 2 * pair);
        if (2 * pair + 1 == a.rows) {
            for (int64_t t = n - 1; t >= 0; --t) first.step(t);
            return;
        }
        Row<T> second(a, 2 * pair + 1);
        const int64_t lag = std::min(kLag, n);
        for (int64_t i = 0; i < lag; ++i) first.step(n - 1 - i);
        for (int64_t i = lag; i < n; ++i) {
            first.step(n - 1 - i);
            second.step(n - 1 - i + lag);
        }
        for (int64_t t = lag - 1; t >= 0; --t) second.step(t);
    });
}

template void gae(const GaeArgs<float>&);
template void gae(const GaeArgs<double>&);

}  // namespace fastalign
