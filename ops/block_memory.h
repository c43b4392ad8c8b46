// BlockMemory: memory for the blocks of key/value caches, in huge pages.
//
// Decode reads all keys and values of a model for each token, a few KB here and there: in pages of
// 4 KB each of these costs a walk through the page tables (perf/results/attention-zen4.md). What a
// layer asks for at once (an extent of kv_cache.h, here a block) may be far smaller than a huge
// page, so blocks of all layers share slabs.
//
// allocate_block() gives a block of the process's slabs, which goes back when the pointer ends. Of
// slabs without blocks 64 MB stay for the next sequence, for new pages cost more than computing
// with them; the others go back to the system. Thread-safe; a child after fork() may go on.
//
// Tested by kv_cache_test.
#pragma once

#include <cstddef>
#include <memory>

namespace tilewright::ops {

struct ReturnBlock {
  void operator()(char* block) const;
};
using BlockBytes = std::unique_ptr<char, ReturnBlock>;

// Zeroed, aligned to 64 bytes. Null: out of memory. REQUIRES: bytes > 0
BlockBytes allocate_block(std::size_t bytes);

// Of all slabs, for tests.
std::size_t slab_bytes();

}  // namespace tilewright::ops
