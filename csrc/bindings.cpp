// fastalign._C: the CPU kernels, by addresses, shapes, strides, dtype and threads; no torch and no mathematics.
// Callers (fastalign/_backends/cpu.py) have checked every argument; labels, which have to be read for it, are checked
// here.
#include <pybind11/stl.h>

#include <string>

#include "../kernels/fresh_pages.h"
#include "../kernels/gae_cpu.h"
#include "../kernels/token_stats_cpu.h"
#include "arguments.h"

namespace {

using namespace fastalign;

// Flat position of the first bad label, before any logit is read, or -1 after the work is done.
std::int64_t token_stats_forward(const py::tuple& tokens, const py::tuple& outputs) {
    const ForwardArgs a = forward_args(tokens, outputs);
    py::gil_scoped_release release;
    const std::int64_t bad = find_bad_label(a);
    if (bad < 0) cpu_kernels().forward(a);
    return bad;
}

// How many of the labels, dense and `wide` if int64, are not `ignored`.
std::int64_t count_live(Address labels, bool wide, std::int64_t count, std::int64_t ignored) {
    TokenArgs a{};
    a.labels = at<const void>(labels), a.labels64 = wide;
    std::int64_t live = 0;
    for (std::int64_t i = 0; i < count; ++i) live += a.label(i) != ignored;
    return live;
}

// Runs the kernel; `fresh`: its result is large, dense, separate, and perhaps untouched.
template <class Args>
void run_gradient(void (*kernel)(const Args&), Args& a, bool fresh) {
    FreshPages pages(a.out_gradient, a.rows * a.vocab * (a.dtype == DType::kFloat32 ? 4 : 2));
    if (fresh) a.fresh = &pages;
    kernel(a);
}

std::int64_t token_stats_backward(const py::tuple& tokens, const py::tuple& per_row, Address out,
                                  const py::tuple& out_strides, bool fresh) {
    BackwardArgs a = backward_args(tokens, per_row, out, out_strides);
    py::gil_scoped_release release;
    // The operator can be called by itself, with labels that no forward has seen.
    const std::int64_t bad = find_bad_label(a);
    if (bad >= 0) return bad;
    run_gradient(cpu_kernels().backward, a, fresh);
    return -1;
}

std::int64_t token_objective(const py::tuple& tokens, const py::tuple& options, const py::tuple& inputs,
                             const py::tuple& outputs, Address out, const py::tuple& out_strides, bool fresh) {
    ObjectiveArgs a = objective_args(tokens, options, inputs, outputs, out, out_strides);
    py::gil_scoped_release release;
    const std::int64_t bad = find_bad_label(a);
    if (bad >= 0) return bad;
    run_gradient(cpu_kernels().objective, a, fresh);
    return -1;
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

void set_isa(const std::string& name) {
    const CpuKernels* k = find_cpu_kernels(name.c_str());
    if (!k) {
        std::string known;
        for (const std::string& n : isas()) known += (known.empty() ? "" : ", ") + n;
        throw std::invalid_argument("FASTALIGN_CPU_ISA must be one of " + known + " on this machine; got '" + name +
                                    "'");
    }
    set_cpu_kernels(k);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of fastalign. Internal: addresses are not checked here.";
    m.def("token_stats_forward", &token_stats_forward);
    m.def("token_stats_backward", &token_stats_backward);
    m.def("token_objective", &token_objective);
    m.def("count_live", &count_live);
    m.def("gae_float32", &gae_rows<float>);
    m.def("gae_float64", &gae_rows<double>);
    m.def("isa", [] { return std::string(cpu_kernels().isa); });
    m.def("isas", &isas);
    m.def("set_isa", &set_isa);
    m.def("read", [](Address data, std::int64_t bytes, int threads) {
        py::gil_scoped_release release;
        return cpu_kernels().read(at<const void>(data), bytes, threads);
    });
    m.def("copy", [](Address to, Address from, std::int64_t bytes, int threads) {
        py::gil_scoped_release release;
        cpu_kernels().copy(at<void>(to), at<const void>(from), bytes, threads);
    });
}
