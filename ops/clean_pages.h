// Takes memory out of the process: that of tensors which were packed.
//
// drop_clean_pages is for memory that was read from a file, where nothing that somebody wrote is
// among it; holds_its_file says whether that is so.
//
// The tensors of a mapped checkpoint share one mapping, which stays as long as one of them does;
// what was packed need not be in memory a second time. MADV_PAGEOUT would do, but throws the file
// out of the system's cache as well: the next process would read the checkpoint from the disk, and
// it takes 90 ms per GB. MADV_DONTNEED leaves it there, but loses what was written to a private
// mapping; the kernel's page map tells that nothing was.
//
// REQUIRES: nobody writes the memory meanwhile. Tested by weight_memory_test.
#pragma once

#include <atomic>
#include <cstddef>
#include <span>
#include <vector>

#include "ops/background.h"

namespace tilewright::ops {

// Whether every page that `memory` touches is still what its file holds, in memory or not; of
// memory that is of no file, nonsense.
bool holds_its_file(std::span<const std::byte> memory);

// Whether at most a megabyte of `memory` is in the process; false where the kernel cannot be asked
// (before Linux 6.7).
bool has_few_pages(std::span<const std::byte> memory);

// The whole pages inside of `memory`. Returns whether it did; false is no error.
bool drop_clean_pages(std::span<const std::byte> memory);

struct UnneededMemory {
  std::span<const std::byte> bytes;
  bool is_free;  // its owner frees it next and nobody reads it; else it is dropped if it is clean
};

// Drops pages in a thread of its own: the kernel takes 0.1 ms for a megabyte, where a start may
// take 150 ms. Where there are few of them, as in a start whose weights are mapped, the caller does
// it: to begin a thread and to wait for it takes 0.5 ms (of the warm start of a model with 146
// weights 33 ms). Not thread-safe; a child after fork() drops what is left by itself.
class PageDropper {
 public:
  ~PageDropper() { wait(); }

  // After what was given before is dropped. REQUIRES: all of it has its owners until wait(), the
  // next drop() or the end.
  void drop(std::vector<UnneededMemory> unneeded);
  // Helps, and returns when all is dropped.
  void wait();

 private:
  void work();

  std::vector<UnneededMemory> unneeded_;
  std::atomic<std::size_t> next_ = 0;
  Background thread_;
};

}  // namespace tilewright::ops
