// The only file that knows pybind11: addresses, shapes, strides, dtype and threads in; no torch and no mathematics.
// Callers (fastalign/_backends.py) have checked every argument; labels, which have to be read for it, are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/gae_cpu.h"
#include "../kernels/token_stats_cpu.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

std::vector<std::int64_t> integers(const py::tuple& t) {
    std::vector<std::int64_t> v(t.size());
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = py::cast<std::int64_t>(t[i]);
    return v;
}

// Leading dimensions of a [..., V] tensor.
struct Layout {
    std::vector<std::int64_t> sizes, strides;
    Layout(const py::tuple& shape, const py::tuple& stride) : sizes(integers(shape)), strides(integers(stride)) {}
    fastalign::RowLayout rows() const { return {static_cast<int>(sizes.size()) - 1, sizes.data(), strides.data()}; }
    std::int64_t count() const {
        std::int64_t n = 1;
        for (std::size_t i = 0; i + 1 < sizes.size(); ++i) n *= sizes[i];
        return n;
    }
};

// (dtype, logits, shape, strides, ref_logits, ref_strides, labels, labels64, ignore_index, temperature, softcap,
// threads)
struct Tokens {
    Layout layout, ref_layout;
    Tokens(const py::tuple& t)
        : layout(py::cast<py::tuple>(t[2]), py::cast<py::tuple>(t[3])),
          ref_layout(py::cast<py::tuple>(t[2]), py::cast<py::tuple>(t[5])) {
        if (t.size() != 12) throw std::invalid_argument("tokens must have 12 fields");
    }
    void fill(fastalign::TokenArgs& a, const py::tuple& t) const {
        a.dtype = static_cast<fastalign::DType>(py::cast<int>(t[0]));
        a.logits = at<const void>(py::cast<Address>(t[1]));
        a.ref_logits = at<const void>(py::cast<Address>(t[4]));
        a.layout = layout.rows(), a.ref_layout = ref_layout.rows();
        a.rows = layout.count(), a.vocab = layout.sizes.back();
        a.labels = at<const void>(py::cast<Address>(t[6]));
        a.labels64 = py::cast<bool>(t[7]);
        a.ignore_index = py::cast<std::int64_t>(t[8]);
        a.temperature = py::cast<double>(t[9]), a.softcap = py::cast<double>(t[10]);
        a.threads = py::cast<int>(t[11]);
    }
};

// Flat position of the first bad label, before any logit is read, or -1 after the work is done.
std::int64_t token_stats_forward(const py::tuple& tokens, Address logps, Address lse, Address entropy, Address kl,
                                 Address mean, Address saved) {
    const Tokens t(tokens);
    fastalign::ForwardArgs a{};
    t.fill(a, tokens);
    a.out = {at<float>(logps), at<float>(lse), at<float>(entropy), at<float>(kl), at<float>(mean)};
    a.saved = at<float>(saved);
    py::gil_scoped_release release;
    const std::int64_t bad = fastalign::find_bad_label(a);
    if (bad < 0) fastalign::cpu_kernels().forward(a);
    return bad;
}

// For a separate, dense result.
template <class Args>
void advise(const Args& a) {
    const int size = a.dtype == fastalign::DType::kFloat32 ? 4 : 2;
    fastalign::advise_huge_pages(a.out_gradient, a.rows * a.vocab * size);
}

// per_row: saved, entropy, kl, and the gradients of logps, lse, entropy, kl, mean.
std::int64_t token_stats_backward(const py::tuple& tokens, const py::tuple& per_row, Address out,
                                  const py::tuple& out_strides, bool fresh) {
    const Tokens t(tokens);
    const Layout out_layout(py::cast<py::tuple>(tokens[2]), out_strides);
    fastalign::BackwardArgs a{};
    t.fill(a, tokens);
    if (per_row.size() != 8) throw std::invalid_argument("per_row must have 8 fields");
    const auto row = [&](int i) { return at<const float>(py::cast<Address>(per_row[i])); };
    a.saved = row(0), a.entropy = row(1), a.kl = row(2);
    a.grads = {row(3), row(4), row(5), row(6), row(7)};
    a.out_gradient = at<void>(out);
    a.out_layout = out_layout.rows();
    a.stream = fresh;
    py::gil_scoped_release release;
    // The operator can be called by itself, with labels that no forward has seen.
    const std::int64_t bad = fastalign::find_bad_label(a);
    if (bad >= 0) return bad;
    if (fresh) advise(a);
    fastalign::cpu_kernels().backward(a);
    return -1;
}

