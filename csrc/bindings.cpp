// fastalign._C: the CPU kernels, by addresses, shapes, strides, dtype and threads; no torch and no mathematics.
// Callers (fastalign/_backends/cpu.py) have checked every argument; labels, which have to be read for it, are checked
// here.
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>

#include "../kernels/fresh_pages.h"
#include "../kernels/gae_cpu.h"
#include "../kernels/large_blocks.h"
#include "../kernels/list_loss_cpu.h"
#include "../kernels/mean_nll_cpu.h"
#include "../kernels/pair_loss_cpu.h"
#include "../kernels/policy_loss_cpu.h"
#include "../kernels/token_stats_cpu.h"
#include "arguments.h"
#include "tensors.h"

namespace {

using namespace fastalign;

// The instruction set is a choice of the caller's context, that is of its thread or asyncio task: a ContextVar of
// Python's, whose value is a position in `all_cpu_kernels`. Every call follows it before it gives up the interpreter.
PyObject* isa_variable = nullptr;

void follow_isa(const py::object& variable) { isa_variable = py::object(variable).release().ptr(); }

void use_isa_of_context() {
    if (!isa_variable) return;
    PyObject* value = nullptr;
    if (PyContextVar_Get(isa_variable, nullptr, &value) < 0) throw py::error_already_set();
    const auto position = py::reinterpret_steal<py::int_>(value);
    set_cpu_kernels(all_cpu_kernels()[PyLong_AsLong(position.ptr())]);
}

// All calls on tokens return how many labels are not ignored, after the work is done; or, before any logit is read, -1
// less the flat position of the first bad label. A backward checks too: it can be called with labels that no forward
// has seen.
template <class Work>
std::int64_t with_labels(const TokenArgs& a, Work work) {
    constexpr std::int64_t kShort = 1 << 14;  // logits that take no longer than handing over the interpreter
    use_isa_of_context();
    std::optional<py::gil_scoped_release> release;
    if (a.rows * a.vocab > kShort) release.emplace();
    const std::int64_t live = count_labels(a);
    if (live >= 0) work(live);
    return live;
}

// Runs the kernel. A result that is separate, and too large for the caches anyway, is written past these, into huge
// pages.
template <class Args>
void run_gradient(void (*kernel)(const Args&), Args& a) {
    constexpr std::int64_t kLarge = 32 << 20;
    const std::int64_t bytes = a.rows * a.vocab * (a.dtype == DType::kFloat32 ? 4 : 2);
    FreshPages pages(a.out_gradient, bytes, LargeBlocks::all().touched(a.out_gradient));
    if (bytes > kLarge && a.out_gradient != a.logits) a.fresh = &pages;
    kernel(a);
}

std::int64_t token_stats_forward(const py::tuple& tokens, const py::tuple& outputs) {
    const ForwardArgs a = forward_args(tokens, outputs);
    return with_labels(a, [&](std::int64_t) { cpu_kernels().forward(a); });
}

std::int64_t token_stats_backward(const py::tuple& tokens, const py::tuple& per_row, Address out,
                                  const py::tuple& out_strides) {
    BackwardArgs a = backward_args(tokens, per_row, out, out_strides);
    return with_labels(a, [&](std::int64_t) { run_gradient(cpu_kernels().backward, a); });
}

std::int64_t token_objective(const py::tuple& tokens, const py::tuple& options, const py::tuple& inputs,
                             const py::tuple& outputs, Address out, const py::tuple& out_strides) {
    ObjectiveArgs a = objective_args(tokens, options, inputs, outputs, out, out_strides);
    return with_labels(a, [&](std::int64_t) { run_gradient(cpu_kernels().objective, a); });
}

// What calls on tensors return where these are not such as they take.
constexpr std::int64_t kUnusual = std::numeric_limits<std::int64_t>::min();

// What a forward keeps of its rows for the backward, as an object of Python's that costs less than a tensor.
class Kept {
  public:
    explicit Kept(ForwardArgs& a)
        : bytes_(py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, a.rows * sizeof(Saved)))) {
        if (!bytes_) throw py::error_already_set();
        a.saved = reinterpret_cast<float*>(PyBytes_AS_STRING(bytes_.ptr()));
    }
    py::tuple with(std::int64_t live) const { return py::make_tuple(live, bytes_); }

    static bool fill(BackwardArgs& a, py::handle bytes) {
        if (!PyBytes_CheckExact(bytes.ptr())) return false;
        if (PyBytes_GET_SIZE(bytes.ptr()) != a.rows * static_cast<Py_ssize_t>(sizeof(Saved))) return false;
        a.saved = reinterpret_cast<const float*>(PyBytes_AS_STRING(bytes.ptr()));
        return true;
    }

  private:
    py::object bytes_;
};

