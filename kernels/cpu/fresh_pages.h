// Pages for a large result that nothing has touched yet. Filling it costs more than the kernel that writes it, and how
// much depends on the machine: a 2 MiB page is cleared in 0.1 to 0.2 ms, but in a virtual machine that hands free
// memory back to its host (free page reporting) the host must first find it again, at 2 to 5 ms a page and far slower
// than the guest's own stock of 4 KiB pages. Nothing tells beforehand which kind comes next, so huge pages are asked
// for one by one, timed, and given up for the rest of the result at the first slow one.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastalign {

class FreshPages {
  public:
    // `touched`: they are not fresh, and only to be written past the caches.
    FreshPages(void* data, int64_t bytes, bool touched);

    // A thread is about to write `bytes` bytes from `data` on: makes them ready. Call it in roughly rising order;
    // threads may call it at once. True: write past the caches; 4 KiB pages were cleared in the cache, where a write is
    // cheap.
    bool before(const void* data, int64_t bytes);

  private:
    void ask(uintptr_t page);

    uintptr_t begin_, end_;
    bool touched_;
    std::atomic<uintptr_t> next_;  // the first huge page that nobody has asked for
    std::atomic<bool> slow_{false};
};

}  // namespace fastalign
