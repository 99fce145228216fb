// Loss programs from Python's description of them.
#pragma once
#include <memory>

#include "../kernels/cpu/loss_interpreter.h"
#include "arguments.h"

namespace fastalign {

// From `Program.encoded()`.
inline std::unique_ptr<LossProgram> make_program(const py::list& codes, const std::vector<int>& kinds, int loss,
                                                 const std::vector<int>& outputs, bool lists,
                                                 const std::vector<int>& found) {
    std::vector<LossStep> steps;
    for (const auto& code : codes) {
        const auto t = py::cast<py::tuple>(code);
        const auto operands = py::cast<std::vector<int>>(t[4]);
        LossStep s{static_cast<Op>(py::cast<int>(t[0])),
                   static_cast<Level>(py::cast<int>(t[1])),
                   py::cast<int>(t[2]),
                   static_cast<Way>(py::cast<int>(t[3])),
                   {0, 0, 0},
                   py::cast<double>(t[5]),
                   py::cast<bool>(t[6])};
        // Operations of fewer operands see the first one again, whose derivative there is 0.
        for (std::size_t i = 0; i < 3 && !operands.empty(); ++i) s.operands[i] = operands[i < operands.size() ? i : 0];
        steps.push_back(s);
    }
    return std::make_unique<LossProgram>(std::move(steps), kinds, loss, outputs, lists, found);
}

inline int moved(const LossProgram& p) {
    int count = 0;
    for (int k = 0; k < LossProgram::kStatistics; ++k) count += p.moves(k);
    return count;
}

inline bool sizes_fit(const LossProgram& p, std::int64_t tokens, std::int64_t sequences, std::int64_t list_size) {
    if (sequences ? tokens % sequences : tokens) return false;
    return !p.lists() || (list_size > 0 && sequences % list_size == 0);
}

}  // namespace fastalign
