// Runs a loss program in one launch of one block: tokens, sequences and pairs are shared by its threads, which meet
// after every step that looks at others' numbers. In double, as on the host, and with sums in an order that depends on
// nothing but sizes.
#include "launch_cuda.h"
#include "loss_cuda.h"

namespace fastalign::cuda {

constexpr int kLossThreads = 512;
constexpr unsigned kLanes = 0xffffffffu;

// Within their callers: a call would keep registers for its own sake.
__device__ __forceinline__ double value_at(Op op, double a, double b, double c) {
    double y = 0;
    with_operation(op, [&](auto o) { y = value_of<decltype(o)::value>(a, b, c); });
    return y;
}
__device__ __forceinline__ Pulled<double> pulled_at(Op op, double g, double a, double b, double c, double y) {
    Pulled<double> d{0, 0, 0};
    with_operation(op, [&](auto o) { d = pulled_by<decltype(o)::value>(g, a, b, c, y); });
    return d;
}

// Elements of a finer level that belong to one of a coarser level.
struct Members {
    int64_t first, count, stride;
};

class DeviceRun {
  public:
    __device__ DeviceRun(const LossLaunch& a, double* shared)
        : a_(a), shared_(shared), length_(a.sequences ? a.tokens / a.sequences : 0) {}

    __device__ void run() {
        for (int64_t e = threadIdx.x; e < a_.small; e += kLossThreads) gradient(0, e) = 0;
        for (int k = 0; k < LossProgram::kStatistics; ++k)
            for (int64_t t = threadIdx.x; a_.derivatives[k] && t < a_.tokens; t += kLossThreads)
                a_.derivatives[k][t] = 0;
        for (int s = 0; s < a_.passes; ++s) {
            each(s, LossLaunch::kBefore, [&](int i) { small_forward(i), __syncthreads(); });
            for (int64_t t = threadIdx.x; t < a_.tokens; t += kLossThreads)
                each(s, LossLaunch::kForward, [&](int i) { token_forward(i, t); });
            __syncthreads();
            each(s, LossLaunch::kSums, [&](int i) { token_sum(i); });
            __syncthreads();
        }
        for (int k = 0; k < a_.outputs; ++k) write(a_.output[k], a_.results[k]);
        if (!a_.wanted || !a_.step[a_.loss].wanted) return;
        const Level level = a_.step[a_.loss].level;
        for (int64_t e = threadIdx.x; e < a_.count(level); e += kLossThreads) gradient(a_.step[a_.loss].at, e) = 1;
        __syncthreads();
        for (int s = a_.passes - 1; s >= 0; --s) {
            if (begins(s, LossLaunch::kLossSums) != ends(s, LossLaunch::kLossSums)) pass_backward(s);
            each_backward(s, LossLaunch::kBefore, [&](int i) {
                if (a_.step[i].wanted) small_backward(i), __syncthreads();
            });
        }
    }

  private:
    // ------------------------------------------------------------------------------------------- where things are
    __device__ double& value(int64_t at, int64_t e) const { return a_.scratch[at + e]; }
    __device__ double& gradient(int64_t at, int64_t e) const { return a_.scratch[a_.small + at + e]; }
    __device__ double* token_values() const { return a_.scratch + 2 * a_.small; }
    __device__ double& token(int i, int64_t t) const { return token_values()[a_.step[i].index * a_.tokens + t]; }
    __device__ double& token_gradient(int i, int64_t t) const {
        return token_values()[(a_.token_steps + a_.step[i].index) * a_.tokens + t];
    }
    __device__ bool real(int64_t t) const {
        const int64_t label =
            a_.labels64 ? static_cast<const int64_t*>(a_.labels)[t] : static_cast<const int32_t*>(a_.labels)[t];
        return label != a_.ignore_index;
    }
    __device__ int begins(int pass, int list) const { return a_.begin[pass * LossLaunch::kLists + list]; }
    __device__ int ends(int pass, int list) const { return a_.begin[pass * LossLaunch::kLists + list + 1]; }
    template <class F>
    __device__ void each(int pass, int list, const F& f) const {
        for (int k = begins(pass, list); k < ends(pass, list); ++k) f(a_.listed[k]);
    }
    template <class F>
    __device__ void each_backward(int pass, int list, const F& f) const {
        for (int k = ends(pass, list) - 1; k >= begins(pass, list); --k) f(a_.listed[k]);
    }

