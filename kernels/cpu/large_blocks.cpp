#include "large_blocks.h"

#include <algorithm>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastalign {
namespace {

constexpr std::int64_t kHuge = std::int64_t{1} << 21;

#ifdef __linux__
// Begins at a huge page.
void* map(std::int64_t bytes) {
    void* whole = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return nullptr;
    const auto from = reinterpret_cast<std::uintptr_t>(whole);
    const std::uintptr_t at = (from + kHuge - 1) / kHuge * kHuge;
    if (at > from) munmap(whole, at - from);
    munmap(reinterpret_cast<void*>(at + bytes), from + kHuge - at);
    return reinterpret_cast<void*>(at);
}
void unmap(LargeBlocks::Block block) { munmap(block.at, block.bytes); }
#else
void* map(std::int64_t bytes) { return std::malloc(bytes); }
void unmap(LargeBlocks::Block block) { std::free(block.at); }
#endif

}  // namespace

LargeBlocks& LargeBlocks::all() {
    static auto* const blocks = new LargeBlocks;  // for good: tensors may be freed after destructors ran
    return *blocks;
}

LargeBlocks::Block LargeBlocks::take(std::int64_t bytes) {
    bytes = (bytes + kHuge - 1) / kHuge * kHuge;
    const std::lock_guard<std::mutex> guard(lock_);
    auto best = stock_.end();
    for (auto b = stock_.begin(); b != stock_.end(); ++b)
        if (b->bytes >= bytes && b->bytes <= 2 * bytes && (best == stock_.end() || b->bytes < best->bytes)) best = b;
    if (best != stock_.end()) {
        const Block found = *best;
        stock_.erase(best);
        held_ -= found.bytes, used_ += found.bytes;
        in_use_[found.at] = true;
        return found;
    }
    void* at = map(bytes);
    if (!at && shrink(0)) at = map(bytes);
    if (!at) return {nullptr, bytes};
    in_use_[at] = false;
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    shrink(peak_ - used_);
    return {at, bytes};
}

void LargeBlocks::give(Block block) {
    const std::lock_guard<std::mutex> guard(lock_);
    in_use_.erase(block.at);
    used_ -= block.bytes;
    if (held_ + block.bytes > limit_) return unmap(block);
    stock_.push_back(block);
    held_ += block.bytes;
}

bool LargeBlocks::touched(const void* at) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = in_use_.find(at);
    return found != in_use_.end() && found->second;
}

std::int64_t LargeBlocks::shrink(std::int64_t to) {
    std::int64_t bytes = 0;
    for (; held_ > to; stock_.erase(stock_.begin())) {
        unmap(stock_.front());
        bytes += stock_.front().bytes, held_ -= stock_.front().bytes;
    }
    return bytes;
}

void LargeBlocks::set_limit(std::int64_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    limit_ = bytes;
    shrink(limit_);
}

std::int64_t LargeBlocks::held() {
    const std::lock_guard<std::mutex> guard(lock_);
    return held_;
}

std::int64_t LargeBlocks::release() {
    const std::lock_guard<std::mutex> guard(lock_);
    peak_ = used_;
    return shrink(0);
}

}  // namespace fastalign