// The forwards return what all calls do, and what they keep.
py::tuple unusual() { return py::make_tuple(kUnusual, py::none()); }

// `over`, `least`: see `mean_nll`. `loss` is new and plain.
py::tuple mean_nll_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace,
                           py::handle loss, std::int64_t over, std::int64_t least, int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return unusual();
    const Seen made(loss);
    const Scalar result{made.data(), static_cast<DType>(made.dtype())};
    const Kept kept(a);
    a.threads = threads;
    return kept.with(with_labels(a, [&](std::int64_t live) { mean_nll(a, live, over, least, result); }));
}

void fill_dense_result(BackwardArgs& a, py::handle out, int threads) {
    a.out_gradient = Seen(out).data();
    a.out_layout.ndim = 1, a.out_layout.sizes[0] = a.rows, a.out_layout.strides[0] = a.vocab;
    a.threads = threads;
}

// `count`: what the forward divided by. `out` is new, dense and plain.
std::int64_t mean_nll_backward(py::handle logits, py::handle labels, const py::tuple& options, py::handle saved,
                               py::handle gradient, std::int64_t count, py::handle out, int threads) {
    BackwardArgs a{};
    bool known;
    const Scalar upstream = scalar_of(gradient, known);
    if (!known || !fill_if_plain(a, logits, labels, options, false)) return kUnusual;
    if (!Kept::fill(a, saved)) return kUnusual;
    fill_dense_result(a, out, threads);
    return with_labels(a, [&](std::int64_t) {
        const auto slopes = mean_nll_slopes(a.rows, count, upstream.get());
        a.grads.logps = slopes.get();
        run_gradient(cpu_kernels().backward, a);
    });
}

// `references`: none, or the chosen and the rejected sequences' sums; `loss`: beta and both weights; `made`, new, dense
// and plain: the mean, [6, pairs] and [2 pairs] results (see `PairResults`).
py::tuple pair_loss_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace,
                            const py::tuple& references, const py::tuple& loss, std::int64_t pairs,
                            const py::tuple& made, int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return unusual();
    if (pairs ? a.rows % (2 * pairs) : a.rows) return unusual();
    Numbers refs;
    for (const auto& side : references)
        if (!refs.add(side, 1) || refs.parts.back().count != pairs) return unusual();
    const bool given = !refs.parts.empty(), wide = !given || refs.parts[0].wide;
    if (given && (refs.parts.size() != 2 || refs.parts[1].wide != wide)) return unusual();
    const auto address = [&](int i) { return static_cast<float*>(Seen(made[i]).data()); };
    const PairLoss f{py::cast<double>(loss[0]), py::cast<double>(loss[1]), py::cast<double>(loss[2])};
    const PairResults out{address(0), address(1), address(2)};
    const std::unique_ptr<float[]> scratch(new float[2 * a.rows + 1]);
    a.out = {scratch.get(), scratch.get() + a.rows, nullptr, nullptr, nullptr};
    const Kept kept(a);
    a.threads = threads;
    const std::int64_t length = pairs ? a.rows / (2 * pairs) : 0;
    // Rounded as the references were: a policy that is its reference has rewards of exactly 0.
    const auto sum = [&](std::int64_t i) {
        const double total = sum_of(a.out.logps + i * length, length);
        return wide ? total : static_cast<double>(static_cast<float>(total));
    };
    const auto ref = [&](std::int64_t i) {
        return !given ? 0.0 : i < pairs ? refs.parts[0][i] : refs.parts[1][i - pairs];
    };
    return kept.with(with_labels(a, [&](std::int64_t) {
        cpu_kernels().forward(a);
        pair_loss(f, pairs, sum, ref, out);
    }));
}

