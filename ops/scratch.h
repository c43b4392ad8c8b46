// Scratch: memory that tasks need during a run besides their operands, some of it each thread's,
// some of all threads together.
//
// It belongs to a program and grows to the largest run so far; nothing in it outlives a task.
//
// Tested by program_test, task_test and shared_packing_test.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "jit/base/result.h"
#include "ops/tails.h"

namespace tilewright::ops {

struct Frame;

// What a task needs. Bytes.
struct ScratchSizes {
  std::int64_t thread_bytes = 0;  // of Frame::scratch, for each thread
  std::int64_t packed_bytes = 0;  // of Frame::packed: rows that all threads packed (linear_task.h)
  std::int64_t part_bytes = 0;    // of Frame::parts: results of parts (attention_task.h)
  std::int64_t counters = 0;      // in Frame::parts_done

  // As much as both need one after the other.
  void include(const ScratchSizes& other);
};

// 64-byte aligned, never empty; nullptr: out of memory.
using AlignedMemory = std::unique_ptr<char, void (*)(void*)>;
AlignedMemory allocate(std::int64_t bytes);

class Scratch {
 public:
  // Error: out of memory.
  Status reserve(const ScratchSizes& sizes, int threads);
  // The frame's until the next reserve().
  void lend(Frame& frame);
  // Of all turns, for tests.
  std::span<const Claim> claims() const { return claims_; }

 private:
  // Grows ahead of the need, so that a prompt longer by a token finds room.
  struct Block {
    AlignedMemory memory{nullptr, nullptr};
    std::int64_t capacity = 0;
    Status reserve(std::int64_t bytes);
  };

  std::vector<Block> threads_;
  std::vector<char*> addresses_;  // of threads_
  Block packed_, parts_;
  std::vector<std::atomic<std::int32_t>> parts_done_;
  std::vector<Claim> claims_;
};

}  // namespace tilewright::ops
