// fastalign._C: the CPU kernels, by addresses, shapes, strides, dtype and threads; no torch and no mathematics.
// Callers (fastalign/_backends/cpu.py) have checked every argument; labels, which have to be read for it, are checked
// here.
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>

#include "../kernels/cpu/fresh_pages.h"
#include "../kernels/cpu/gae_cpu.h"
#include "../kernels/cpu/large_blocks.h"
#include "../kernels/cpu/token_stats_cpu.h"
#include "arguments.h"
#include "fast_calls.h"
#include "losses.h"
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
    const std::int64_t valid = count_labels(a);
    if (valid >= 0) work(valid);
    return valid;
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

std::int64_t token_objective(const py::tuple& tokens, const py::bytes& program, const py::tuple& inputs,
                             const py::tuple& outputs, Address out, const py::tuple& out_strides) {
    ObjectiveArgs a = objective_args(tokens, program, inputs, outputs, out, out_strides);
    return with_labels(a, [&](std::int64_t) { run_gradient(cpu_kernels().objective, a); });
}

// What calls on tensors return where these are not such as they take.
constexpr std::int64_t kUnusual = std::numeric_limits<std::int64_t>::min();

// The forwards return what all calls do, and what they keep or find.
py::tuple unusual() { return py::make_tuple(kUnusual, py::none(), py::none()); }

// Runs a loss program on the statistics of logits. `given`: what the program's other inputs are; `wanted`: its gradient
// is; `dtype`: of the loss.
py::tuple loss_forward(py::handle logits, py::handle labels, const py::tuple& options, py::handle reference,
                       bool inplace, const LossProgram& program, const py::tuple& given, std::int64_t sequences,
                       std::int64_t list_size, bool wanted, int dtype, int threads) {
    ForwardArgs a{};
    LossData data;
    Given numbers;
    if (!fill_if_plain(a, logits, labels, options, inplace) || !fill_reference(a, logits, reference)) return unusual();
    if (!sizes_fit(program, a.rows, sequences, list_size) || !Results::fits(program, dtype)) return unusual();
    data.set(a.rows, sequences, list_size, program.lists());
    if (!numbers.fill(program, given, data)) return unusual();
    const Results results(program, data, dtype);
    const Statistics statistics(program, a);
    const KeptRows kept(a, program.moves(2), program.moves(3), wanted ? moved(program) : 0);
    if (wanted) fill_derivatives(program, data, kept.derivatives());
    a.threads = data.threads = threads;
    const std::int64_t valid = with_labels(a, [&](std::int64_t) {
        cpu_kernels().forward(a);
        kept.keep(a);
        const std::vector<uint8_t> real = real_tokens(a);
        data.real = real.data();
        point_at(data, a.out);
        run_loss(program, data);
    });
    if (valid < 0) return py::make_tuple(valid, py::none(), py::none());
    return py::make_tuple(valid, kept.bytes(), results.finish());
}

// The same on statistics that are there already: float32 of the labels' shape, None for those that it does not use.
// Returns the results and [k, tokens] derivatives, or None and None.
py::tuple loss_terms(const py::tuple& statistics, py::handle labels, std::int64_t ignore_index,
                     const LossProgram& program, const py::tuple& given, std::int64_t sequences, std::int64_t list_size,
                     bool wanted, int threads) {
    const py::tuple nothing = py::make_tuple(py::none(), py::none());
    const Seen y(labels);
    if (!y.plain_on_cpu() || (y.dtype() != 3 && y.dtype() != 4) || !y.dense()) return nothing;
    TokenArgs a{};
    a.labels = y.data(), a.labels64 = y.dtype() == 3, a.rows = y.count(), a.ignore_index = ignore_index;
    LossData data;
    Given numbers;
    if (!sizes_fit(program, a.rows, sequences, list_size)) return nothing;
    data.set(a.rows, sequences, list_size, program.lists());
    for (int k = 0; k < LossProgram::kStatistics; ++k) {
        if (!program.uses(k)) continue;
        const Seen s(statistics[k]);
        if (!s.plain_on_cpu() || s.dtype() != 0 || !s.dense() || s.count() != a.rows || s.negated()) return nothing;
        data.statistics[k] = static_cast<const float*>(s.data());
    }
    if (!numbers.fill(program, given, data)) return nothing;
    const Results results(program, data, kFloat32);
    const NewTensor derivatives(kFloat32, {wanted ? moved(program) : 0, a.rows});
    if (wanted) fill_derivatives(program, data, derivatives.data<float>());
    const std::vector<uint8_t> real = real_tokens(a);
    data.real = real.data(), data.threads = threads;
    {
        std::optional<py::gil_scoped_release> release;
        if (a.rows > 4096) release.emplace();
        run_loss(program, data);
    }
    return py::make_tuple(results.finish(), derivatives.object());
}

