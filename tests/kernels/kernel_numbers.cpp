// One instruction set's kernels as a program: what a machine of another kind computes, for tests to compare. Reads a
// call from standard input and writes its results to standard output, all as they lie in memory.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/cpu/token_stats_cpu.h"

namespace fastalign::FA_ISA {
extern const CpuKernels kernels;
}

namespace {

using namespace fastalign;

template <class T>
std::vector<T> read(int64_t count) {
    std::vector<T> data(count);
    if (std::fread(data.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::abort();
    return data;
}

template <class T>
void write(const std::vector<T>& data) {
    std::fwrite(data.data(), sizeof(T), data.size(), stdout);
}

RowLayout rows_of(int64_t vocab) {
    RowLayout layout{};
    layout.ndim = 1, layout.strides[0] = vocab;
    return layout;
}

// Statistics [5, rows], the gradient of their weighted sum, and that of the weighted logps in one launch.
void statistics(const CpuKernels& run) {
    const auto head = read<int64_t>(5);
    const auto options = read<double>(2);
    const int64_t dtype = head[0], rows = head[1], vocab = head[2], size = dtype ? 2 : 4;
    const bool moments = head[3] & 1, reference = head[3] & 2;
    const auto logits = read<char>(rows * vocab * size), other = read<char>(reference ? rows * vocab * size : 0);
    const auto labels = read<int64_t>(rows);
    const auto weights = read<float>(5 * rows);

    TokenArgs call{};
    call.dtype = static_cast<DType>(dtype), call.logits = logits.data();
    call.ref_logits = reference ? other.data() : nullptr;
    call.layout = call.ref_layout = rows_of(vocab);
    call.labels = labels.data(), call.labels64 = true;
    call.rows = rows, call.vocab = vocab, call.ignore_index = head[4];
    call.temperature = options[0], call.inv_temperature = 1 / options[0], call.softcap = options[1];
    call.threads = 1;

    std::vector<float> found(5 * rows), saved(4 * rows);
    float* at = found.data();
    const PerRow<float> out{at, at + rows, moments ? at + 2 * rows : nullptr, reference ? at + 3 * rows : nullptr,
                            moments ? at + 4 * rows : nullptr};
    run.forward({call, out, saved.data()});
    write(found);

    const float* w = weights.data();
    std::vector<char> gradient(logits.size());
    BackwardArgs back{};
    static_cast<TokenArgs&>(back) = call;
    back.saved = saved.data(), back.entropy = out.entropy, back.kl = out.kl;
    back.grads = {w, w + rows, moments ? w + 2 * rows : nullptr, reference ? w + 3 * rows : nullptr,
                  moments ? w + 4 * rows : nullptr};
    back.out_gradient = gradient.data(), back.out_layout = rows_of(vocab);
    run.backward(back);
    write(gradient);

    ObjectiveArgs once{};
    static_cast<TokenArgs&>(once) = call;
    once.ref_logits = nullptr, once.weight = w;  // the program without a step: the loss is the first statistic
    once.out = {at, at + rows, nullptr, nullptr, nullptr};
    once.out_gradient = gradient.data(), once.out_layout = rows_of(vocab);
    run.objective(once);
    write(gradient);
}

// a [m, k] @ b [k, n] + out.
void product(const CpuKernels& run) {
    const auto head = read<int64_t>(5);
    const int64_t m = head[2], n = head[3], k = head[4];
    const auto a = read<char>(m * k * (head[0] ? 2 : 4)), b = read<char>(k * n * (head[1] ? 2 : 4));
    auto out = read<float>(m * n);
    run.gemm({{a.data(), static_cast<DType>(head[0]), k, 1},
              {b.data(), static_cast<DType>(head[1]), n, 1},
              out.data(),
              n,
              m,
              n,
              k,
              true,
              1});
    write(out);
}

}  // namespace

int main() {
    // Any number of calls after each other: 1 statistics, 2 a product.
    for (int64_t what; std::fread(&what, sizeof what, 1, stdin) == 1;) {
        if (what == 1) statistics(fastalign::FA_ISA::kernels);
        else product(fastalign::FA_ISA::kernels);
    }
}
