// Functions as Python calls them without pybind11's dispatch, which for a dozen arguments takes longer than a short row
// of logits: arguments by position alone, each of its one type.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastalign {

namespace py = pybind11;

// An argument from Python. Throws where it is of another type.
template <class T>
struct Argument;
template <>
struct Argument<py::handle> {
    static constexpr const char* kName = "object";
    static py::handle from(PyObject* x) { return x; }
};
template <>
struct Argument<const py::tuple&> {
    static constexpr const char* kName = "tuple";
    static py::tuple from(PyObject* x) {
        if (!PyTuple_Check(x)) throw py::type_error("expected a tuple");
        return py::reinterpret_borrow<py::tuple>(x);
    }
};
template <>
struct Argument<std::int64_t> {
    static constexpr const char* kName = "int";
    static std::int64_t from(PyObject* x) {
        const long long value = PyLong_AsLongLong(x);
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
};
template <>
struct Argument<int> {
    static constexpr const char* kName = "int";
    static int from(PyObject* x) { return static_cast<int>(Argument<std::int64_t>::from(x)); }
};
template <>
struct Argument<bool> {
    static constexpr const char* kName = "bool";
    static bool from(PyObject* x) {
        if (!PyBool_Check(x)) throw py::type_error("expected a bool");
        return x == Py_True;
    }
};

// An object of ours behind a capsule.
template <class T>
py::capsule held(T* object) {
    return py::capsule(object, [](void* p) { delete static_cast<T*>(p); });
}
template <class T>
struct Argument<const T&> {
    static constexpr const char* kName = "object";
    static const T& from(PyObject* x) {
        void* const p = PyCapsule_GetPointer(x, nullptr);
        if (!p) throw py::error_already_set();
        return *static_cast<const T*>(p);
    }
};

inline PyObject* to_python(std::int64_t x) { return PyLong_FromLongLong(x); }
inline PyObject* to_python(py::tuple&& x) { return x.release().ptr(); }

template <class Result, class... Args, std::size_t... I>
PyObject* call_fast(Result (*f)(Args...), PyObject* const* args, std::index_sequence<I...>) {
    return to_python(f(Argument<Args>::from(args[I])...));
}

inline const char* name_of(std::int64_t (*)()) { return "int"; }
inline const char* name_of(py::tuple (*)()) { return "tuple"; }

template <auto f>
struct FastCall;
template <class Result, class... Args, Result (*f)(Args...)>
struct FastCall<f> {
    // As pybind11 says it of its own functions.
    static std::string signature(const std::string& name) {
        std::string all;
        int place = 0;
        ((all += (place ? ", arg" : "arg") + std::to_string(place) + ": " + Argument<Args>::kName, ++place), ...);
        return name + "(" + all + ") -> " + name_of(static_cast<Result (*)()>(nullptr));
    }
    static PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
        if (count != sizeof...(Args)) {
            PyErr_Format(PyExc_TypeError, "expected %zd arguments; got %zd", static_cast<Py_ssize_t>(sizeof...(Args)),
                         count);
            return nullptr;
        }
        try {
            return call_fast(f, args, std::index_sequence_for<Args...>{});
        } catch (py::error_already_set& e) {
            e.restore();
        } catch (const py::builtin_exception& e) {
            e.set_error();
        } catch (const std::invalid_argument& e) {
            PyErr_SetString(PyExc_ValueError, e.what());
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
        } catch (const std::exception& e) {
            PyErr_SetString(PyExc_RuntimeError, e.what());
        }
        return nullptr;
    }
};

// Adds f to a module.
template <auto f>
void def_fast(py::module_& m, const char* name) {
    static const std::string doc = FastCall<f>::signature(name);
    static PyMethodDef def = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&FastCall<f>::run)),
                              METH_FASTCALL, doc.c_str()};
    m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&def, nullptr, nullptr));
}

}  // namespace fastalign
