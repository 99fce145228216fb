// Python's description of a call, made into the kernels' arguments: addresses, shapes, strides, dtype.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
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

// outputs: logps, lse, entropy, kl, mean, saved, and for a forward log_sum_sq and argmax.
inline PerRow<float> outputs_of(const py::tuple& t, std::size_t fields) {
    if (t.size() != fields) throw std::invalid_argument("outputs have another number of fields");
    return {address<float>(t, 0), address<float>(t, 1), address<float>(t, 2), address<float>(t, 3),
            address<float>(t, 4)};
}

inline ForwardArgs forward_args(const py::tuple& tokens, const py::tuple& outputs) {
    ForwardArgs a{};
    fill_tokens(a, tokens);
    a.out = outputs_of(outputs, 8), a.saved = address<float>(outputs, 5);
    a.log_sum_sq = address<float>(outputs, 6), a.argmax = address<std::int64_t>(outputs, 7);
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

// Of bytes that Python has made (`TokenProgram.encoded` in fastalign/_backends): numbers of inputs, constants and steps
// and the slot of the loss, the constants, the steps.
inline TokenProgram token_program(const py::bytes& encoded) {
    const std::string bytes = encoded;
    TokenProgram p{};
    constexpr std::size_t kHead = offsetof(TokenProgram, values);
    static_assert(kHead == 4 * sizeof(int));
    if (bytes.size() < kHead) throw std::invalid_argument("a token's program is too short");
    std::memcpy(&p, bytes.data(), kHead);
    const auto is = [](int count, int most) { return 0 <= count && count <= most; };
    if (!is(p.inputs, p.kMaxInputs) || !is(p.constants, p.kMaxConstants) || !is(p.steps, p.kMaxSteps))
        throw std::invalid_argument("a token's program has at most 8 inputs, 16 constants and 64 steps");
    const std::size_t values = p.constants * sizeof(float), steps = p.steps * sizeof(p.step[0]);
    const int first = p.kStatistics + p.inputs + p.constants;
    if (bytes.size() != kHead + values + steps || !is(p.loss, first + p.steps - 1))
        throw std::invalid_argument("a token's program must be as long as it says");
    std::memcpy(p.values, bytes.data() + kHead, values);
    std::memcpy(p.step, bytes.data() + kHead + values, steps);
    for (int i = 0; i < p.steps; ++i) {
        const auto part = [&](int which) { return TokenProgram::part(p.step[i], which); };
        const bool known = static_cast<int>(Op::kAdd) <= part(0) && part(0) < kOperations;
        if (!known || std::max({part(1), part(2), part(3)}) >= first + i)
            throw std::invalid_argument("a step of a token's program must be an operation on earlier numbers");
    }
    return p;
}

// inputs: weight, and what the program is given.
inline ObjectiveArgs objective_args(const py::tuple& tokens, const py::bytes& program, const py::tuple& inputs,
                                    const py::tuple& outputs, Address out, const py::tuple& out_strides) {
    ObjectiveArgs a{};
    fill_tokens(a, tokens);
    a.program = token_program(program);
    if (static_cast<int>(inputs.size()) != 1 + a.program.inputs)
        throw std::invalid_argument("inputs must be the weight and what the program is given");
    a.weight = address<const float>(inputs, 0);
    for (int i = 0; i < a.program.inputs; ++i) a.inputs[i] = address<const float>(inputs, 1 + i);
    a.out = outputs_of(outputs, 6), a.saved = address<float>(outputs, 5);
    fill_result(a, tokens, out, out_strides);
    return a;
}

}  // namespace fastalign