    // Of an element of level `fine`, which one of level `coarse` it belongs to.
    __device__ int64_t owner(int64_t e, Level fine, Level coarse, Way how) const {
        if (fine == coarse) return e;
        if (coarse == Level::kBatch) return 0;
        const int64_t size = a_.list_size;
        if (fine == Level::kComparison) {
            const int64_t b = e / (size * size), rest = e % (size * size);
            if (coarse == Level::kGroup) return b;
            return b * size + (how == Way::kOther ? rest % size : rest / size);
        }
        const int64_t sequence = fine == Level::kToken ? e / length_ : e;
        if (coarse == Level::kSequence) return sequence;
        return a_.lists ? sequence / size : sequence % a_.groups;
    }

    __device__ Members members(int64_t o, Level fine, Level coarse, Way how) const {
        const int64_t size = a_.list_size;
        if (fine == coarse) return {o, 1, 1};
        if (coarse == Level::kBatch) return {0, a_.count(fine), 1};
        if (fine == Level::kComparison) {
            if (coarse == Level::kGroup) return {o * size * size, size * size, 1};
            if (how == Way::kOther) return {o / size * size * size + o % size, size, size};
            return {o * size, size, 1};
        }
        const int64_t each = fine == Level::kToken ? length_ : 1;
        if (coarse == Level::kSequence) return {o * each, each, 1};
        if (a_.lists) return {o * size * each, size * each, 1};
        return {o, 2, a_.groups};  // of sequences: the sides of a pair
    }

    // ------------------------------------------------------------------------------------------- sums
    // Of one number of each thread, in every thread.
    __device__ double block_sum(double mine) const {
        for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(kLanes, mine, distance);
        __syncthreads();  // what was there has been read
        if (threadIdx.x % 32 == 0) shared_[threadIdx.x / 32] = mine;
        __syncthreads();
        double all = 0;
        for (int w = 0; w < kLossThreads / 32; ++w) all += shared_[w];
        return all;
    }

    // Adds f(element) over the members of each o of a coarser level to g(o).
    template <class F, class G>
    __device__ void sums(Level fine, Level coarse, Way how, const F& f, const G& g) const {
        const int64_t out = a_.count(coarse);
        if (coarse == Level::kBatch) {
            double mine = 0;
            for (int64_t e = threadIdx.x; e < a_.count(fine); e += kLossThreads) mine += f(e);
            const double all = block_sum(mine);
            if (threadIdx.x == 0) g(0, all);
        } else if (fine == Level::kToken) {  // a warp each
            const int lane = threadIdx.x % 32;
            for (int64_t o = threadIdx.x / 32; o < out; o += kLossThreads / 32) {
                const Members m = members(o, fine, coarse, how);
                double mine = 0;
                for (int64_t j = lane; j < m.count; j += 32) mine += f(m.first + j * m.stride);
                for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(kLanes, mine, distance);
                if (lane == 0) g(o, mine);
            }
        } else {
            for (int64_t o = threadIdx.x; o < out; o += kLossThreads) {
                const Members m = members(o, fine, coarse, how);
                double sum = 0;
                for (int64_t j = 0; j < m.count; ++j) sum += f(m.first + j * m.stride);
                g(o, sum);
            }
        }
    }

    __device__ void token_sum(int i) const {
        const LossLaunch::Step& s = a_.step[i];
        const int x = s.operands[0];
        sums(
            Level::kToken, s.level, s.how, [&](int64_t t) { return real(t) ? token(x, t) : 0.0; },
            [&](int64_t o, double sum) { value(s.at, o) = sum; });
    }

    // ------------------------------------------------------------------------------------------- steps
    __device__ double input(int which, int64_t e) const {
        const LossLaunch::Input& x = a_.inputs[which];
        if (x.kind == LossProgram::kPosition) return static_cast<double>(e % a_.list_size);
        if (x.kind == LossProgram::kMask) return real(e) ? 1 : 0;
        if (x.kind >= 0) return a_.statistics[x.kind][e];
        return x.numbers.at ? x.numbers[e] : x.number;
    }

