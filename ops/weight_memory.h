// WeightMemory: page-aligned memory for packed weights, fetched ahead of time if asked.
//
// Fresh memory is not free: the kernel clears each page at its first touch, and a virtual machine's
// host may have to find the page first (0.5 GB/s for huge pages on one machine, against 9 GB/s for
// copying). Capture keeps one core busy for a second before the first weight is packed, so another
// fetches the pages meanwhile: reserve() takes address space and populates it in a thread of its
// own, allocate() hands it out in order, settle() ends that and returns what is left. The thread
// stays `lead` bytes ahead at most: a weight's own memory goes when it was packed, and a large
// model should never be in memory twice.
//
// Not thread-safe: WeightStore holds its lock. Usable in a child after fork(), where nothing is
// fetched ahead any more. Tested by weight_memory_test.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>

#include "ops/background.h"

namespace tilewright::ops {

struct Unmap {
  std::size_t bytes = 0;
  void operator()(char* memory) const;
};
using WeightBytes = std::unique_ptr<char, Unmap>;

class WeightMemory {
 public:
  WeightMemory() = default;
  ~WeightMemory() { settle(); }
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;

  // Begins to fetch about so many bytes. Does nothing if it cannot, or did already.
  void reserve(std::size_t bytes);
  // Zeroed, page-aligned memory; huge pages where they fit. Null: out of memory.
  WeightBytes allocate(std::size_t bytes);
  // Ends what reserve() began.
  void settle();
  // What of the reservation has not been handed out, for tests.
  std::size_t reserved_bytes() const { return static_cast<std::size_t>(end_ - next_); }
  // How far ahead memory is fetched of a reservation of so many bytes.
  static std::size_t lead(std::size_t bytes) {
    return std::max<std::size_t>(bytes / 16, std::size_t{256} << 20);
  }

 private:
  std::atomic<char*> next_ = nullptr;  // of the reservation, not handed out yet
  char* end_ = nullptr;
  std::atomic<bool> stop_ = false;
  Background populator_;
};

}  // namespace tilewright::ops
