// How an attention kernel walks along keys that lie in blocks of a table.
//
// Both attention kernels read keys and values in one pass over the blocks that hold keys of
// [first_key, first_key + key_count): where the first of them lies is found once, by subtraction
// (VIR has no division), and kept in the kernel's scratch.
//
// Tested by attention_test and prefill_attention_test.
#pragma once

#include <cstdint>
#include <functional>

#include "jit/vir/builder.h"

namespace tilewright::ops {

class KeyBlocks {
 public:
  // Argument slots of the kernel, and where in its scratch 16 bytes are free.
  struct Slots {
    int first_key, key_count, block_tokens, scratch;
    std::int64_t offset;
  };

  KeyBlocks(jit::vir::Builder& builder, const Slots& slots) : b_(builder), slots_(slots) {}

  // To be emitted before the first walk.
  void find_first();

  // At least 0.
  jit::vir::Reg key_count();

  // Walks the blocks of the table in the slot `table`, whose tokens are the bytes in the slot
  // `stride` apart: body(first token's address, tokens). Both may be changed.
  void walk(int table, int stride, const std::function<void(jit::vir::Reg, jit::vir::Reg)>& body);

 private:
  jit::vir::Reg saved(std::int64_t offset);
  void save(std::int64_t offset, jit::vir::Reg value);

  jit::vir::Builder& b_;
  Slots slots_;
};

}  // namespace tilewright::ops
