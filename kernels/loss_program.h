// Loss programs: formulas traced from torch (fastalign/ops/programs.py), and what each of their operations is, value
// and derivative, once, for host and device. A program is run forward for its values and then backward, step by step,
// from the loss to the statistics of the logits.
#pragma once
#include "token_stats.h"

namespace fastalign {

enum class Op : uint8_t {
    kInput,
    kConst,
    kSpread,
    kPick,
    kSum,
    kMax,
    kLogSumExp,
    kAdd,
    kSub,
    kMul,
    kDiv,
    kMaximum,
    kMinimum,
    kClampMin,
    kClampMax,
    kExp,
    kExpm1,
    kLog,
    kLog1p,
    kSigmoid,
    kLogSigmoid,
    kTanh,
    kRelu,
    kSquare,
    kSqrt,
    kAbs,
    kLt,
    kLe,
    kGt,
    kGe,
    kEq,
    kNe,
    kAnd,
    kOr,
    kNot,
    kWhere,
    kDetach,
    kFloat32
};
constexpr int kOperations = static_cast<int>(Op::kFloat32) + 1;

FA_HD double exp_of(double x) { return exp(x); }
FA_HD float exp_of(float x) { return expf(x); }
FA_HD double expm1_of(double x) { return expm1(x); }
FA_HD float expm1_of(float x) { return expm1f(x); }
FA_HD double log_of(double x) { return log(x); }
FA_HD float log_of(float x) { return logf(x); }
FA_HD double log1p_of(double x) { return log1p(x); }
FA_HD float log1p_of(float x) { return log1pf(x); }
FA_HD double tanh_exact(double x) { return tanh(x); }
FA_HD float tanh_exact(float x) { return tanhf(x); }
FA_HD double sqrt_of(double x) { return sqrt(x); }
FA_HD float sqrt_of(float x) { return sqrtf(x); }

template <class Real>
FA_HD Real sigmoid_of(Real x) {
    const Real small = exp_of(x < 0 ? x : -x);
    return (x < 0 ? small : Real(1)) / (1 + small);
}
template <class Real>
FA_HD Real log_sigmoid_of(Real x) {
    return (x < 0 ? x : Real(0)) - log1p_of(exp_of(x < 0 ? x : -x));
}

// The value of an operation on a, b, c.
template <Op op, class Real>
FA_HD Real value_of(Real a, Real b, Real c) {
    (void)b, (void)c;
    if constexpr (op == Op::kAdd) return a + b;
    else if constexpr (op == Op::kSub) return a - b;
    else if constexpr (op == Op::kMul) return a * b;
    else if constexpr (op == Op::kDiv) return a / b;
    // As torch has it, NaN on either side is NaN.
    else if constexpr (op == Op::kMaximum) return a != a || a > b ? a : b;
    else if constexpr (op == Op::kMinimum) return a != a || a < b ? a : b;
    else if constexpr (op == Op::kClampMin) return a < b ? b : a;
    else if constexpr (op == Op::kClampMax) return a > b ? b : a;
    else if constexpr (op == Op::kExp) return exp_of(a);
    else if constexpr (op == Op::kExpm1) return expm1_of(a);
    else if constexpr (op == Op::kLog) return log_of(a);
    else if constexpr (op == Op::kLog1p) return log1p_of(a);
    else if constexpr (op == Op::kSigmoid) return sigmoid_of(a);
    else if constexpr (op == Op::kLogSigmoid) return log_sigmoid_of(a);
    else if constexpr (op == Op::kTanh) return tanh_exact(a);
    else if constexpr (op == Op::kRelu) return a < 0 ? Real(0) : a;
    else if constexpr (op == Op::kSquare) return a * a;
    else if constexpr (op == Op::kSqrt) return sqrt_of(a);
    else if constexpr (op == Op::kAbs) return a < 0 ? -a : a;
    else if constexpr (op == Op::kLt) return a < b;
    else if constexpr (op == Op::kLe) return a <= b;
    else if constexpr (op == Op::kGt) return a > b;
    else if constexpr (op == Op::kGe) return a >= b;
    else if constexpr (op == Op::kEq) return a == b;
    else if constexpr (op == Op::kNe) return a != b;
    else if constexpr (op == Op::kAnd) return a != 0 && b != 0;
    else if constexpr (op == Op::kOr) return a != 0 || b != 0;
    else if constexpr (op == Op::kNot) return a == 0;
    else if constexpr (op == Op::kWhere) return a != 0 ? b : c;
    else if constexpr (op == Op::kFloat32) return static_cast<Real>(static_cast<float>(a));
    else return a;  // kDetach
}

// Gradients of a loss for an operation's operands.
template <class Real>
struct Pulled {
    Real a, b, c;
};

// From that for its result, g, which is not 0: where it is 0 there is nothing to pull, and 0 times infinity is NaN.
template <Op op, class Real>
FA_HD Pulled<Real> pulled_by(Real g, Real a, Real b, Real c, Real y) {
    (void)a, (void)b, (void)c, (void)y;
    if constexpr (op == Op::kAdd) return {g, g, 0};
    else if constexpr (op == Op::kSub) return {g, -g, 0};
    else if constexpr (op == Op::kMul) return {g * b, g * a, 0};
    else if constexpr (op == Op::kDiv) return {g / b, -g * y / b, 0};
    // Equals share, as in torch.
    else if constexpr (op == Op::kMaximum) return {a > b ? g : a < b ? 0 : g / 2, a < b ? g : a > b ? 0 : g / 2, 0};
    else if constexpr (op == Op::kMinimum) return {a < b ? g : a > b ? 0 : g / 2, a > b ? g : a < b ? 0 : g / 2, 0};
    else if constexpr (op == Op::kClampMin) return {a < b ? 0 : g, a < b ? g : 0, 0};
    else if constexpr (op == Op::kClampMax) return {a > b ? 0 : g, a > b ? g : 0, 0};
    else if constexpr (op == Op::kExp) return {g * y, 0, 0};
    else if constexpr (op == Op::kExpm1) return {g * (y + 1), 0, 0};
    else if constexpr (op == Op::kLog) return {g / a, 0, 0};
    else if constexpr (op == Op::kLog1p) return {g / (1 + a), 0, 0};
    else if constexpr (op == Op::kSigmoid) return {g * y * sigmoid_of(-a), 0, 0};
    else if constexpr (op == Op::kLogSigmoid) return {g * sigmoid_of(-a), 0, 0};
    else if constexpr (op == Op::kTanh) return {g * (1 - y * y), 0, 0};
    else if constexpr (op == Op::kRelu) return {a > 0 ? g : 0, 0, 0};
    else if constexpr (op == Op::kSquare) return {2 * g * a, 0, 0};
    else if constexpr (op == Op::kSqrt) return {g / (2 * y), 0, 0};
    else if constexpr (op == Op::kAbs) return {a > 0 ? g : a < 0 ? -g : 0, 0, 0};
    else if constexpr (op == Op::kWhere) return {0, a != 0 ? g : 0, a != 0 ? 0 : g};
    else if constexpr (op == Op::kFloat32) return {g, 0, 0};
    else return {0, 0, 0};  // comparisons, logic, detach
}

// Calls f with the operation as a compile-time constant.
template <Op op>
struct OpConstant {
    static constexpr Op value = op;
};
template <class F>
FA_HD void with_operation(Op op, const F& f) {
#define FA_OPERATION(name) \
    case Op::name:         \
        return f(OpConstant<Op::name>{});
    switch (op) {
        FA_OPERATION(kAdd)
        FA_OPERATION(kSub)
        FA_OPERATION(kMul)
        FA_OPERATION(kDiv)
        FA_OPERATION(kMaximum)
        FA_OPERATION(kMinimum)
        FA_OPERATION(kClampMin)
        FA_OPERATION(kClampMax)
        FA_OPERATION(kExp)
        FA_OPERATION(kExpm1)
        FA_OPERATION(kLog)
        FA_OPERATION(kLog1p)
        FA_OPERATION(kSigmoid)
        FA_OPERATION(kLogSigmoid)
        FA_OPERATION(kTanh)
        FA_OPERATION(kRelu)
        FA_OPERATION(kSquare)
        FA_OPERATION(kSqrt)
        FA_OPERATION(kAbs)
        FA_OPERATION(kLt)
        FA_OPERATION(kLe)
        FA_OPERATION(kGt)
        FA_OPERATION(kGe)
        FA_OPERATION(kEq)
        FA_OPERATION(kNe)
        FA_OPERATION(kAnd)
        FA_OPERATION(kOr)
        FA_OPERATION(kNot)
        FA_OPERATION(kWhere)
        FA_OPERATION(kDetach)
        FA_OPERATION(kFloat32)
        default:
            return;
    }
#undef FA_OPERATION
}

// ------------------------------------------------------------------------------------------- one token by itself
// A program of one token, by value, for the kernels that read the logits once. Its numbers lie in slots: the statistics
// in their order, what the token is given, constants, and the results of the steps, whose operands are earlier slots.
struct TokenProgram {
    static constexpr int kStatistics = 5, kMaxInputs = 8, kMaxConstants = 16, kMaxSteps = 64;
    static constexpr int kMaxSlots = kStatistics + kMaxInputs + kMaxConstants + kMaxSteps;
    struct Step {
        uint8_t op, a, b, c;
    };
    int inputs, constants, steps, loss;  // how many, and the slot of the loss
    float values[kMaxConstants];
    Step step[kMaxSteps];
};

// The gradient of weight * loss for the statistics; `input(i)`: the token's i-th number.
template <class Input>
FA_HD Grads token_slopes(const TokenProgram& p, const Stats& of, const Input& input, float weight) {
    float y[TokenProgram::kMaxSlots], g[TokenProgram::kMaxSlots];
    constexpr int kGiven = TokenProgram::kStatistics;
    y[0] = of.logps, y[1] = of.lse, y[2] = of.entropy, y[3] = of.kl, y[4] = of.mean;
    for (int i = 0; i < p.inputs; ++i) y[kGiven + i] = input(i);
    const int constants = kGiven + p.inputs, first = constants + p.constants, end = first + p.steps;
    for (int i = 0; i < p.constants; ++i) y[constants + i] = p.values[i];
    for (int i = first; i < end; ++i) {
        const TokenProgram::Step s = p.step[i - first];
        with_operation(static_cast<Op>(s.op),
                       [&](auto o) { y[i] = value_of<decltype(o)::value>(y[s.a], y[s.b], y[s.c]); });
    }
    for (int i = 0; i < end; ++i) g[i] = 0;
    g[p.loss] = weight;
    for (int i = end - 1; i >= first; --i) {
        if (g[i] == 0) continue;
        const TokenProgram::Step s = p.step[i - first];
        with_operation(static_cast<Op>(s.op), [&](auto o) {
            const Pulled<float> d = pulled_by<decltype(o)::value>(g[i], y[s.a], y[s.b], y[s.c], y[i]);
            g[s.a] += d.a, g[s.b] += d.b, g[s.c] += d.c;
        });
    }
    return {g[0], g[1], g[2], g[3], g[4]};
}

}  // namespace fastalign
