// Calls on tensors that run a loss program: from logits, or from statistics that somebody else has made of them.
#pragma once
#include <memory>

#include "../kernels/cpu/token_stats_cpu.h"
#include "programs.h"
#include "tensors.h"

namespace fastalign {

// What the caller gives beside the logits: tensors of float32 or float64, dense or one number in all places, and plain
// numbers. False: something else.
class Given {
  public:
    bool fill(const LossProgram& p, const py::tuple& given, LossData& data) {
        if (given.size() != p.given().size()) return false;
        numbers_.resize(given.size());
        data.inputs.resize(p.inputs());
        for (std::size_t i = 0; i < given.size(); ++i) {
            const int input = p.given()[i];
            if (PyFloat_Check(given[i].ptr()) || PyLong_Check(given[i].ptr())) {
                numbers_[i] = py::cast<double>(given[i]);
                data.inputs[input] = {&numbers_[i], LossNumbers::Kind::kDouble, true};
                continue;
            }
            const Seen s(given[i]);
            const int dtype = s.plain_on_cpu() ? s.dtype() : -1;
            if ((dtype != 0 && dtype != 5) || s.negated()) return false;
            const bool same =
                std::all_of(s.strides(), s.strides() + s.dims(), [](std::int64_t step) { return step == 0; });
            if (s.count() != data.count(p.level_of_input(input)) || (!same && !s.dense())) return false;
            data.inputs[input] = {s.data(), dtype == 5 ? LossNumbers::Kind::kDouble : LossNumbers::Kind::kFloat, same};
        }
        return true;
    }

  private:
    std::vector<double> numbers_;
};

// The results of a run as new tensors: the loss first and of a dtype of its own, counts as integers, None where the
// formula has none.
class Results {
  public:
    Results(const LossProgram& p, LossData& data, int dtype) : p_(p), dtype_(dtype) {
        made_.reserve(p.outputs().size()), data.outputs.reserve(p.outputs().size());
        for (std::size_t i = 0, k = 0; i < p.found().size(); ++i) {
            if (p.found()[i] == LossProgram::kNone) continue;
            const int of = i == 0 ? dtype : p.found()[i] == LossProgram::kCount ? kInt64 : kFloat32;
            const Level level = p.step(p.outputs()[k++]).level;
            const std::int64_t count = data.count(level);
            made_.emplace_back(of, level == Level::kBatch ? 0 : 1, &count);
            using Kind = LossResult::Kind;
            const Kind kind = of == kInt64 ? Kind::kInteger : of == kFloat64 ? Kind::kDouble : Kind::kFloat;
            data.outputs.push_back({made_.back().data<void>(), kind});
        }
        if (narrow()) data.outputs[0].at = &loss_;
    }
    // Whether a program's loss can be given in that dtype: that of each sequence in the wider ones alone.
    static bool fits(const LossProgram& p, int dtype) {
        const bool one = p.step(p.outputs()[0]).level == Level::kBatch;
        return dtype == kFloat32 || dtype == kFloat64 || (one && dtype >= 0 && dtype < kInt64);
    }
    py::list finish() const {
        if (narrow()) Scalar{made_[0].data<void>(), static_cast<DType>(dtype_)}.set(loss_);
        py::list all;
        std::size_t next = 0;
        for (const int found : p_.found())
            all.append(found == LossProgram::kNone ? py::object(py::none()) : made_[next++].object());
        return all;
    }

  private:
    bool narrow() const { return dtype_ != kFloat32 && dtype_ != kFloat64; }

    const LossProgram& p_;
    int dtype_;
    std::vector<NewTensor> made_;
    float loss_ = 0;
};

// Where the loss's derivatives go: one number per token for each statistic that it moves with.
inline void fill_derivatives(const LossProgram& p, LossData& data, float* derivative) {
    std::fill(derivative, derivative + moved(p) * data.tokens, 0.0f);
    for (int k = 0; k < LossProgram::kStatistics; ++k)
        if (p.moves(k)) data.derivatives[k] = derivative, derivative += data.tokens;
}

inline std::vector<uint8_t> real_tokens(const TokenArgs& a) {
    std::vector<uint8_t> real(a.rows);
    for (std::int64_t i = 0; i < a.rows; ++i) real[i] = a.label(i) != a.ignore_index;
    return real;
}

// Numbers of each statistic of a forward's rows that a program uses, in memory of their own.
struct Statistics {
    std::unique_ptr<float[]> memory;

