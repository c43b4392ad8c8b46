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

constexpr int kChunkKeys = 64;

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
  using Body = std::function<void(jit::vir::Reg, jit::vir::Reg)>;
  void walk(int table, int stride, const Body& body);

  // The same in chunks of kChunkKeys keys counted from first_key, wherever the blocks end;
  // end_chunk() follows each. What sums over keys adds up chunks: one chain of additions over 4096
  // keys had five times the rounding error of PyTorch's blocked product.
  void walk_chunks(int table, int stride, const Body& body, const std::function<void()>& end_chunk);

  // loop(count) in chunks of kChunkKeys rounds.
  void loop_chunks(jit::vir::Reg count, const std::function<void()>& body,
                   const std::function<void()>& end_chunk);

 private:
  jit::vir::Reg saved(std::int64_t offset);
  void save(std::int64_t offset, jit::vir::Reg value);
  // Takes at most `most` from `remaining`, for the body of a loop over `remaining`.
  jit::vir::Reg take(jit::vir::Reg remaining, jit::vir::Reg most);

  jit::vir::Builder& b_;
  Slots slots_;
};

}  // namespace tilewright::ops
