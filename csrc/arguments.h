// Python's description of a call, made into the kernels' arguments: addresses, shapes, strides, dtype.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "../kernels/token_args.h"

namespace fastalign {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

// Leading dimensions of a [..., V] tensor, those that lie one after the other in memory as one.
struct Layout {
    RowLayout rows{};
    std::int64_t count = 1, vocab;

    Layout(int dims, const std::int64_t* shape, const std::int64_t* strides) : vocab(shape[dims - 1]) {
        for (int i = 0; i + 1 < dims; ++i) {
            const std::int64_t size = shape[i], step = strides[i];
            count *= size;
            if (size == 1) continue;
            const int last = rows.ndim - 1;
            if (rows.ndim > 0 && rows.strides[last] == size * step) {
                rows.sizes[last] *= size, rows.strides[last] = step;
                continue;
            }
            if (rows.ndim == RowLayout::kMaxDims)
                throw std::invalid_argument("logits must have at most 8 leading dimensions that do not merge");
            rows.sizes[rows.ndim] = size, rows.strides[rows.ndim] = step, ++rows.ndim;
        }
        if (rows.ndim == 0) rows.ndim = 1, rows.sizes[0] = 1, rows.strides[0] = 0;
    }
};

inline Layout layout_of(const py::handle& shape, const py::handle& strides) {
    const auto sizes = py::cast<std::vector<std::int64_t>>(shape), steps = py::cast<std::vector<std::int64_t>>(strides);
    return {static_cast<int>(sizes.size()), sizes.data(), steps.data()};
}

// (dtype, logits, shape, strides, ref_logits, ref_strides, labels, labels64, ignore_index, temperature, softcap,
// threads)
inline void fill_tokens(TokenArgs& a, const py::tuple& t) {
    if (t.size() != 12) throw std::invalid_argument("tokens must have 12 fields");
    const Layout layout = layout_of(t[2], t[3]);
    a.dtype = static_cast<DType>(py::cast<int>(t[0]));
    a.logits = at<const void>(py::cast<Address>(t[1]));
    a.ref_logits = at<const void>(py::cast<Address>(t[4]));
    a.layout = layout.rows;
    a.ref_layout = layout_of(t[2], t[5]).rows;
    a.rows = layout.count, a.vocab = layout.vocab;
    a.labels = at<const void>(py::cast<Address>(t[6]));
    a.labels64 = py::cast<bool>(t[7]);
    a.ignore_index = py::cast<std::int64_t>(t[8]);
    a.temperature = py::cast<double>(t[9]), a.inv_temperature = 1 / a.temperature;
    a.softcap = py::cast<double>(t[10]);
    a.threads = py::cast<int>(t[11]);
}

// Where a gradient goes: of the logits' shape, with strides of its own.
template <class Args>
void fill_result(Args& a, const py::tuple& tokens, Address out, const py::tuple& strides) {
    a.out_gradient = at<void>(out);
    a.out_layout = layout_of(tokens[2], strides).rows;
}

template <class T>
T* address(const py::tuple& t, std::size_t i) {
    return at<T>(py::cast<Address>(t[i]));
}

// outputs: logps, lse, entropy, kl, mean, saved.
inline PerRow<float> outputs_of(const py::tuple& t) {
    if (t.size() != 6) throw std::invalid_argument("outputs must have 6 fields");
    return {address<float>(t, 0), address<float>(t, 1), address<float>(t, 2), address<float>(t, 3),
            address<float>(t, 4)};
}

inline ForwardArgs forward_args(const py::tuple& tokens, const py::tuple& outputs) {
    ForwardArgs a{};
    fill_tokens(a, tokens);
    a.out = outputs_of(outputs), a.saved = address<float>(outputs, 5);
    return a;
}

// per_row: saved, entropy, kl, and the gradients of logps, lse, entropy, kl, mean.
inline BackwardArgs backward_args(const py::tuple& tokens, const py::tuple& per_row, Address out,
                                  const py::tuple& out_strides) {
    if (per_row.size() != 8) throw std::invalid_argument("per_row must have 8 fields");
    BackwardArgs a{};
    fill_tokens(a, tokens);
    const auto row = [&](std::size_t i) { return address<const float>(per_row, i); };
    a.saved = row(0), a.entropy = row(1), a.kl = row(2);
    a.grads = {row(3), row(4), row(5), row(6), row(7)};
    fill_result(a, tokens, out, out_strides);
    return a;
}

// options: kind, low, high, dual_clip, kl, kl_coef, kl_reversed, entropy_coef, label_smoothing, z_loss.
inline ObjectiveOptions objective_options(const py::tuple& t) {
    if (t.size() != 10) throw std::invalid_argument("options must have 10 fields");
    const auto number = [&](int i) { return py::cast<float>(t[i]); };
    ObjectiveOptions o{};
    o.kind = static_cast<Kind>(py::cast<int>(t[0]));
    o.low = number(1), o.high = number(2), o.dual_clip = number(3);
    o.kl = static_cast<KlTerm>(py::cast<int>(t[4]));
    o.kl_coef = number(5), o.kl_reversed = py::cast<bool>(t[6]);
    o.entropy_coef = number(7), o.label_smoothing = number(8), o.z_loss = number(9);
    return o;
}

// inputs: weight, old_logps, advantages, ref_logps.
inline ObjectiveArgs objective_args(const py::tuple& tokens, const py::tuple& options, const py::tuple& inputs,
                                    const py::tuple& outputs, Address out, const py::tuple& out_strides) {
    if (inputs.size() != 4) throw std::invalid_argument("inputs must have 4 fields");
    ObjectiveArgs a{};
    fill_tokens(a, tokens);
    a.options = objective_options(options);
    a.weight = address<const float>(inputs, 0), a.old_logps = address<const float>(inputs, 1);
    a.advantages = address<const float>(inputs, 2), a.ref_logps = address<const float>(inputs, 3);
    a.out = outputs_of(outputs), a.saved = address<float>(outputs, 5);
    fill_result(a, tokens, out, out_strides);
    return a;
}

}  // namespace fastalign
