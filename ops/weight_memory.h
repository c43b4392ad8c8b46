// WeightMemory: page-aligned memory for packed weights, in huge pages.
//
// reserve() takes address space for all weights of a model, so that small ones share huge pages;
// allocate() hands it out in order, settle() returns what is left. Pages come when they are
// touched, by the threads that pack.
//
// Not thread-safe: WeightStore holds its lock. Tested by weight_memory_test.
#pragma once

#include <cstddef>
#include <memory>

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

  // About so many bytes will be asked for. Does nothing if there are not as many, or it did
  // already.
  void reserve(std::size_t bytes);
  // Zeroed, page-aligned memory; huge pages where they fit. Null: out of memory.
  WeightBytes allocate(std::size_t bytes);
  // Ends what reserve() began.
  void settle();
  // What of the reservation has not been handed out, for tests.
  std::size_t reserved_bytes() const { return static_cast<std::size_t>(end_ - next_); }

 private:
  char* next_ = nullptr;  // of the reservation, not handed out yet
  char* end_ = nullptr;
};

}  // namespace tilewright::ops