// `inputs`: old_logps, advantages (of tokens or of rows of them), and ref_logps or None; `objective`: see
// `objective_options`; `over`: what losses are divided by, 0: by the tokens that count; `made`, new, dense and plain:
// six numbers (see `PolicySums`), and the gradient of the first for each token's log-probability.
py::tuple policy_loss_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace,
                              const py::tuple& inputs, const py::tuple& objective, double over, const py::tuple& made,
                              int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return unusual();
    const Seen rows(labels);
    Numbers given;
    for (const auto& one : inputs)
        if (!one.is_none() && !given.add_for(one, rows)) return unusual();
    const auto number = [&](std::size_t which, std::int64_t i) {
        const Numbers::Part& p = given.parts[which];
        return static_cast<float>(p[p.count == a.rows ? i : i / (a.rows / p.count)]);
    };
    const ObjectiveOptions o = objective_options(objective);
    auto* const results = static_cast<float*>(Seen(made[0]).data());
    auto* const slopes = static_cast<float*>(Seen(made[1]).data());
    const std::unique_ptr<float[]> scratch(new float[2 * a.rows + 1]);
    a.out = {scratch.get(), scratch.get() + a.rows, nullptr, nullptr, nullptr};
    const Kept kept(a);
    a.threads = threads;
    return kept.with(with_labels(a, [&](std::int64_t live) {
        cpu_kernels().forward(a);
        const double divisor = over != 0 ? over : live < 1 ? 1 : static_cast<double>(live);
        const auto weight = static_cast<float>(1 / divisor);
        const bool has_ref = given.parts.size() > 2;
        const auto of = [&](std::int64_t i) {
            return TokenInputs{weight, number(0, i), number(1, i), has_ref ? number(2, i) : 0};
        };
        policy_loss(a, o, live, divisor, of, results, slopes);
    }));
}

// Lists of `size` responses, one after the other, of equally many labels; `loss`: the fields of `ListLoss`; `made`,
// new, dense and plain: six numbers and the gradient of the first for each response's sum.
py::tuple list_loss_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace,
                            std::int64_t size, const py::tuple& loss, const py::tuple& made, int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return unusual();
    const Seen rows(labels);
    const std::int64_t length = rows.dims() ? rows.size(rows.dims() - 1) : 0;
    if (length < 1 || size < 2 || a.rows < 1 || a.rows % (length * size)) return unusual();
    const ListLoss f{py::cast<bool>(loss[0]), py::cast<bool>(loss[1]), py::cast<bool>(loss[2]),
                     py::cast<double>(loss[3])};
    auto* const results = static_cast<float*>(Seen(made[0]).data());
    auto* const slopes = static_cast<float*>(Seen(made[1]).data());
    const std::int64_t responses = a.rows / length;
    std::vector<std::int64_t> lengths(responses, 0);
    for (std::int64_t i = 0; i < a.rows; ++i) lengths[i / length] += a.label(i) != a.ignore_index;
    if (std::count(lengths.begin(), lengths.end(), 0)) return unusual();  // hidden responses
    const std::unique_ptr<float[]> scratch(new float[2 * a.rows + 1]);
    a.out = {scratch.get(), scratch.get() + a.rows, nullptr, nullptr, nullptr};
    const Kept kept(a);
    a.threads = threads;
    bool finite = true;
    const std::int64_t live = with_labels(a, [&](std::int64_t) {
        cpu_kernels().forward(a);
        std::vector<double> sums(responses);
        for (std::int64_t i = 0; i < responses; ++i) sums[i] = sum_of(a.out.logps + i * length, length);
        finite = list_loss(f, responses / size, size, sums, lengths, results, slopes);
    });
    return finite ? kept.with(live) : unusual();
}

// `logps` and `lse` are new, dense and plain.
py::tuple logps_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace, py::handle logps,
                        py::handle lse, int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return unusual();
    const Kept kept(a);
    a.out.logps = static_cast<float*>(Seen(logps).data()), a.out.lse = static_cast<float*>(Seen(lse).data());
    a.threads = threads;
    return kept.with(with_labels(a, [&](std::int64_t) { cpu_kernels().forward(a); }));
}

// The `sums`, of equally many rows each, are new, dense and plain.
py::tuple sums_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace,
                       const py::tuple& sums, int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return unusual();
    std::vector<Room> rooms;
    std::int64_t count = 0;
    for (const auto& part : sums) {
        const Seen s(part);
        rooms.push_back({static_cast<float*>(s.data()), s.size(0)});
        count += rooms.back().count;
    }
    if (count ? a.rows % count : a.rows) return unusual();
    const Kept kept(a);
    a.threads = threads;
    return kept.with(with_labels(a, [&](std::int64_t) { sum_logps(a, rooms, count); }));
}