    __device__ void token_forward(int i, int64_t t) const {
        const LossLaunch::Step& s = a_.step[i];
        double& y = token(i, t);
        if (s.op == Op::kInput) {
            y = input(s.at, t);
        } else if (s.op == Op::kConst) {
            y = a_.constants[s.at];
        } else if (s.op == Op::kSpread) {
            const LossLaunch::Step& from = a_.step[s.operands[0]];
            y = value(from.at, owner(t, Level::kToken, from.level, s.how));
        } else {
            y = value_at(s.op, token(s.operands[0], t), token(s.operands[1], t), token(s.operands[2], t));
        }
    }

    __device__ void small_forward(int i) const {
        const LossLaunch::Step& s = a_.step[i];
        if (reduces(s.op)) return reduce(s);
        const LossLaunch::Step &a = a_.step[s.operands[0]], &b = a_.step[s.operands[1]], &c = a_.step[s.operands[2]];
        const int64_t n = a_.count(s.level);
        for (int64_t e = threadIdx.x; e < n; e += kLossThreads) {
            double& y = value(s.at, e);
            if (s.op == Op::kInput) y = input(s.index, e);
            else if (s.op == Op::kConst) y = a_.constants[s.index];
            else if (s.op == Op::kSpread) y = value(a.at, owner(e, s.level, a.level, s.how));
            else if (s.op == Op::kPick) y = value(a.at, e + static_cast<int64_t>(s.how) * n);
            else y = value_at(s.op, value(a.at, e), value(b.at, e), value(c.at, e));
        }
    }

    __device__ void reduce(const LossLaunch::Step& s) const {
        const LossLaunch::Step& x = a_.step[s.operands[0]];
        if (s.op == Op::kSum) {
            return sums(
                x.level, s.level, s.how, [&](int64_t e) { return value(x.at, e); },
                [&](int64_t o, double sum) { value(s.at, o) = sum; });
        }
        for (int64_t o = threadIdx.x; o < a_.count(s.level); o += kLossThreads) {
            const Members m = members(o, x.level, s.level, s.how);
            double most = -INFINITY, sum = 0;
            for (int64_t j = 0; j < m.count; ++j)
                most = value_of<Op::kMaximum>(value(x.at, m.first + j * m.stride), most, 0.0);
            if (s.op == Op::kLogSumExp && isfinite(most)) {
                for (int64_t j = 0; j < m.count; ++j) {
                    const double z = value(x.at, m.first + j * m.stride);
                    if (z != -INFINITY) sum += z == most ? 1.0 : exp(z - most);
                }
                most += log(sum);
            }
            value(s.at, o) = most;
        }
    }

    __device__ void write(int i, const LossResult& to) const {
        const LossLaunch::Step& s = a_.step[i];
        for (int64_t e = threadIdx.x; e < a_.count(s.level); e += kLossThreads) {
            const double y = value(s.at, e);
            if (to.kind == LossResult::Kind::kFloat) static_cast<float*>(to.at)[e] = static_cast<float>(y);
            else if (to.kind == LossResult::Kind::kDouble) static_cast<double*>(to.at)[e] = y;
            else static_cast<int64_t*>(to.at)[e] = static_cast<int64_t>(y);
        }
    }

    // ------------------------------------------------------------------------------------------- backward
    __device__ void pass_backward(int pass) const {
        for (int64_t t = threadIdx.x; t < a_.tokens; t += kLossThreads) {
            each(pass, LossLaunch::kBackward, [&](int i) { token_gradient(i, t) = 0; });
            if (!real(t)) continue;
            each(pass, LossLaunch::kLossSums, [&](int i) {
                const LossLaunch::Step& s = a_.step[i];
                if (a_.step[s.operands[0]].wanted)
                    token_gradient(s.operands[0], t) += gradient(s.at, owner(t, Level::kToken, s.level, s.how));
            });
            each_backward(pass, LossLaunch::kBackward, [&](int i) {
                if (a_.step[i].wanted) token_backward(i, t);
            });
        }
        __syncthreads();
        each(pass, LossLaunch::kBackward, [&](int i) {
            const LossLaunch::Step& s = a_.step[i];
            if (s.op != Op::kSpread || !s.wanted) return;
            const LossLaunch::Step& to = a_.step[s.operands[0]];
            sums(
                Level::kToken, to.level, s.how, [&](int64_t t) { return token_gradient(i, t); },
                [&](int64_t o, double sum) { gradient(to.at, o) += sum; });
            __syncthreads();
        });
    }

