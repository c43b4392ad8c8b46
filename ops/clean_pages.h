// Takes memory out of the process: that of tensors which were packed.
//
// drop_clean_pages is for memory that was read from a file, where nothing that somebody wrote is
// among it.
//
// The tensors of a mapped checkpoint share one mapping, which stays as long as one of them does;
// what was packed need not be in memory a second time. MADV_PAGEOUT would do, but throws the file
// out of the system's cache as well: the next process would read the checkpoint from the disk, and
// it takes 90 ms per GB. MADV_DONTNEED leaves it there, but loses what was written to a private
// mapping; the kernel's page map tells that nothing was.
//
// REQUIRES: nobody writes the memory meanwhile. Tested by weight_memory_test.
#pragma once

#include <cstddef>
#include <span>

namespace tilewright::ops {

// The whole pages inside of `memory`. Returns whether it did; false is no error.
bool drop_clean_pages(std::span<const std::byte> memory);

struct UnneededMemory {
  std::span<const std::byte> bytes;
  bool is_free;  // its owner frees it next and nobody reads it; else it is dropped if it is clean
};

// On all threads: the kernel takes 0.1 ms for a megabyte, where a start may take 150 ms.
void drop_pages(std::span<const UnneededMemory> unneeded);

}  // namespace tilewright::ops
