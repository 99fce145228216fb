// From a loss program to what a launch takes.
#include "loss_cuda.h"

namespace fastalign::cuda {

namespace {

class Filling {
  public:
    Filling(const LossProgram& program, LossLaunch& a) : p_(program), a_(a) {}

    bool run() {
        const auto& passes = p_.passes();
        const int steps = p_.steps();
        if (steps > LossLaunch::kMaxSteps || passes.size() > LossLaunch::kMaxPasses ||
            p_.inputs() > LossLaunch::kMaxInputs || p_.outputs().size() > LossLaunch::kMaxOutputs)
            return false;
        a_.steps = steps, a_.passes = static_cast<int>(passes.size()), a_.loss = p_.loss(), a_.lists = p_.lists();
        a_.outputs = static_cast<int>(p_.outputs().size()), a_.token_steps = 0;
        for (int i = 0; i < p_.inputs(); ++i) a_.inputs[i].kind = p_.kind(i);
        for (int i = 0; i < a_.outputs; ++i) a_.output[i] = static_cast<uint8_t>(p_.outputs()[i]);
        for (int i = 0; i < steps; ++i)
            if (!step(i)) return false;
        a_.begin[0] = 0;
        for (int s = 0; s < a_.passes; ++s) {
            const auto& pass = passes[s];
            const std::vector<int>* const lists[] = {&pass.before, &pass.forward, &pass.backward, &pass.sums,
                                                     &pass.loss_sums};
            for (int k = 0; k < LossLaunch::kLists; ++k)
                if (!list(s * LossLaunch::kLists + k, *lists[k])) return false;
        }
        return true;
    }

  private:
    bool step(int i) {
        const LossStep& s = p_.step(i);
        const bool token = s.level == Level::kToken;
        LossLaunch::Step& to = a_.step[i];
        to = {s.op, s.level, s.how, p_.wanted(i), {}, 0, 0};
        for (int k = 0; k < 3; ++k) to.operands[k] = static_cast<int16_t>(s.operands[k]);
        int known = 0;  // of its input or constant
        if (s.op == Op::kInput) known = static_cast<int>(s.value);
        if (s.op == Op::kConst) {
            if (constants_ == LossLaunch::kMaxConstants) return false;
            a_.constants[known = constants_++] = s.value;
        }
        if (token) to.index = static_cast<int16_t>(a_.token_steps++), to.at = known;
        else to.index = static_cast<int16_t>(known);
        // Tokens of the two sides of a pair do not lie in one run.
        const bool across = reduces(s.op) || s.op == Op::kSpread;
        const Level other = across ? p_.step(s.operands[0]).level : s.level;
        return !((token || other == Level::kToken) && (s.level == Level::kGroup || other == Level::kGroup)) ||
               p_.lists();
    }

    bool list(int at, const std::vector<int>& from) {
        int next = a_.begin[at];
        if (next + from.size() > LossLaunch::kMaxListed) return false;
        for (const int i : from) a_.listed[next++] = static_cast<uint8_t>(i);
        a_.begin[at + 1] = static_cast<int16_t>(next);
        return true;
    }

    const LossProgram& p_;
    LossLaunch& a_;
    int constants_ = 0;
};

}  // namespace

bool fill_program(const LossProgram& program, LossLaunch& a) { return Filling(program, a).run(); }

void set_sizes(LossLaunch& a, int64_t tokens, int64_t sequences, int64_t list_size) {
    a.set(tokens, sequences, list_size, a.lists);
    a.small = 0;
    for (int i = 0; i < a.steps; ++i) {
        LossLaunch::Step& s = a.step[i];
        if (s.level == Level::kToken) continue;
        s.at = static_cast<int32_t>(a.small);
        a.small += a.count(s.level);
    }
}

}  // namespace fastalign::cuda
