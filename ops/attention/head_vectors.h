// The vectors that one token of a head fills; the last of them may be partial.
//
// Tested by attention_test and prefill_attention_test.
#pragma once

#include "jit/vir/builder.h"
#include "ops/columns.h"

namespace tilewright::ops {

class HeadVectors {
 public:
  HeadVectors(int head_dim, int lanes)
      : lanes_(lanes), tail_(head_dim % lanes), count_((head_dim + lanes - 1) / lanes) {}

  int count() const { return count_; }
  bool is_partial(int index) const { return tail_ != 0 && index == count_ - 1; }

  // To be emitted before the first partial vector; holds a register from there on.
  void make_mask(jit::vir::Builder& builder) {
    if (tail_ != 0) mask_ = builder.tail_mask(builder.constant(tail_));
  }
  jit::vir::Reg mask() const { return mask_; }

  // The columns of vector `index`, for load and store of columns.h.
  Block columns(int index) const {
    if (!is_partial(index)) return {Block::Part::vector, {}, index * lanes_, {}, 0};
    return {Block::Part::masked, {}, index * lanes_, mask_, 0};
  }

 private:
  int lanes_, tail_, count_;
  jit::vir::Reg mask_;
};

}  // namespace tilewright::ops
