// Work over threads. OpenMP comes from the process (torch's own runtime), never from a second library of ours.
#pragma once
#include <algorithm>
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

}  // namespace fastalign
