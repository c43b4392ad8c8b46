// The harness that every kernel test runs in: operands beside pages that fault, and a call that
// checks what the ABI promises. Generated code is invisible to AddressSanitizer, so this is how a
// byte too far or a lost register becomes a failing test.
//
// Tested by emit_test (kernels made to break each promise).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "jit/emit.h"

namespace tilewright::testing {

// `size` bytes flush against an inaccessible page, at the end of the buffer or at its start. The
// slack on the other side, up to its own inaccessible page, holds a canary that is NaN in every
// float format.
class GuardedBuffer {
 public:
  enum class Flush { end, start };

  explicit GuardedBuffer(std::size_t size, Flush flush = Flush::end);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  template <class T>
  std::span<T> as() const {
    return {reinterpret_cast<T*>(data_), size_ / sizeof(T)};
  }
  std::int64_t address() const { return reinterpret_cast<std::int64_t>(data_); }

  void fill_with_canary();   // the data too: an output that must be written completely
  void protect_read_only();  // an input: a write to it faults
  bool slack_intact() const;

 private:
  std::span<std::byte> slack() const;

  std::byte* mapping_ = nullptr;  // guard page, pages, guard page
  std::size_t inner_size_ = 0;    // of the accessible pages
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Calls the kernel with NaN in the low half of every vector register, and returns what it broke, or
// "": rbx, rbp, r12-r15, rsp, the direction flag, MXCSR's control bits, upper halves left dirty
// (no vzeroupper).
std::string call_checked(jit::KernelFunction kernel, const std::int64_t* args);

}  // namespace tilewright::testing