// `gradients`: of the log-probs, or of their sums over equally many rows each.
std::int64_t logps_backward(py::handle logits, py::handle labels, const py::tuple& options, py::handle saved,
                            const py::tuple& gradients, py::handle out, int threads) {
    BackwardArgs a{};
    Numbers numbers;
    for (const auto& gradient : gradients)
        if (!numbers.add(gradient)) return kUnusual;
    if (!fill_if_plain(a, logits, labels, options, false)) return kUnusual;
    if (!Kept::fill(a, saved)) return kUnusual;
    if (a.rows > 0 && (numbers.count == 0 || a.rows % numbers.count)) return kUnusual;
    fill_dense_result(a, out, threads);
    return with_labels(a, [&](std::int64_t) {
        const std::unique_ptr<float[]> slopes(new float[a.rows + 1]);
        if (a.rows > 0) numbers.spread(slopes.get(), a.rows / numbers.count);
        a.grads.logps = slopes.get();
        run_gradient(cpu_kernels().backward, a);
    });
}

template <class T>
void gae_rows(Address rewards, Address values, Address mask, Address advantages, Address returns, std::int64_t rows,
              std::int64_t length, double gamma, double gamma_lam, int threads) {
    py::gil_scoped_release release;
    gae<T>({at<const T>(rewards), at<const T>(values), at<const bool>(mask), at<T>(advantages), at<T>(returns), rows,
            length, static_cast<T>(gamma), static_cast<T>(gamma_lam), threads});
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const CpuKernels* const* k = all_cpu_kernels(); *k; ++k) names.emplace_back((*k)->isa);
    return names;
}

// A large block as a buffer of Python's, which goes back to the stock with its last user.
class HeldBlock {
  public:
    explicit HeldBlock(std::int64_t bytes) : block_(LargeBlocks::all().take(bytes)) {
        if (!block_.at) throw std::bad_alloc();
    }
    HeldBlock(const HeldBlock&) = delete;
    ~HeldBlock() { LargeBlocks::all().give(block_); }
    py::buffer_info info() const { return {static_cast<unsigned char*>(block_.at), block_.bytes}; }

  private:
    LargeBlocks::Block block_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of fastalign. Internal: addresses are not checked here.";
    m.def("token_stats_forward", &token_stats_forward);
    m.def("token_stats_backward", &token_stats_backward);
    m.def("token_objective", &token_objective);
    m.def("learn_tensors", [](const py::object& type, const py::tuple& dtypes, bool attributes) {
        tensor_type().learn(type, dtypes, attributes);
    });
    m.attr("UNUSUAL") = kUnusual;
    m.def("mean_nll_forward", &mean_nll_forward);
    m.def("mean_nll_backward", &mean_nll_backward);
    m.def("pair_loss_forward", &pair_loss_forward);
    m.def("policy_loss_forward", &policy_loss_forward);
    m.def("list_loss_forward", &list_loss_forward);
    m.def("logps_forward", &logps_forward);
    m.def("sums_forward", &sums_forward);
    m.def("logps_backward", &logps_backward);
    py::class_<HeldBlock>(m, "HeldBlock", py::buffer_protocol())
        .def(py::init<std::int64_t>())
        .def_buffer([](const HeldBlock& block) { return block.info(); });
    m.def("keep_at_most", [](std::int64_t bytes) { LargeBlocks::all().set_limit(bytes); });
    m.def("kept_bytes", [] { return LargeBlocks::all().held(); });
    m.def("release_kept", [] { return LargeBlocks::all().release(); });
    m.def("gae_float32", &gae_rows<float>);
    m.def("gae_float64", &gae_rows<double>);
    m.def("isas", &isas);
    m.def("follow_isa", &follow_isa);
    m.def("read", [](Address data, std::int64_t bytes, int threads) {
        use_isa_of_context();
        py::gil_scoped_release release;
        return cpu_kernels().read(at<const void>(data), bytes, threads);
    });
    m.def("copy", [](Address to, Address from, std::int64_t bytes, int threads) {
        use_isa_of_context();
        py::gil_scoped_release release;
        cpu_kernels().copy(at<void>(to), at<const void>(from), bytes, threads);
    });
}
