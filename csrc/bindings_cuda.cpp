// fastalign._cuda: the CUDA kernels, by addresses, shapes, strides, dtype, device and stream. Nothing here waits for
// the device, and importing it needs neither a driver nor a device.
#include <string>

#include "../kernels/cuda/gae_cuda.h"
#include "../kernels/cuda/loss_cuda.h"
#include "../kernels/cuda/token_stats_cuda.h"
#include "arguments.h"
#include "cuda_usage.h"
#include "fast_calls.h"
#include "programs.h"

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

struct DeviceProgram {
    std::unique_ptr<LossProgram> program;
    cuda::LossLaunch launch{};
};

// None: it has more of something than a launch takes.
py::object loss_program(const py::list& codes, const std::vector<int>& kinds, int loss, const std::vector<int>& outputs,
                        bool lists, const std::vector<int>& found) {
    auto made = std::make_unique<DeviceProgram>();
    made->program = make_program(codes, kinds, loss, outputs, lists, found);
    if (!cuda::fill_program(*made->program, made->launch)) return py::none();
    return held(made.release());
}

cuda::LossLaunch sized(const DeviceProgram& p, std::int64_t tokens, std::int64_t sequences, std::int64_t list_size) {
    cuda::LossLaunch a = p.launch;
    cuda::set_sizes(a, tokens, sequences, list_size);
    return a;
}

const DeviceProgram& program_of(const py::capsule& program) { return *program.get_pointer<DeviceProgram>(); }

// (float64 numbers of scratch, numbers of each result (-1: it is none, -2: a scalar), those of each given input, how
// many statistics the loss moves with); None: these sizes do not fit the program.
py::object loss_sizes(const py::capsule& program, std::int64_t tokens, std::int64_t sequences, std::int64_t list_size) {
    const DeviceProgram& p = program_of(program);
    if (!sizes_fit(*p.program, tokens, sequences, list_size)) return py::none();
    const cuda::LossLaunch a = sized(p, tokens, sequences, list_size);
    py::list results, given;
    std::size_t next = 0;
    for (const int found : p.program->found()) {
        if (found == LossProgram::kNone) {
            results.append(-1);
            continue;
        }
        const Level level = p.program->step(p.program->outputs()[next++]).level;
        results.append(level == Level::kBatch ? -2 : a.count(level));
    }
    for (const int input : p.program->given()) given.append(a.count(p.program->level_of_input(input)));
    return py::make_tuple(cuda::loss_scratch(a), results, given, moved(*p.program));
}

// `sizes`: tokens, sequences, sequences of a list. `labels`: address, are they int64, ignore_index. `given`: a number
// or (address, is it float64, is it one number in all places) each. `results`: (address, kind) each, see LossResult;
// `derivatives`: [moved, tokens], or 0.
void loss_terms(const py::capsule& program, const py::tuple& sizes, const py::tuple& labels,
                const std::vector<Address>& statistics, const py::tuple& given,
                const std::vector<std::pair<Address, int>>& results, Address derivatives, Address scratch, int device,
                Address stream) {
    const DeviceProgram& p = program_of(program);
    const LossProgram& loss = *p.program;
    cuda::LossLaunch a =
        sized(p, py::cast<std::int64_t>(sizes[0]), py::cast<std::int64_t>(sizes[1]), py::cast<std::int64_t>(sizes[2]));
    a.labels = at<const void>(py::cast<Address>(labels[0])), a.labels64 = py::cast<bool>(labels[1]);
    a.ignore_index = py::cast<std::int64_t>(labels[2]), a.scratch = at<double>(scratch), a.wanted = derivatives != 0;
    if (given.size() != loss.given().size() || results.size() != loss.outputs().size() || statistics.size() != 5)
        throw std::invalid_argument("a loss program must be given all that it takes");
    for (int k = 0; k < LossProgram::kStatistics; ++k) a.statistics[k] = at<const float>(statistics[k]);
    for (std::size_t i = 0; i < given.size(); ++i) {
        cuda::LossLaunch::Input& to = a.inputs[loss.given()[i]];
        if (py::isinstance<py::tuple>(given[i])) {
            const auto t = py::cast<py::tuple>(given[i]);
            using Kind = LossNumbers::Kind;
            to.numbers = {at<const void>(py::cast<Address>(t[0])), py::cast<bool>(t[1]) ? Kind::kDouble : Kind::kFloat,
                          py::cast<bool>(t[2])};
        } else {
            to.numbers = {}, to.number = py::cast<double>(given[i]);
        }
    }
    for (std::size_t i = 0; i < results.size(); ++i)
        a.results[i] = {at<void>(results[i].first), static_cast<LossResult::Kind>(results[i].second)};
    float* next = at<float>(derivatives);
    for (int k = 0; next && k < LossProgram::kStatistics; ++k)
        if (loss.moves(k)) a.derivatives[k] = next, next += a.tokens;
    cuda::run_loss(a, place_of(device, stream));
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
    m.def("loss_program", &loss_program);
    m.def("loss_sizes", &loss_sizes);
    m.def("loss_terms", &loss_terms);
    m.def("scale", &scale);
    m.def("gae_float32", &gae_rows<float>);
    m.def("gae_float64", &gae_rows<double>);
    m.attr("short_bytes") = cuda::kShort;
    m.attr("one_tile_bytes") = cuda::kOneTile;
    m.attr("architectures") = FA_CUDA_ARCHITECTURES;
    m.attr("usage") = FA_CUDA_USAGE;  // JSON: architecture, kernel, registers and the like, from the assembler
}
