// Sums over keys, in registers for a chunk of keys and in scratch for all of them.
//
// Why: KeyBlocks::walk_chunks. A chunk costs a load, an addition and a store for each register,
// 1/64 of its multiplications; the totals have no place in registers beside the sums.
//
// Tested by attention_test and prefill_attention_test.
#pragma once

#include <cstdint>
#include <vector>

#include "jit/vir/builder.h"

namespace tilewright::ops {

class ChunkSums {
 public:
  // The totals are `count` vectors at `offset` of the memory in the argument slot `scratch`. All
  // begin at zero here.
  ChunkSums(jit::vir::Builder& builder, int scratch, std::int64_t offset, int count)
      : b_(builder), scratch_(scratch), offset_(offset) {
    using jit::vir::Element;
    jit::vir::Reg base = b_.arg(scratch_);
    for (int i = 0; i < count; ++i) {
      sums_.push_back(b_.zero());
      b_.store(Element::f32, at(base, i), sums_.back());
    }
  }

  jit::vir::Reg& operator[](int i) { return sums_[static_cast<std::size_t>(i)]; }

  void end_chunk() {
    using jit::vir::Element;
    jit::vir::Reg base = b_.arg(scratch_);
    for (int i = 0; i < static_cast<int>(sums_.size()); ++i) {
      jit::vir::Reg& sum = (*this)[i];
      b_.store(Element::f32, at(base, i), b_.vadd(b_.load(Element::f32, at(base, i)), sum));
      b_.assign(sum, b_.zero());
    }
  }

  jit::vir::Reg total(int i) { return b_.load(jit::vir::Element::f32, at(b_.arg(scratch_), i)); }

 private:
  jit::vir::Address at(jit::vir::Reg base, int i) const {
    return b_.at(base, offset_ + i * b_.vector_bytes());
  }

  jit::vir::Builder& b_;
  int scratch_;
  std::int64_t offset_;
  std::vector<jit::vir::Reg> sums_;
};

}  // namespace tilewright::ops
