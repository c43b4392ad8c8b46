// WeightMemory: page-aligned memory for packed weights, in huge pages.
//
// reserve() takes address space for all weights of a model, so that small ones share huge pages;
// allocate() hands it out in order, settle() returns what is left. Pages come when they are
// touched, by the threads that pack. But the first, a twelfth of all, can be asked for beside the
// caller, who captures the model meanwhile: where a virtual machine's memory is not backed yet, a
// huge page takes 5 ms (perf/results/start-avx512.md). No more, because the weights' own memory is
// still there.
//
// Not thread-safe: WeightStore holds its lock. Tested by weight_memory_test.
#pragma once

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

// Zeroed, page-aligned memory of its own; from 2 MB on in huge pages. Null: out of memory.
WeightBytes map_huge(std::size_t bytes);

class WeightMemory {
 public:
  WeightMemory() = default;
  ~WeightMemory() { settle(); }  // before the thread's own end
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;

  // About so many bytes will be asked for, of which the first may be asked for ahead. Does nothing
  // if there are not as many, or it did already.
  void reserve(std::size_t bytes, bool ask_ahead);
  // Zeroed, page-aligned memory; huge pages where they fit. Null: out of memory.
  WeightBytes allocate(std::size_t bytes);
  // Ends what reserve() began.
  void settle();
  // What of the reservation has not been handed out, for tests.
  std::size_t reserved_bytes() const { return static_cast<std::size_t>(end_ - next_); }
  // And of what was asked for ahead, what came.
  std::size_t present_bytes() const { return present_; }

 private:
  void stop_asking();

  char* next_ = nullptr;  // of the reservation, not handed out yet
  char* end_ = nullptr;
  std::atomic<bool> stop_ = false;
  std::atomic<std::size_t> present_ = 0;
  Background asking_;
};

}  // namespace tilewright::ops
