// See block_memory.h. Tested by kv_cache_test.
#include "ops/block_memory.h"

#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "jit/base/fork_mutex.h"
#include "jit/base/fork_static.h"
#include "jit/base/round_up.h"
#include "ops/weight_memory.h"

namespace tilewright::ops {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = 2u << 20;
constexpr std::size_t kFewestBlocks = 4;  // of a slab: what is left at its end stays unused
constexpr std::size_t kMostIdleBytes = 64u << 20;

struct Slab {
  WeightBytes memory;
  std::size_t bytes, block_bytes;
  std::vector<char*> free;
  std::size_t used = 0;
};

struct Slabs {
  ForkMutex mutex;
  std::map<const char*, Slab> by_address;
  std::size_t idle_bytes = 0;  // of slabs without blocks
};

// Never destroyed: caches may end after this file's objects.
Slabs& slabs() {
  static constinit ForkStatic<Slabs> all;
  return all.get();
}

// One with a free block of that size; null: out of memory. REQUIRES: the mutex is held.
Slab* find_slab(Slabs& all, std::size_t block_bytes) {
  for (auto& [address, slab] : all.by_address) {
    if (slab.block_bytes == block_bytes && !slab.free.empty()) return &slab;
  }
  const std::size_t bytes = round_up(kFewestBlocks * block_bytes, kHugePage);
  Slab slab{map_huge(bytes), bytes, block_bytes, {}};
  if (!slab.memory) return nullptr;
  char* const begin = slab.memory.get();
  // The first is taken first.
  for (std::size_t i = bytes / block_bytes; i-- > 0;) slab.free.push_back(begin + i * block_bytes);
  all.idle_bytes += bytes;
  return &all.by_address.emplace(begin, std::move(slab)).first->second;
}

}  // namespace

void ReturnBlock::operator()(char* block) const {
  Slabs& all = slabs();
  const std::lock_guard lock(all.mutex);
  const auto found = std::prev(all.by_address.upper_bound(block));
  Slab& slab = found->second;
  slab.free.push_back(block);
  if (--slab.used > 0) return;
  if (all.idle_bytes + slab.bytes > kMostIdleBytes) {
    all.by_address.erase(found);
  } else {
    all.idle_bytes += slab.bytes;
  }
}

BlockBytes allocate_block(std::size_t bytes) {
  const std::size_t block_bytes = round_up(bytes, kLine);
  BlockBytes block;
  {
    Slabs& all = slabs();
    const std::lock_guard lock(all.mutex);
    Slab* const slab = find_slab(all, block_bytes);
    if (slab == nullptr) return nullptr;
    if (slab->used == 0) all.idle_bytes -= slab->bytes;
    block.reset(slab->free.back());
    slab->free.pop_back();
    ++slab->used;
  }
  // Zeroed so that no kernel can ever meet a NaN in a token that was not written.
  std::memset(block.get(), 0, block_bytes);
  return block;
}

std::size_t slab_bytes() {
  Slabs& all = slabs();
  const std::lock_guard lock(all.mutex);
  std::size_t sum = 0;
  for (const auto& [address, slab] : all.by_address) sum += slab.bytes;
  return sum;
}

}  // namespace tilewright::ops
