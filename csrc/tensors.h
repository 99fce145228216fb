// Tensors as Python shows them: type, dtype, shape, strides, address. Asked for from here they take a fraction of the
// interpreter's time, and nothing of torch's headers.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../kernels/mean_nll_cpu.h"
#include "arguments.h"

namespace fastalign {

// What tensors are compared with: torch.Tensor, then its dtypes float32, bfloat16, float16, int64, int32, float64.
struct TorchTypes {
    PyObject* of[7] = {};  // kept for good: the interpreter may be gone before a destructor runs

    void learn(const py::tuple& types) {
        if (types.size() != 7) throw std::invalid_argument("types must be torch.Tensor and six dtypes");
        for (std::size_t i = 0; i < 7; ++i) of[i] = py::object(types[i]).release().ptr();
    }
    // 0, 1, 2: floats, in the order of DType; 3, 4: int64, int32; 5: float64; -1: another.
    int dtype(py::handle d) const {
        for (int i = 1; i < 7; ++i)
            if (d.ptr() == of[i]) return i - 1;
        return -1;
    }
};

inline TorchTypes& torch_types() {
    static TorchTypes types;
    return types;
}

class Seen {
  public:
    explicit Seen(py::handle tensor) : t(tensor.ptr()) {}

    bool plain_on_cpu() const {
        static PyObject* const name = PyUnicode_InternFromString("is_cpu");
        return reinterpret_cast<PyObject*>(Py_TYPE(t)) == torch_types().of[0] && got(name).ptr() == Py_True;
    }
    int dtype() const {
        static PyObject* const name = PyUnicode_InternFromString("dtype");
        return torch_types().dtype(got(name));
    }
    py::tuple shape() const {
        static PyObject* const name = PyUnicode_InternFromString("shape");
        return got(name);
    }
    py::tuple stride() const {
        static PyObject* const name = PyUnicode_InternFromString("stride");
        return called(name);
    }
    bool dense() const {
        static PyObject* const name = PyUnicode_InternFromString("is_contiguous");
        return called(name).ptr() == Py_True;
    }
    bool negated() const {
        static PyObject* const name = PyUnicode_InternFromString("is_neg");
        return called(name).ptr() == Py_True;
    }
    Address address() const {
        static PyObject* const name = PyUnicode_InternFromString("data_ptr");
        return py::cast<Address>(called(name));
    }

  private:
    static py::object whole(PyObject* result) {
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }
    py::object got(PyObject* name) const { return whole(PyObject_GetAttr(t, name)); }
    py::object called(PyObject* name) const { return whole(PyObject_CallMethodNoArgs(t, name)); }

    PyObject* t;
};

// Whether the shape is that of `rows` with `tail` dimensions more, whose sizes are not looked at.
inline bool extends(const py::tuple& shape, const py::tuple& rows, std::size_t tail) {
    if (shape.size() != rows.size() + tail) return false;
    for (std::size_t i = 0; i < rows.size(); ++i)
        if (!shape[i].equal(rows[i])) return false;
    return true;
}

// Counts up to this are exact in float.
constexpr std::int64_t kExactCount = 1 << 24;

// The arguments of a call on plain CPU tensors, options being (ignore_index, temperature, softcap). False, and nothing
// is known, unless they are such as the kernels take as they are: Python then makes them so or says what is wrong.
inline bool fill_if_plain(TokenArgs& a, py::handle logits, py::handle labels, const py::tuple& options, bool inplace) {
    const Seen x(logits), y(labels);
    if (!x.plain_on_cpu() || !y.plain_on_cpu() || options.size() != 3) return false;
    const int dtype = x.dtype(), integers = y.dtype();
    if (dtype < 0 || dtype > 2 || (integers != 3 && integers != 4) || !y.dense()) return false;
    const py::tuple shape = x.shape(), stride = x.stride();
    if (!extends(shape, y.shape(), 1)) return false;
    const Layout layout(shape, stride);
    if (layout.count > kExactCount) return false;
    if (layout.vocab < 1 || (layout.vocab > 1 && py::cast<std::int64_t>(stride[stride.size() - 1]) != 1)) return false;
    for (int d = 0; inplace && d < layout.rows.ndim; ++d)
        if (layout.rows.sizes[d] > 1 && layout.rows.strides[d] == 0) return false;
    a.dtype = static_cast<DType>(dtype);
    a.logits = at<const void>(x.address());
    a.layout = a.ref_layout = layout.rows, a.rows = layout.count, a.vocab = layout.vocab;
    a.labels = at<const void>(y.address()), a.labels64 = integers == 3;
    a.ignore_index = py::cast<std::int64_t>(options[0]);
    a.temperature = py::cast<double>(options[1]), a.inv_temperature = 1 / a.temperature;
    a.softcap = py::cast<double>(options[2]);
    return std::isfinite(a.temperature) && a.temperature > 0 && std::isfinite(a.softcap) && a.softcap >= 0;
}

// The same of what a backward gets back from autograd: `saved` as the forward made it.
inline bool fill_if_saved(BackwardArgs& a, py::handle saved, const py::tuple& rows) {
    const Seen s(saved);
    if (!s.plain_on_cpu() || s.dtype() != 0 || !s.dense()) return false;
    const py::tuple shape = s.shape();
    if (!extends(shape, rows, 1) || py::cast<std::int64_t>(shape[rows.size()]) != 4) return false;
    a.saved = at<const float>(s.address());
    return true;
}

// A scalar tensor; `known` false: it is not a plain one on the CPU.
inline Scalar scalar_of(py::handle tensor, bool& known) {
    const Seen s(tensor);
    const int dtype = s.plain_on_cpu() ? s.dtype() : -1;
    known = dtype >= 0 && dtype <= 2 && s.shape().size() == 0 && !s.negated();
    if (!known) return {};
    return {at<void>(s.address()), static_cast<DType>(dtype)};
}

// Numbers in one or more tensors, one after the other: float32 or float64, dense or one number in all places.
struct Numbers {
    struct Part {
        const void* at;
        std::int64_t count;
        bool wide, same;
    };
    std::vector<Part> parts;
    std::int64_t count = 0;

    // False for other tensors.
    bool add(py::handle tensor) {
        const Seen s(tensor);
        const int dtype = s.plain_on_cpu() ? s.dtype() : -1;
        if ((dtype != 0 && dtype != 5) || s.negated()) return false;
        std::int64_t number = 1;
        for (const auto& size : s.shape()) number *= py::cast<std::int64_t>(size);
        bool same = true;
        for (const auto& step : s.stride()) same = same && py::cast<std::int64_t>(step) == 0;
        if (!same && !s.dense()) return false;
        parts.push_back({at<const void>(s.address()), number, dtype == 5, same});
        count += number;
        return true;
    }

    // Each of them `repeat` times, in float.
    void spread(float* to, std::int64_t repeat) const {
        for (const Part& p : parts)
            for (std::int64_t i = 0; i < p.count; ++i, to += repeat) {
                const std::int64_t from = p.same ? 0 : i;
                const float x = p.wide ? static_cast<float>(static_cast<const double*>(p.at)[from])
                                       : static_cast<const float*>(p.at)[from];
                std::fill(to, to + repeat, x);
            }
    }
};

}  // namespace fastalign