// options: kind, low, high, dual_clip, kl, kl_coef, kl_reversed, entropy_coef, label_smoothing, z_loss.
fastalign::ObjectiveOptions objective_options(const py::tuple& t) {
    if (t.size() != 10) throw std::invalid_argument("options must have 10 fields");
    const auto number = [&](int i) { return py::cast<float>(t[i]); };
    fastalign::ObjectiveOptions o{};
    o.kind = static_cast<fastalign::Kind>(py::cast<int>(t[0]));
    o.low = number(1), o.high = number(2), o.dual_clip = number(3);
    o.kl = static_cast<fastalign::KlTerm>(py::cast<int>(t[4]));
    o.kl_coef = number(5), o.kl_reversed = py::cast<bool>(t[6]);
    o.entropy_coef = number(7), o.label_smoothing = number(8), o.z_loss = number(9);
    return o;
}

// inputs: weight, old_logps, advantages, ref_logps. outputs: logps, lse, entropy, kl, mean.
std::int64_t token_objective(const py::tuple& tokens, const py::tuple& options, const py::tuple& inputs,
                             const py::tuple& outputs, Address out, const py::tuple& out_strides, bool fresh) {
    const Tokens t(tokens);
    const Layout out_layout(py::cast<py::tuple>(tokens[2]), out_strides);
    fastalign::ObjectiveArgs a{};
    t.fill(a, tokens);
    a.options = objective_options(options);
    const auto input = [&](int i) { return at<const float>(py::cast<Address>(inputs[i])); };
    const auto output = [&](int i) { return at<float>(py::cast<Address>(outputs[i])); };
    a.weight = input(0), a.old_logps = input(1), a.advantages = input(2), a.ref_logps = input(3);
    a.out = {output(0), output(1), output(2), output(3), output(4)};
    a.out_gradient = at<void>(out);
    a.out_layout = out_layout.rows();
    a.stream = fresh;
    py::gil_scoped_release release;
    const std::int64_t bad = fastalign::find_bad_label(a);
    if (bad >= 0) return bad;
    if (fresh) advise(a);
    fastalign::cpu_kernels().objective(a);
    return -1;
}

template <class T>
void gae(Address rewards, Address values, Address mask, Address advantages, Address returns, std::int64_t rows,
         std::int64_t length, double gamma, double gamma_lam, int threads) {
    py::gil_scoped_release release;
    fastalign::gae<T>({at<const T>(rewards), at<const T>(values), at<const bool>(mask), at<T>(advantages),
                       at<T>(returns), rows, length, static_cast<T>(gamma), static_cast<T>(gamma_lam), threads});
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const fastalign::CpuKernels* const* k = fastalign::all_cpu_kernels(); *k; ++k) names.emplace_back((*k)->isa);
    return names;
}

void set_isa(const std::string& name) {
    const fastalign::CpuKernels* k = fastalign::find_cpu_kernels(name.c_str());
    if (!k) {
        std::string known;
        for (const std::string& n : isas()) known += (known.empty() ? "" : ", ") + n;
        throw std::invalid_argument("FASTALIGN_CPU_ISA must be one of " + known + " on this machine; got '" + name +
                                    "'");
    }
    fastalign::set_cpu_kernels(k);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of fastalign. Internal: addresses are not checked here.";
    m.def("token_stats_forward", &token_stats_forward);
    m.def("token_stats_backward", &token_stats_backward);
    m.def("token_objective", &token_objective);
    m.def("gae_float32", &gae<float>);
    m.def("gae_float64", &gae<double>);
    m.def("isa", [] { return std::string(fastalign::cpu_kernels().isa); });
    m.def("isas", &isas);
    m.def("set_isa", &set_isa);
    m.def("read", [](Address data, std::int64_t bytes, int threads) {
        py::gil_scoped_release release;
        return fastalign::cpu_kernels().read(at<const void>(data), bytes, threads);
    });
    m.def("copy", [](Address to, Address from, std::int64_t bytes, int threads) {
        py::gil_scoped_release release;
        fastalign::cpu_kernels().copy(at<void>(to), at<const void>(from), bytes, threads);
    });
}
