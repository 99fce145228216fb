// Runs loss programs on the host, in double: forward from the statistics of tokens to a loss and its metrics, backward
// to the loss's gradient for every statistic of every token. Sums are taken in one order, whatever the threads.
#pragma once
#include <cstdint>
#include <vector>

#include "../loss_program.h"

namespace fastalign {

// In the order of fastalign/ops/operations.py.
enum class Level : uint8_t { kToken, kSequence, kComparison, kGroup, kBatch };
enum class Way : uint8_t { kOwner, kCompared, kOther };

FA_HD bool reduces(Op op) { return op == Op::kSum || op == Op::kMax || op == Op::kLogSumExp; }

struct LossStep {
    Op op;
    Level level;
    int stage;
    Way how;
    int operands[3];
    double value;
    bool active;
};

// Numbers that a program is given, dense or one number for all: float32, float64, or bytes that are 0 or not.
struct LossNumbers {
    enum class Kind : uint8_t { kFloat, kDouble, kByte };
    const void* at = nullptr;
    Kind kind = Kind::kFloat;
    bool same = false;

    FA_MEMBER double operator[](int64_t i) const {
        if (same) i = 0;
        switch (kind) {
            case Kind::kFloat:
                return static_cast<const float*>(at)[i];
            case Kind::kDouble:
                return static_cast<const double*>(at)[i];
            default:
                return static_cast<const uint8_t*>(at)[i] ? 1 : 0;
        }
    }
};

class LossProgram {
  public:
    static constexpr int kStatistics = 5, kMask = -1, kPosition = -2;

    // `kinds`: of each input, the statistic that it is, kMask, kPosition (of a sequence in its list), or, below that,
    // what the caller gives. `found`: of each of the formula's results, whether it is none, a number or a count.
    LossProgram(std::vector<LossStep> steps, std::vector<int> kinds, int loss, std::vector<int> outputs, bool lists,
                std::vector<int> found);

    bool uses(int statistic) const { return uses_[statistic]; }
    bool moves(int statistic) const { return moves_[statistic]; }  // the loss depends on it
    const std::vector<int>& outputs() const { return outputs_; }
    enum Found { kNone, kNumber, kCount };
    const std::vector<int>& found() const { return found_; }
    const std::vector<int>& given() const { return given_; }  // inputs that the caller gives
    const LossStep& step(int i) const { return steps_[i]; }
    int inputs() const { return static_cast<int>(kinds_.size()); }
    Level level_of_input(int input) const { return input_levels_[input]; }
    bool lists() const { return lists_; }
    int steps() const { return static_cast<int>(steps_.size()); }
    int loss() const { return loss_; }
    int kind(int input) const { return kinds_[input]; }
    bool wanted(int i) const { return wanted_[i]; }  // the loss's gradient goes through the step

    struct Pass {
        std::vector<int> before;    // steps of other levels that run ahead of it
        std::vector<int> forward;   // steps of tokens that its sums need
        std::vector<int> backward;  // those of tokens that the loss's sums need
        std::vector<int> values;    // of these: those whose value the gradient needs
        std::vector<int> sums, loss_sums;
        bool by_sequences = false, alone = false;
    };
    const std::vector<Pass>& passes() const { return passes_; }

  private:
    friend class LossRun;
    void collect(const std::vector<int>& sums, std::vector<int>& into) const;
    void collect_values(const std::vector<int>& backward, std::vector<int>& into) const;
    void plan(int passes);

    std::vector<LossStep> steps_;
    std::vector<int> kinds_, outputs_, given_, slots_, found_;
    std::vector<Level> input_levels_;
    std::vector<Pass> passes_;
    std::vector<char> wanted_;  // the loss's gradient goes through it
    int loss_, token_steps_ = 0;
    bool lists_, uses_[kStatistics] = {}, moves_[kStatistics] = {};
};

// Where a result goes, and what as.
struct LossResult {
    enum class Kind : uint8_t { kFloat, kDouble, kInteger };
    void* at;
    Kind kind;
};

// How many there are of what a program runs on.
struct LossSizes {
    int64_t tokens = 0, sequences = 0, groups = 0, list_size = 1;

    // `lists`: groups are lists and not pairs.
    void set(int64_t tokens_, int64_t sequences_, int64_t list_size_, bool lists) {
        tokens = tokens_, sequences = sequences_, list_size = list_size_;
        groups = lists ? sequences / list_size : sequences / 2;
    }

    FA_MEMBER int64_t count(Level level) const {
        switch (level) {
            case Level::kToken:
                return tokens;
            case Level::kSequence:
                return sequences;
            case Level::kComparison:
                return groups * list_size * list_size;
            case Level::kGroup:
                return groups;
            default:
                return 1;
        }
    }
};

// What a program is run on: statistics and given numbers, null where it does not use them.
struct LossData : LossSizes {
    const uint8_t* real = nullptr;  // [tokens], 1 at those that count
    const float* statistics[LossProgram::kStatistics] = {};
    std::vector<LossNumbers> inputs;                    // by input; of statistics and mask unused
    float* derivatives[LossProgram::kStatistics] = {};  // [tokens], where the loss moves with it; null: not wanted
    std::vector<LossResult> outputs;                    // one per output of the program, of its level's size
    int threads = 1;
};

void run_loss(const LossProgram& program, const LossData& data);

}  // namespace fastalign
