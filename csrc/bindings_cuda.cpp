// fastalign._cuda: the CUDA kernels, by addresses, shapes, strides, dtype, device and stream. Nothing here waits for
// the device, and importing it needs neither a driver nor a device.
#include <string>

#include "../kernels/gae_cuda.h"
#include "../kernels/token_stats_cuda.h"
#include "arguments.h"
#include "cuda_usage.h"

namespace {

using namespace fastalign;

cuda::Place place_of(int device, Address stream) { return {device, at<void>(stream)}; }

template <class Args>
const Args& checked(const Args& a) {
    if (a.vocab > cuda::kMaxVocab)
        throw std::invalid_argument("logits must have a vocabulary of at most 2^30; got " + std::to_string(a.vocab));
    return a;
}

void token_stats_forward(const py::tuple& tokens, const py::tuple& outputs, int device, Address stream) {
    cuda::forward(checked(forward_args(tokens, outputs)), place_of(device, stream));
}

void token_stats_backward(const py::tuple& tokens, const py::tuple& per_row, Address out, const py::tuple& out_strides,
                          int device, Address stream) {
    cuda::backward(checked(backward_args(tokens, per_row, out, out_strides)), place_of(device, stream));
}

void token_objective(const py::tuple& tokens, const py::bytes& program, const py::tuple& inputs,
                     const py::tuple& outputs, Address out, const py::tuple& out_strides, int device, Address stream) {
    cuda::objective(checked(objective_args(tokens, program, inputs, outputs, out, out_strides)),
                    place_of(device, stream));
}

void scale(int dtype, Address data, std::int64_t count, Address factor, int device, Address stream) {
    cuda::scale(static_cast<DType>(dtype), at<void>(data), count, at<const float>(factor), place_of(device, stream));
}

template <class T>
void gae_rows(Address rewards, Address values, Address mask, Address advantages, Address returns, std::int64_t rows,
              std::int64_t length, double gamma, double gamma_lam, int device, Address stream) {
    const GaeArgs<T> args{at<const T>(rewards),
                          at<const T>(values),
                          at<const bool>(mask),
                          at<T>(advantages),
                          at<T>(returns),
                          rows,
                          length,
                          static_cast<T>(gamma),
                          static_cast<T>(gamma_lam),
                          0};
    cuda::gae(args, place_of(device, stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of fastalign. Internal: addresses are not checked here.";
    m.def("token_stats_forward", &token_stats_forward);
    m.def("token_stats_backward", &token_stats_backward);
    m.def("token_objective", &token_objective);
    m.def("scale", &scale);
    m.def("gae_float32", &gae_rows<float>);
    m.def("gae_float64", &gae_rows<double>);
    m.attr("short_bytes") = cuda::kShort;
    m.attr("one_tile_bytes") = cuda::kOneTile;
    m.attr("architectures") = FA_CUDA_ARCHITECTURES;
    m.attr("usage") = FA_CUDA_USAGE;  // JSON: architecture, kernel, registers and the like, from the assembler
}