    // The log-probabilities and logsumexps are always made.
    Statistics(const LossProgram& p, ForwardArgs& a) {
        const bool wanted[5] = {true, true, p.uses(2), p.uses(3), p.uses(4)};
        memory.reset(new float[a.rows * std::count(wanted, wanted + 5, true) + 1]);
        float* next = memory.get();
        float** const out[5] = {&a.out.logps, &a.out.lse, &a.out.entropy, &a.out.kl, &a.out.mean};
        for (int k = 0; k < 5; ++k) {
            *out[k] = wanted[k] ? next : nullptr;
            if (wanted[k]) next += a.rows;
        }
    }
};

inline void point_at(LossData& data, const PerRow<float>& out) {
    const float* const all[5] = {out.logps, out.lse, out.entropy, out.kl, out.mean};
    std::copy(all, all + 5, data.statistics);
}

// What a forward keeps of its rows for the backward, as an object of Python's that costs less than a tensor: the rows'
// saved numbers, the entropies and KLs of those whose gradient needs them, and derivatives (`derivatives` for each
// row).
class KeptRows {
  public:
    KeptRows(ForwardArgs& a, bool entropy, bool kl, int derivatives) : rows_(a.rows), entropy_(entropy), kl_(kl) {
        const std::int64_t numbers = a.rows * (4 + entropy + kl + derivatives);
        bytes_ = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, numbers * 4));
        if (!bytes_) throw py::error_already_set();
        a.saved = reinterpret_cast<float*>(PyBytes_AS_STRING(bytes_.ptr()));
        derivatives_ = a.saved + a.rows * (4 + entropy + kl);
    }
    float* derivatives() const { return derivatives_; }
    // After the forward.
    void keep(const ForwardArgs& a) const {
        float* next = a.saved + 4 * rows_;
        if (entropy_) std::copy(a.out.entropy, a.out.entropy + rows_, next), next += rows_;
        if (kl_) std::copy(a.out.kl, a.out.kl + rows_, next);
    }
    const py::object& bytes() const { return bytes_; }

    // `which`: bits of the statistics that there are derivatives for. Returns the derivatives; null: these are not such
    // bytes.
    static const float* fill(BackwardArgs& a, py::handle bytes, int which, int derivatives) {
        if (!PyBytes_CheckExact(bytes.ptr())) return nullptr;
        const bool entropy = which & 4, kl = which & 8;
        if (PyBytes_GET_SIZE(bytes.ptr()) != a.rows * (4 + entropy + kl + derivatives) * 4) return nullptr;
        const auto* next = reinterpret_cast<const float*>(PyBytes_AS_STRING(bytes.ptr()));
        a.saved = next, next += 4 * a.rows;
        if (entropy) a.entropy = next, next += a.rows;
        if (kl) a.kl = next, next += a.rows;
        return next;
    }

  private:
    py::object bytes_;
    std::int64_t rows_;
    float* derivatives_;
    bool entropy_, kl_;
};

// The reference's logits beside the policy's: of their shape and dtype. True where there are none.
inline bool fill_reference(TokenArgs& a, py::handle logits, py::handle reference) {
    if (reference.is_none()) return true;
    const Seen x(logits), z(reference);
    if (!z.plain_on_cpu() || z.dtype() != x.dtype() || z.dims() != x.dims() || z.negated()) return false;
    if (!std::equal(x.shape(), x.shape() + x.dims(), z.shape())) return false;
    const Layout layout(z.dims(), z.shape(), z.strides());
    if (layout.vocab > 1 && z.stride(z.dims() - 1) != 1) return false;
    a.ref_logits = z.data(), a.ref_layout = layout.rows;
    return true;
}

// Gradients of a loss's rows: `upstream` of the loss or of its equally long runs of rows, times the rows' own
// derivatives for each statistic that `which` names by its bit; for none, the statistic is the log-probability and the
// derivative 1.
class LossGradients {
  public:
    static int count(int which) {
        int found = 0;
        for (const int bit : kBits) found += (which & bit) != 0;
        return found;
    }

    bool fill(BackwardArgs& a, const py::tuple& upstream, const float* derivatives, int which) {
        Numbers numbers;
        for (const auto& part : upstream) {
            const Seen s(part);
            if (s.plain_on_cpu() && s.dims() == 0 && (s.dtype() == 1 || s.dtype() == 2) && !s.negated()) {
                scalar_ = Scalar{s.data(), static_cast<DType>(s.dtype())}.get();
                numbers.parts.push_back({&scalar_, 1, false, true}), ++numbers.count;
            } else if (!numbers.add(s)) {
                return false;
            }
        }
        if (a.rows > 0 && (numbers.count == 0 || a.rows % numbers.count)) return false;
        const int used = which ? count(which) : 1;
        memory_.reset(new float[used * a.rows + 1]);
        float* const first = memory_.get();
        if (a.rows > 0) numbers.spread(first, a.rows / numbers.count);
        for (int k = used - 1; k > 0; --k) std::copy(first, first + a.rows, first + k * a.rows);
        for (std::int64_t i = 0; which && i < used * a.rows; ++i) first[i] *= derivatives[i];
        const float** const to[5] = {&a.grads.logps, &a.grads.lse, &a.grads.entropy, &a.grads.kl, &a.grads.mean};
        const float* next = first;
        for (int k = 0; k < 5; ++k)
            if (which ? which & kBits[k] : k == 0) *to[k] = next, next += a.rows;
        return true;
    }

  private:
    static constexpr int kBits[5] = {1, 2, 4, 8, 16};
    std::unique_ptr<float[]> memory_;
    float scalar_ = 0;
};

}  // namespace fastalign
