// Tensors as Python shows them: type, dtype, shape, strides, address. Asked for from here they take a fraction of the
// interpreter's time, and nothing of torch's headers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <vector>

#include "../kernels/scalar.h"
#include "arguments.h"

namespace fastalign {

// Memory layouts of DLPack 1.x: a tensor without its owner, and the functions that a tensor type hands out as its
// `__dlpack_c_exchange_api__` (torch from 2.10 on). Asking through them takes a tenth of the time that attributes take.
struct DLTensor {
    void* data;
    std::int32_t device, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};
struct DLManaged {
    std::uint32_t major, minor;
    void* context;
    void (*deleter)(DLManaged*);
    std::uint64_t flags;
    DLTensor tensor;
};
struct DLExchange {
    std::uint32_t major, minor;
    void* previous;
    void *allocate, *managed_from;
    int (*managed_to)(DLManaged* tensor, void** object);
    int (*tensor_from)(void* object, DLTensor* out);
    void* stream;
};
struct DLType {
    std::uint8_t code, bits;
};
constexpr int kDLCpu = 1;
constexpr std::uint8_t kDLInt = 0, kDLFloat = 2, kDLBFloat = 4;

// A dtype that is known, by its place in `TensorType::dtypes`: the kernels' own in the order of DType, and others.
constexpr int kFloat32 = 0, kInt64 = 3, kFloat64 = 5;

// torch.Tensor, and its dtypes float32, bfloat16, float16, int64, int32, float64.
struct TensorType {
    PyObject* type = nullptr;  // kept for good: the interpreter may be gone before a destructor runs
    PyObject* dtypes[6] = {};
    PyObject* maker = nullptr;
    const DLExchange* exchange = nullptr;

    // `attributes`: never DLPack; `make(shape, dtype)`: a new tensor on the CPU, where DLPack's functions are not
    // there.
    void learn(const py::object& tensor, const py::tuple& names, bool attributes, const py::object& make) {
        maker = py::object(make).release().ptr();
        if (names.size() != 6) throw std::invalid_argument("dtypes must be six");
        type = py::object(tensor).release().ptr();
        for (std::size_t i = 0; i < 6; ++i) dtypes[i] = py::object(names[i]).release().ptr();
        exchange = nullptr;
        if (attributes || !py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
        const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
        if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
        const auto* found = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (found->major == 1 && found->tensor_from && found->managed_to) exchange = found;
    }
};

inline TensorType& tensor_type() {
    static TensorType types;
    return types;
}

// A tensor as it is seen from outside, while somebody else holds it.
class Seen {
  public:
    static constexpr int kMaxDims = 16;

    explicit Seen(py::handle tensor) : t_(tensor.ptr()) {
        if (reinterpret_cast<PyObject*>(Py_TYPE(t_)) != tensor_type().type) return;
        if (tensor_type().exchange) by_exchange();
        else by_attributes();
    }
    Seen(const Seen&) = delete;

    // Exactly a torch.Tensor, dense or strided, on the CPU; nothing else is known where it is not.
    bool plain_on_cpu() const { return plain_; }
    // 0, 1, 2: floats, in the order of DType; 3, 4: int64, int32; 5: float64; -1: another.
    int dtype() const { return dtype_; }
    int dims() const { return dims_; }
    std::int64_t size(int d) const { return shape_[d]; }
    std::int64_t stride(int d) const { return strides_[d]; }
    const std::int64_t* shape() const { return shape_; }
    const std::int64_t* strides() const { return strides_; }
    void* data() const { return data_; }
    std::int64_t count() const {
        std::int64_t n = 1;
        for (int d = 0; d < dims_; ++d) n *= shape_[d];
        return n;
    }
    bool dense() const {
        std::int64_t step = 1;
        for (int d = dims_ - 1; d >= 0; step *= shape_[d], --d)
            if (shape_[d] != 1 && strides_[d] != step) return count() == 0;
        return true;
    }
    bool negated() const {
        static PyObject* const name = PyUnicode_InternFromString("is_neg");
        return called(name).ptr() == Py_True;
    }
    // Whether the shape is that of `rows` with `tail` dimensions more, whose sizes are not looked at.
    bool extends(const Seen& rows, int tail) const {
        return dims_ == rows.dims_ + tail && std::equal(rows.shape_, rows.shape_ + rows.dims_, shape_);
    }

    // Whether the shape is that of `rows` without their last dimension.
    bool extends_to(const Seen& rows) const { return rows.extends(*this, 1); }

