// Liveness: from where to where each virtual register must keep its home.
//
// Backward data flow over the blocks of a function's structured code. A register gets one interval
// without holes, in half steps: instruction i reads at 2*i and writes at 2*i + 1, so a result may
// take the home of a source that dies there. A register that is live around a loop's back edge is
// live in the whole loop.
//
// Pure functions. Tested by linear_scan_test.
#pragma once

#include <cstdint>
#include <vector>

#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

// The pointer to the argument slots: a general register that exists before the first instruction
// and that every garg reads. It has no number in VIR; this is its Reg.
inline constexpr Reg kArgsPointer{Kind::gpr, -2};

struct Interval {
  Reg reg;
  int begin = 0, end = 0;      // half steps, both inclusive
  double weight = 0;           // uses and definitions, each times 10^(loop depth)
  bool in_inner_loop = false;  // touched in a loop that contains no loop
  Reg hint;                    // the first source of the defining instruction, of the same kind
  friend bool operator==(const Interval&, const Interval&) = default;
};

// One interval for each register that is used or defined: kArgsPointer first, then general
// registers, vectors, masks and tiles in the order of their numbers.
// REQUIRES: verify(function) is ok.
std::vector<Interval> live_intervals(const Function& function);

}  // namespace tilewright::jit::vir