// The logits' gradient: see `LossGradients`. `out` is new, dense and plain.
std::int64_t loss_backward(py::handle logits, py::handle labels, const py::tuple& options, py::handle reference,
                           py::handle kept, const py::tuple& upstream, int which, py::handle out, int threads) {
    BackwardArgs a{};
    LossGradients gradients;
    if (!fill_if_plain(a, logits, labels, options, false) || !fill_reference(a, logits, reference)) return kUnusual;
    const float* const derivatives = KeptRows::fill(a, kept, which, LossGradients::count(which));
    if (!derivatives || !gradients.fill(a, upstream, derivatives, which)) return kUnusual;
    a.out_gradient = Seen(out).data();
    a.out_layout.ndim = 1, a.out_layout.sizes[0] = a.rows, a.out_layout.strides[0] = a.vocab;
    a.threads = threads;
    return with_labels(a, [&](std::int64_t) { run_gradient(cpu_kernels().backward, a); });
}

// The labels' log-probabilities and the logsumexps, and what a backward needs of them.
py::tuple logps_forward(py::handle logits, py::handle labels, const py::tuple& options, bool inplace, int threads) {
    ForwardArgs a{};
    if (!fill_if_plain(a, logits, labels, options, inplace)) return py::make_tuple(kUnusual);
    const Seen y(labels);
    const KeptRows kept(a, false, false, 0);
    const NewTensor logps(kFloat32, y.dims(), y.shape()), lse(kFloat32, y.dims(), y.shape());
    a.out.logps = logps.data<float>(), a.out.lse = lse.data<float>();
    a.threads = threads;
    const std::int64_t valid = with_labels(a, [&](std::int64_t) { cpu_kernels().forward(a); });
    if (valid < 0) return py::make_tuple(valid);
    return py::make_tuple(valid, logps.object(), lse.object(), kept.bytes());
}

template <class T>
void gae_rows(Address rewards, Address values, Address mask, Address advantages, Address returns, std::int64_t rows,
              std::int64_t length, double gamma, double gamma_lam, int threads) {
    gae<T>({at<const T>(rewards), at<const T>(values), at<const bool>(mask), at<T>(advantages), at<T>(returns), rows,
            length, static_cast<T>(gamma), static_cast<T>(gamma_lam), threads});
}

// `wide`: all numbers are float64, else float32.
void gae_of(bool wide, Address rewards, Address values, Address mask, Address advantages, Address returns,
            std::int64_t rows, std::int64_t length, double gamma, double gamma_lam, int threads) {
    py::gil_scoped_release release;
    (wide ? gae_rows<double> : gae_rows<float>)(rewards, values, mask, advantages, returns, rows, length, gamma,
                                                gamma_lam, threads);
}

// A factor: (address, dtype, strides of rows and columns).
GemmFactor factor(const py::tuple& t) {
    if (t.size() != 4) throw std::invalid_argument("a factor must have 4 fields");
    return {at<const void>(py::cast<Address>(t[0])), static_cast<DType>(py::cast<int>(t[1])),
            py::cast<std::int64_t>(t[2]), py::cast<std::int64_t>(t[3])};
}

