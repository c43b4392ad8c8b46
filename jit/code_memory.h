// CodeMemory: executable memory that is never writable and executable at once.
//
// Bytes are copied to an anonymous read-write mapping which is flipped once to read-execute and
// never back; addresses are never reused (append-only), so no other core can hold stale
// instructions. Slabs are batched: one publish() is one mapping. If the system refuses executable
// memory (SELinux execmem, MDWE, seccomp), probe() and publish() say so and the caller runs its
// fallback.
//
// Thread-safe. A child after fork() keeps the parent's kernels (private mappings). Tested by
// code_memory_test.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "jit/base/fork_mutex.h"
#include "jit/base/result.h"
#include "jit/emit.h"

namespace tilewright::jit {

class CodeMemory {
 public:
  CodeMemory() = default;
  ~CodeMemory();
  CodeMemory(const CodeMemory&) = delete;
  CodeMemory& operator=(const CodeMemory&) = delete;

  // Whether the system lets this process have executable memory. Error: what refused it. Costs a
  // mapping of one page, about 5 us.
  static Status probe();

  // Copies each piece of code to executable memory, 64-byte aligned, and returns the entry points
  // in order. They live as long as this object.
  Result<std::vector<KernelFunction>> publish(std::span<const std::span<const std::byte>> codes);

 private:
  struct Slab {
    void* address;
    std::size_t size;
  };
  ForkMutex mutex_;  // guards slabs_; no other lock is taken while it is held
  std::vector<Slab> slabs_;
};

}  // namespace tilewright::jit
