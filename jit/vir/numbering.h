// Numbering: all registers of a function in one row of numbers, so that what is known of each is
// one array: the arguments' pointer, then general registers, vectors, masks, tiles.
//
// Tested by linear_scan_test.
#pragma once

#include <array>
#include <cstddef>

#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

// The pointer to the argument slots: a general register that exists before the first instruction
// and that every garg reads. It has no number in VIR; this is its Reg.
inline constexpr Reg kArgsPointer{Kind::gpr, -2};

class Numbering {
 public:
  explicit Numbering(const Function& f)
      : first_{1, 1 + f.gpr_count, 1 + f.gpr_count + f.vec_count,
               1 + f.gpr_count + f.vec_count + f.mask_count},
        count_(first_.back() + f.tile_count) {}

  std::size_t count() const { return static_cast<std::size_t>(count_); }
  std::size_t index(Reg reg) const {
    if (reg == kArgsPointer) return 0;
    return static_cast<std::size_t>(first_[static_cast<std::size_t>(reg.kind)] + reg.id);
  }

 private:
  std::array<int, 4> first_;  // by kind
  int count_;
};

}  // namespace tilewright::jit::vir
