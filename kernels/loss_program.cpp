// From the steps of a program to the passes that run it.
#include <algorithm>

#include "cpu/loss_interpreter.h"

namespace fastalign {

LossProgram::LossProgram(std::vector<LossStep> steps, std::vector<int> kinds, int loss, std::vector<int> outputs,
                         bool lists, std::vector<int> found)
    : steps_(std::move(steps)),
      kinds_(std::move(kinds)),
      outputs_(std::move(outputs)),
      found_(std::move(found)),
      input_levels_(kinds_.size(), Level::kToken),
      loss_(loss),
      lists_(lists) {
    for (int i = 0; i < static_cast<int>(kinds_.size()); ++i)
        if (kinds_[i] < kPosition) given_.push_back(i);
    wanted_.assign(steps_.size(), 0), slots_.assign(steps_.size(), -1);
    wanted_[loss_] = steps_[loss_].active;
    int passes = 0;
    for (int i = static_cast<int>(steps_.size()) - 1; i >= 0; --i) {
        const LossStep& s = steps_[i];
        passes = std::max(passes, s.stage + 1);
        if (s.op == Op::kInput) {
            const int input = static_cast<int>(s.value), kind = kinds_[input];
            input_levels_[input] = s.level;
            if (kind >= 0) uses_[kind] = true, moves_[kind] = moves_[kind] || wanted_[i];
        } else if (wanted_[i] && s.op != Op::kConst) {
            for (const int o : s.operands)
                if (steps_[o].active) wanted_[o] = 1;
        }
    }
    for (std::size_t i = 0; i < steps_.size(); ++i)
        if (steps_[i].level == Level::kToken) slots_[i] = token_steps_++;
    plan(passes);
}

// Steps of tokens that these sums need, in order.
void LossProgram::collect(const std::vector<int>& sums, std::vector<int>& into) const {
    std::vector<char> needed(steps_.size(), 0);
    for (const int i : sums) needed[steps_[i].operands[0]] = 1;
    for (int i = static_cast<int>(steps_.size()) - 1; i >= 0; --i) {
        const LossStep& s = steps_[i];
        if (!needed[i] || s.level != Level::kToken || s.op == Op::kInput || s.op == Op::kConst) continue;
        for (const int o : s.operands)
            if (steps_[o].level == Level::kToken) needed[o] = 1;
    }
    for (std::size_t i = 0; i < steps_.size(); ++i)
        if (needed[i] && steps_[i].level == Level::kToken) into.push_back(static_cast<int>(i));
}

// Of those steps, in order, those whose values are looked at on the way back.
void LossProgram::collect_values(const std::vector<int>& backward, std::vector<int>& into) const {
    std::vector<char> needed(steps_.size(), 0);
    for (auto i = backward.rbegin(); i != backward.rend(); ++i) {
        const LossStep& s = steps_[*i];
        const bool leaf = s.op == Op::kInput || s.op == Op::kConst || s.op == Op::kSpread;
        const bool same = s.op == Op::kAdd || s.op == Op::kSub || s.op == Op::kFloat32 || s.op == Op::kDetach;
        if (wanted_[*i] && !leaf && !same) needed[*i] = needed[*i] || s.op != Op::kMul;
        if (leaf || !(needed[*i] || (wanted_[*i] && !same))) continue;
        for (int k = 0; k < 3; ++k) {
            const bool other = needed[*i] || s.op != Op::kMul || (k < 2 && wanted_[s.operands[1 - k]]);
            if (other && steps_[s.operands[k]].level == Level::kToken) needed[s.operands[k]] = 1;
        }
    }
    for (const int i : backward)
        if (needed[i]) into.push_back(i);
}

void LossProgram::plan(int passes) {
    passes_.resize(passes);
    for (int i = 0; i < static_cast<int>(steps_.size()); ++i) {
        const LossStep& s = steps_[i];
        if (s.level == Level::kToken) continue;
        if (reduces(s.op) && steps_[s.operands[0]].level == Level::kToken) {
            passes_[s.stage - 1].sums.push_back(i);
            if (wanted_[i]) passes_[s.stage - 1].loss_sums.push_back(i);
        } else {
            passes_[s.stage].before.push_back(i);
        }
    }
    for (Pass& pass : passes_) {
        collect(pass.sums, pass.forward);
        collect(pass.loss_sums, pass.backward);
        collect_values(pass.backward, pass.values);
        for (const int i : pass.sums) pass.by_sequences = pass.by_sequences || steps_[i].level == Level::kSequence;
        for (const int i : pass.backward) {
            const LossStep& s = steps_[i];
            if (s.op != Op::kSpread || !wanted_[i]) continue;
            if (steps_[s.operands[0]].level == Level::kSequence) pass.by_sequences = true;
            else pass.alone = true;
        }
    }
}

}  // namespace fastalign
