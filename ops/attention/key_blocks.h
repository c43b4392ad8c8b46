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
#include <span>
#include <vector>

#include "jit/vir/builder.h"

namespace tilewright::ops {

constexpr int kScaleBytes = 4;

class KeyBlocks {
 public:
  // Argument slots of the kernel, and where in its scratch 16 bytes are free.
  struct Slots {
    int first_key, key_count, block_tokens, scratch;
    std::int64_t offset;
  };

  KeyBlocks(jit::vir::Builder& builder, const Slots& slots) : b_(builder), slots_(slots) {}

  // Argument slots of a table of blocks and of the bytes between their tokens. scales: not the
  // tokens are walked, but their f32 scales, which lie before a block's first token.
  struct Table {
    int blocks, stride;
    bool scales = false;
  };

  // Where a key lies in all tables alike: the offset of its block's entry, and its place there.
  struct Place {
    jit::vir::Reg entry, token;
  };

  // To be emitted before the first walk.
  void find_first();
  Place first();

  // At least 0.
  jit::vir::Reg key_count();

  // The address of the token at this place. REQUIRES: the key takes part
  jit::vir::Reg address(const Table& table, const Place& place);

  // Walks `keys` keys from `place` on, which moves behind them, a run within a block at a time:
  // body(address of the first token in each table, tokens). All may be changed.
  using Body = std::function<void(std::span<const jit::vir::Reg>, jit::vir::Reg)>;
  void walk(const Place& place, jit::vir::Reg keys, std::span<const Table> tables,
            const Body& body);

  // Takes at most `most` from `remaining`, for the body of a loop over `remaining`, which is one
  // more than what is left until that loop takes one away itself.
  jit::vir::Reg take(jit::vir::Reg remaining, jit::vir::Reg most);

 private:
  jit::vir::Reg saved(std::int64_t offset);
  void save(std::int64_t offset, jit::vir::Reg value);
  jit::vir::Builder& b_;
  Slots slots_;
};

}  // namespace tilewright::ops
