// Memory of large results, which goes into a cache when it is freed and not back to the system: a block that nothing
// has touched yet takes longer to fill than a kernel takes to compute what goes into it (see fresh_pages.h), and a
// training step frees and wants the same block each time. Blocks kept and blocks in use are together no more than were
// in use at once at some time.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace fastalign {

class LargeBlocks {
  public:
    struct Block {
        void* at;  // null: the system has no more
        std::int64_t bytes;
    };

    static LargeBlocks& all();

    // The smallest block of the cache that is large enough and not above twice that; else a new one.
    Block take(std::int64_t bytes);
    void give(Block block);

    // Whether the block that starts here was written to before.
    bool touched(const void* at);

    // Bytes that the cache may hold, and holds.
    void set_limit(std::int64_t bytes);
    std::int64_t held();
    // Gives the cache back to the system, and says how many bytes that were.
    std::int64_t release();

  private:
    // Gives the oldest blocks of the cache back to the system until it holds no more than that; returns their bytes.
    std::int64_t shrink(std::int64_t to);

    std::mutex lock_;
    std::vector<Block> stock_;            // oldest first
    std::map<const void*, bool> in_use_;  // → written to before
    std::int64_t held_ = 0, limit_ = 0, used_ = 0, peak_ = 0;
};

}  // namespace fastalign
