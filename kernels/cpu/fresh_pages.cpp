#include "fresh_pages.h"

#include <algorithm>

#ifdef __linux__
#include <sys/mman.h>
#include <time.h>
#endif

namespace fastalign {
namespace {

constexpr uintptr_t kHuge = uintptr_t{1} << 21, kSmall = 4096;

uintptr_t round_up(uintptr_t x, uintptr_t to) { return (x + to - 1) / to * to; }

#if defined(__linux__) && defined(MADV_HUGEPAGE)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older ones answer EINVAL, and pages come at the first write
#endif

// Ten times what clearing takes, a third of what a host takes.
constexpr double kSlow = 1e-3;

// This thread's processor time in seconds: another program's turn on the processor must not look like a slow page.
double thread_seconds() {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// All of this is a wish: failure is fine.
void populate(uintptr_t begin, uintptr_t end) {
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
}

double huge_page(uintptr_t page) {
    madvise(reinterpret_cast<void*>(page), kHuge, MADV_HUGEPAGE);
    const double start = thread_seconds();
    populate(page, page + kSmall);
    return thread_seconds() - start;
}
#else
constexpr double kSlow = 0;
void populate(uintptr_t, uintptr_t) {}
double huge_page(uintptr_t) { return 0; }
#endif

}  // namespace

FreshPages::FreshPages(void* data, int64_t bytes, bool touched)
    : begin_(reinterpret_cast<uintptr_t>(data)),
      end_(begin_ + static_cast<uintptr_t>(bytes)),
      touched_(touched),
      next_(round_up(begin_, kHuge)) {}

void FreshPages::ask(uintptr_t page) {
    if (huge_page(page) > kSlow) slow_.store(true, std::memory_order_relaxed);
}

bool FreshPages::before(const void* data, int64_t bytes) {
    if (touched_) return true;
    // Two pages ahead: a thread that writes to a page before it is asked for makes it one of 4 KiB pages.
    const uintptr_t from = reinterpret_cast<uintptr_t>(data), to = from + static_cast<uintptr_t>(bytes);
    const uintptr_t ahead = std::min(end_, to + 2 * kHuge);
    while (!slow_.load(std::memory_order_relaxed)) {
        uintptr_t page = next_.load(std::memory_order_relaxed);
        if (page + kHuge > ahead) return true;
        if (next_.compare_exchange_weak(page, page + kHuge, std::memory_order_relaxed)) ask(page);
    }
    populate(std::max(from / kSmall * kSmall, round_up(begin_, kSmall)),
             std::min(round_up(to, kSmall), end_ / kSmall * kSmall));
    return false;
}

}  // namespace fastalign