// out [m, n] (+)= a [m, k] @ b [k, n]; `sizes`: m, n, k.
void gemm(const py::tuple& a, const py::tuple& b, Address out, std::int64_t out_row, const std::vector<int64_t>& sizes,
          bool add, int threads) {
    use_isa_of_context();
    const GemmArgs g{factor(a),   factor(b), at<float>(out), out_row, sizes.at(0), sizes.at(1),
                     sizes.at(2), add,       threads};
    py::gil_scoped_release release;
    cpu_kernels().gemm(g);
}

// One model's logits: (address, stride of rows, scales, soft-cap).
DivergenceSide side(const py::tuple& t) {
    if (t.size() != 4) throw std::invalid_argument("a side must have 4 fields");
    return {address<const void>(t, 0), py::cast<std::int64_t>(t[1]), address<const float>(t, 2), py::cast<float>(t[3])};
}

// `sizes`: rows, vocabulary; `mixture`: forward, reverse, share, difference; `per_row`: labels, divergence, logps and
// the gradients of these two.
void divergence(int dtype, const py::tuple& student, const py::tuple& teacher, const std::vector<int64_t>& sizes,
                const std::vector<float>& mixture, const py::tuple& per_row, Address out, std::int64_t out_row,
                int threads) {
    use_isa_of_context();
    if (per_row.size() != 5) throw std::invalid_argument("per_row must have 5 fields");
    const DivergenceArgs a{static_cast<DType>(dtype),
                           side(student),
                           side(teacher),
                           address<const int64_t>(per_row, 0),
                           sizes.at(0),
                           sizes.at(1),
                           mixture.at(0),
                           mixture.at(1),
                           mixture.at(2),
                           mixture.at(3),
                           address<float>(per_row, 1),
                           address<float>(per_row, 2),
                           address<const float>(per_row, 3),
                           address<const float>(per_row, 4),
                           at<void>(out),
                           out_row,
                           threads};
    py::gil_scoped_release release;
    cpu_kernels().divergence(a);
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const CpuKernels* const* k = all_cpu_kernels(); *k; ++k) names.emplace_back((*k)->isa);
    return names;
}

// A large block as a buffer of Python's, which goes back to the cache with its last user.
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
    // Whether they are looked at through DLPack.
    m.def("learn_tensors",
          [](const py::object& type, const py::tuple& dtypes, bool attributes, const py::object& make) {
              tensor_type().learn(type, dtypes, attributes, make);
              return tensor_type().exchange != nullptr;
          });
    m.attr("UNUSUAL") = kUnusual;
    m.def("loss_program", [](const py::list& codes, const std::vector<int>& kinds, int loss,
                             const std::vector<int>& outputs, bool lists, const std::vector<int>& found) {
        return py::object(held(make_program(codes, kinds, loss, outputs, lists, found).release()));
    });
    def_fast<&loss_forward>(m, "loss_forward");
    def_fast<&loss_terms>(m, "loss_terms");
    def_fast<&loss_backward>(m, "loss_backward");
    def_fast<&logps_forward>(m, "logps_forward");
    py::class_<HeldBlock>(m, "HeldBlock", py::buffer_protocol())
        .def(py::init<std::int64_t>())
        .def_buffer([](const HeldBlock& block) { return block.info(); })
        .def_static("keep_at_most", [](std::int64_t bytes) { LargeBlocks::all().set_limit(bytes); })
        .def_static("kept_bytes", [] { return LargeBlocks::all().held(); })
        .def_static("release_kept", [] { return LargeBlocks::all().release(); });
    m.def("gae", &gae_of);
    m.attr("ISAS") = py::tuple(py::cast(isas()));
    m.def("gemm", &gemm);
    m.def("divergence", &divergence);
    m.def("follow_isa", &follow_isa);
    // Copies memory, or reads it, where `to` is 0, and returns a checksum: for the machine's rates.
    m.def("probe", [](Address to, Address from, std::int64_t bytes, int threads) -> double {
        use_isa_of_context();
        py::gil_scoped_release release;
        if (!to) return cpu_kernels().read(at<const void>(from), bytes, threads);
        cpu_kernels().copy(at<void>(to), at<const void>(from), bytes, threads);
        return 0;
    });
}