  private:
    void by_exchange() {
        DLTensor d{};
        if (tensor_type().exchange->tensor_from(t_, &d)) return PyErr_Clear();
        plain_ = d.device == kDLCpu;
        const int kind = 256 * d.code + d.bits;
        const int kinds[6] = {256 * kDLFloat + 32, 256 * kDLBFloat + 16, 256 * kDLFloat + 16,
                              256 * kDLInt + 64,   256 * kDLInt + 32,    256 * kDLFloat + 64};
        const auto place = std::find(kinds, kinds + 6, kind) - kinds;
        dtype_ = place == 6 || d.lanes != 1 ? -1 : static_cast<int>(place);
        dims_ = d.ndim, shape_ = d.shape, strides_ = d.strides;
        data_ = static_cast<char*>(d.data) + d.byte_offset;
    }

    void by_attributes() {
        static PyObject* const names[] = {PyUnicode_InternFromString("is_cpu"), PyUnicode_InternFromString("dtype"),
                                          PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride"),
                                          PyUnicode_InternFromString("data_ptr")};
        if (got(names[0]).ptr() != Py_True) return;
        const py::object dtype = got(names[1]);
        PyObject* const* const known = tensor_type().dtypes;
        const auto place = std::find(known, known + 6, dtype.ptr()) - known;
        dtype_ = place == 6 ? -1 : static_cast<int>(place);
        const py::tuple shape = got(names[2]), strides = called(names[3]);
        if (shape.size() > kMaxDims) return;
        plain_ = true, dims_ = static_cast<int>(shape.size());
        for (int d = 0; d < dims_; ++d) {
            own_[d] = py::cast<std::int64_t>(shape[d]);
            own_[kMaxDims + d] = py::cast<std::int64_t>(strides[d]);
        }
        shape_ = own_, strides_ = own_ + kMaxDims;
        data_ = at<void>(py::cast<Address>(called(names[4])));
    }

    static py::object whole(PyObject* result) {
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }
    py::object got(PyObject* name) const { return whole(PyObject_GetAttr(t_, name)); }
    py::object called(PyObject* name) const { return whole(PyObject_CallMethodNoArgs(t_, name)); }

    PyObject* t_;
    bool plain_ = false;
    int dtype_ = -1, dims_ = 0;
    const std::int64_t *shape_ = nullptr, *strides_ = nullptr;
    void* data_ = nullptr;
    std::int64_t own_[2 * kMaxDims];
};

// A new dense tensor of one of the dtypes that are known. Through DLPack it is made without the interpreter or an
// operator of torch's.
class NewTensor {
  public:
    NewTensor(int dtype, int dims, const std::int64_t* shape) {
        if (tensor_type().exchange) by_exchange(dtype, dims, shape);
        else by_maker(dtype, dims, shape);
    }
    NewTensor(int dtype, std::initializer_list<std::int64_t> shape)
        : NewTensor(dtype, static_cast<int>(shape.size()), shape.begin()) {}
    template <class T>
    T* data() const {
        return static_cast<T*>(data_);
    }
    const py::object& object() const { return object_; }

  private:
    struct Block {
        DLManaged managed;
        std::int64_t sizes[2 * Seen::kMaxDims];  // shape and strides
    };

    void by_exchange(int dtype, int dims, const std::int64_t* shape) {
        constexpr std::size_t kAlign = 64, kHead = (sizeof(Block) + kAlign - 1) / kAlign * kAlign;
        static constexpr DLType kTypes[6] = {{kDLFloat, 32}, {kDLBFloat, 16}, {kDLFloat, 16},
                                             {kDLInt, 64},   {kDLInt, 32},    {kDLFloat, 64}};
        const DLType type = kTypes[dtype];
        std::int64_t count = 1;
        for (int d = 0; d < dims; ++d) count *= shape[d];
        auto* const at = static_cast<char*>(std::malloc(kHead + kAlign + count * type.bits / 8));
        if (!at) throw std::bad_alloc();
        char* const start = at + (kAlign - reinterpret_cast<std::uintptr_t>(at) % kAlign) % kAlign;
        auto* const block = new (start) Block;
        std::int64_t *const sizes = block->sizes, *const strides = sizes + Seen::kMaxDims;
        std::copy(shape, shape + dims, sizes);
        std::int64_t step = 1;
        for (int d = dims - 1; d >= 0; step *= std::max<std::int64_t>(sizes[d], 1), --d) strides[d] = step;
        data_ = start + kHead;
        block->managed = {1,  0,
                          at, [](DLManaged* m) { std::free(m->context); },
                          0,  {data_, kDLCpu, 0, dims, type.code, type.bits, 1, sizes, strides, 0}};
        void* made = nullptr;
        if (tensor_type().exchange->managed_to(&block->managed, &made)) {
            std::free(at);
            throw py::error_already_set();
        }
        object_ = py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
    }

