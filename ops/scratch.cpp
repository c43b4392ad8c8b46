// See scratch.h. Tested by program_test, task_test and shared_packing_test.
#include "ops/scratch.h"

#include <algorithm>
#include <cstdlib>

#include "ops/task.h"

namespace tilewright::ops {

void ScratchSizes::include(const ScratchSizes& other) {
  thread_bytes = std::max(thread_bytes, other.thread_bytes);
  packed_bytes = std::max(packed_bytes, other.packed_bytes);
  part_bytes = std::max(part_bytes, other.part_bytes);
  counters = std::max(counters, other.counters);
}

AlignedMemory allocate(std::int64_t bytes) {
  const auto size = static_cast<std::size_t>((std::max<std::int64_t>(bytes, 64) + 63) / 64 * 64);
  return {static_cast<char*>(std::aligned_alloc(64, size)), std::free};
}

Status Scratch::Block::reserve(std::int64_t bytes) {
  if (bytes <= capacity) return {};
  memory.reset();
  capacity = 0;
  memory = allocate(bytes * 2);
  if (!memory) return Error{"out of memory for scratch"};
  capacity = bytes * 2;
  return {};
}

Status Scratch::reserve(const ScratchSizes& sizes, int threads) {
  const auto count = static_cast<std::size_t>(threads);
  if (threads_.size() < count) threads_.resize(count);
  for (Block& thread : threads_) {
    if (Status done = thread.reserve(sizes.thread_bytes); !done) return done;
  }
  if (Status done = packed_.reserve(sizes.packed_bytes); !done) return done;
  if (Status done = parts_.reserve(sizes.part_bytes); !done) return done;
  if (claims_.size() < count) claims_ = std::vector<Claim>(count);
  addresses_.clear();
  for (const Block& thread : threads_) addresses_.push_back(thread.memory.get());
  if (static_cast<std::size_t>(sizes.counters) > parts_done_.size()) {
    parts_done_ = std::vector<std::atomic<std::int32_t>>(static_cast<std::size_t>(sizes.counters));
  }
  return {};
}

void Scratch::lend(Frame& frame) {
  frame.scratch = addresses_;
  frame.packed = packed_.memory.get();
  frame.parts = parts_.memory.get();
  frame.parts_done = parts_done_;
  frame.turn.claims = claims_;
}

}  // namespace tilewright::ops
