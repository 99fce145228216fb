// A loss program as a launch takes it, by value. Runs between forward and backward of the token statistics, on numbers
// that lie on the device; nothing waits for the host.
#pragma once
#include "../cpu/loss_interpreter.h"
#include "token_stats_cuda.h"

namespace fastalign::cuda {

struct LossLaunch : LossSizes {
    static constexpr int kMaxSteps = 112, kMaxConstants = 24, kMaxInputs = 14, kMaxOutputs = 20, kMaxPasses = 4;
    static constexpr int kMaxListed = 600;  // entries of all passes' lists together
    enum List { kBefore, kForward, kBackward, kSums, kLossSums, kLists };

    struct Step {
        Op op;
        Level level;
        Way how;
        bool wanted;          // the loss's gradient goes through it
        int16_t operands[3];  // steps
        int16_t index;        // of its input, its constant, or of a token's step its place among these
        int32_t at;           // where its numbers begin among those of other levels than tokens
    };
    // What the caller gives: an address, or one number.
    struct Input {
        LossNumbers numbers;
        double number;
        int kind;  // as `LossProgram` has it
    };

    int steps, passes, outputs, loss, token_steps;
    Step step[kMaxSteps];
    double constants[kMaxConstants];
    uint8_t listed[kMaxListed];
    int16_t begin[kMaxPasses * kLists + 1];  // of each pass's lists among these
    Input inputs[kMaxInputs];
    uint8_t output[kMaxOutputs];
    LossResult results[kMaxOutputs];

    int64_t small;  // numbers of all steps of other levels than tokens
    bool lists, labels64, wanted;
    const void* labels;
    int64_t ignore_index;
    const float* statistics[LossProgram::kStatistics];
    float* derivatives[LossProgram::kStatistics];  // [tokens], where wanted and the loss moves with it
    double* scratch;                               // [loss_scratch]
};
static_assert(sizeof(LossLaunch) <= 4096, "what every driver takes as a kernel's parameters");

// The program's part of a launch. False: it has more of something than fits.
bool fill_program(const LossProgram& program, LossLaunch& a);

// Sizes and places, once the program's part is there.
void set_sizes(LossLaunch& a, int64_t tokens, int64_t sequences, int64_t list_size);
inline int64_t loss_scratch(const LossLaunch& a) { return 2 * (a.small + a.token_steps * a.tokens); }

void run_loss(const LossLaunch& args, const Place& place);

}  // namespace fastalign::cuda