    void by_maker(int dtype, int dims, const std::int64_t* shape) {
        py::tuple sizes(dims);
        for (int d = 0; d < dims; ++d) sizes[d] = shape[d];
        object_ = py::handle(tensor_type().maker)(sizes, py::handle(tensor_type().dtypes[dtype]));
        data_ = Seen(object_).data();
    }

    py::object object_;
    void* data_ = nullptr;
};

// Counts up to this are exact in float.
constexpr std::int64_t kExactCount = 1 << 24;

inline bool is_number(py::handle x) { return PyFloat_Check(x.ptr()) || PyLong_CheckExact(x.ptr()); }

// The arguments of a call on plain CPU tensors, options being (ignore_index, temperature, softcap). False, and nothing
// is known, unless they are such as the kernels take as they are: Python then makes them so or says what is wrong.
inline bool fill_if_plain(TokenArgs& a, py::handle logits, py::handle labels, const py::tuple& options, bool inplace) {
    const Seen x(logits), y(labels);
    if (!x.plain_on_cpu() || !y.plain_on_cpu() || options.size() != 3) return false;
    const int dtype = x.dtype(), integers = y.dtype();
    if (dtype < 0 || dtype > 2 || (integers != 3 && integers != 4) || !y.dense()) return false;
    if (!x.extends(y, 1) || x.dims() > Seen::kMaxDims) return false;
    const Layout layout(x.dims(), x.shape(), x.strides());
    if (layout.count > kExactCount) return false;
    if (layout.vocab < 1 || (layout.vocab > 1 && x.stride(x.dims() - 1) != 1)) return false;
    for (int d = 0; inplace && d < layout.rows.ndim; ++d)
        if (layout.rows.sizes[d] > 1 && layout.rows.strides[d] == 0) return false;
    a.dtype = static_cast<DType>(dtype);
    a.logits = x.data();
    a.layout = a.ref_layout = layout.rows, a.rows = layout.count, a.vocab = layout.vocab;
    a.labels = y.data(), a.labels64 = integers == 3;
    int beyond = 0;
    if (!PyLong_CheckExact(options[0].ptr()) || !is_number(options[1]) || !is_number(options[2])) return false;
    a.ignore_index = PyLong_AsLongLongAndOverflow(options[0].ptr(), &beyond);
    a.temperature = py::cast<double>(options[1]), a.inv_temperature = 1 / a.temperature;
    a.softcap = py::cast<double>(options[2]);
    return !beyond && std::isfinite(a.temperature) && a.temperature > 0 && std::isfinite(a.softcap) && a.softcap >= 0;
}

// Numbers in one or more tensors, one after the other: float32 or float64, dense or one number in all places.
struct Numbers {
    struct Part {
        const void* at;
        std::int64_t count;
        bool wide, same;

        double operator[](std::int64_t i) const {
            const std::int64_t from = same ? 0 : i;
            return wide ? static_cast<const double*>(at)[from] : static_cast<const float*>(at)[from];
        }
    };
    std::vector<Part> parts;
    std::int64_t count = 0;

    // False for other tensors, and for others than of `dims` dimensions if that is not -1.
    bool add(const Seen& s, int dims = -1) {
        const int dtype = s.plain_on_cpu() ? s.dtype() : -1;
        if ((dtype != 0 && dtype != 5) || s.negated() || (dims >= 0 && s.dims() != dims)) return false;
        const bool same = std::all_of(s.strides(), s.strides() + s.dims(), [](std::int64_t step) { return step == 0; });
        if (!same && !s.dense()) return false;
        parts.push_back({s.data(), s.count(), dtype == 5, same});
        count += parts.back().count;
        return true;
    }

    // Each of them `repeat` times, in float.
    void spread(float* to, std::int64_t repeat) const {
        for (const Part& p : parts)
            for (std::int64_t i = 0; i < p.count; ++i, to += repeat)
                std::fill(to, to + repeat, static_cast<float>(p[i]));
    }
};

}  // namespace fastalign