    __device__ void token_backward(int i, int64_t t) const {
        const LossLaunch::Step& s = a_.step[i];
        const double own = token_gradient(i, t);
        if (s.op == Op::kConst || s.op == Op::kSpread) return;  // spreads are summed when all tokens are through
        if (s.op == Op::kInput) {
            float& to = a_.derivatives[a_.inputs[s.at].kind][t];
            to = static_cast<float>(to + own);
            return;
        }
        const int a = s.operands[0], b = s.operands[1], c = s.operands[2];
        if (own == 0) return;
        const Pulled<double> d = pulled_at(s.op, own, token(a, t), token(b, t), token(c, t), token(i, t));
        if (a_.step[a].wanted) token_gradient(a, t) += d.a;
        if (a_.step[b].wanted) token_gradient(b, t) += d.b;
        if (a_.step[c].wanted) token_gradient(c, t) += d.c;
    }

    __device__ void small_backward(int i) const {
        const LossLaunch::Step& s = a_.step[i];
        if (s.op == Op::kInput || s.op == Op::kConst) return;
        const LossLaunch::Step &a = a_.step[s.operands[0]], &b = a_.step[s.operands[1]], &c = a_.step[s.operands[2]];
        if (s.op == Op::kSpread) {
            return sums(
                s.level, a.level, s.how, [&](int64_t e) { return gradient(s.at, e); },
                [&](int64_t o, double sum) { gradient(a.at, o) += sum; });
        }
        if (reduces(s.op)) return pull_reduced(s, a);
        const int64_t n = a_.count(s.level);
        for (int64_t e = threadIdx.x; e < n; e += kLossThreads) {
            const double g = gradient(s.at, e);
            if (g == 0) continue;
            if (s.op == Op::kPick) {
                gradient(a.at, e + static_cast<int64_t>(s.how) * n) += g;
                continue;
            }
            const Pulled<double> d = pulled_at(s.op, g, value(a.at, e), value(b.at, e), value(c.at, e), value(s.at, e));
            if (a.wanted) gradient(a.at, e) += d.a;
            if (b.wanted) gradient(b.at, e) += d.b;
            if (c.wanted) gradient(c.at, e) += d.c;
        }
    }

    __device__ void pull_reduced(const LossLaunch::Step& s, const LossLaunch::Step& x) const {
        for (int64_t o = threadIdx.x; s.op == Op::kMax && o < a_.count(s.level); o += kLossThreads) {
            const Members m = members(o, x.level, s.level, s.how);
            double equal = 0;  // how many share a maximum
            for (int64_t j = 0; j < m.count; ++j) equal += value(x.at, m.first + j * m.stride) == value(s.at, o);
            const double g = gradient(s.at, o);
            for (int64_t j = 0; g != 0 && j < m.count; ++j) {
                const int64_t e = m.first + j * m.stride;
                if (value(x.at, e) == value(s.at, o)) gradient(x.at, e) += g / equal;
            }
        }
        if (s.op == Op::kMax) return;
        for (int64_t e = threadIdx.x; e < a_.count(x.level); e += kLossThreads) {
            const int64_t o = owner(e, x.level, s.level, s.how);
            const double g = gradient(s.at, o);
            if (s.op == Op::kSum) gradient(x.at, e) += g;
            else if (g != 0 && value(x.at, e) != -INFINITY)
                gradient(x.at, e) += g * exp(value(x.at, e) - value(s.at, o));
        }
    }

    const LossLaunch& a_;
    double* shared_;
    int64_t length_;
};

__global__ void __launch_bounds__(kLossThreads, 1) loss_kernel(const __grid_constant__ LossLaunch a) {
    __shared__ double shared[kLossThreads / 32];
    DeviceRun(a, shared).run();
}

void run_loss(const LossLaunch& a, const Place& place) {
    constexpr const char* kName = "fastalign loss";
    const OnDevice guard(kName, place);
    launch(kName, loss_kernel, {1, kLossThreads}, place, a);
}

}  // namespace fastalign::cuda
