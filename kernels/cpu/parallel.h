// Work over threads. OpenMP comes from the process (torch's own runtime), never from a second library of ours.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastalign {

// Calls body(i) for i in [0, n), `grain` neighbours at a time on one thread. Which thread runs what changes from run to
// run, so a body writes only what belongs to its own i.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
    const int64_t tasks = (n + grain - 1) / grain;
    if (threads <= 1 || tasks <= 1) {
        for (int64_t i = 0; i < n; ++i) body(i);
        return;
    }
    const int used = static_cast<int>(std::min<int64_t>(threads, tasks));
    (void)used;
#pragma omp parallel for num_threads(used) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t end = std::min(n, (task + 1) * grain);
        for (int64_t i = task * grain; i < end; ++i) body(i);
    }
}

// The same for work that carries something from one i to the next: every thread makes a worker of its own, calls
// worker(i) for what it gets, in rising order, and worker.finish() at the end. Results must not depend on who got what.
template <class Make>
void parallel_workers(int64_t n, int64_t grain, int threads, const Make& make) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        auto worker = make();
        for (int64_t begin; (begin = next.fetch_add(grain)) < n;) {
            for (int64_t i = begin; i < std::min(n, begin + grain); ++i) worker(i);
        }
        worker.finish();
    };
    const int used = static_cast<int>(std::min<int64_t>(threads, (n + grain - 1) / grain));
    if (used <= 1) return work();
#pragma omp parallel num_threads(used)
    work();
}

}  // namespace fastalign
