// Liveness: from where to where each virtual register must keep its home.
//
// A register gets one interval without holes, in half steps: instruction i reads at 2*i and writes
// at 2*i + 1, so a result may take the home of a source that dies there. It begins with the first
// definition and ends with the last use; but a register that is live around a loop's back edge is
// live to the end of that loop.
//
// One pass forwards, without data flow over blocks: code is structured and every use is defined on
// every path, so live around a back edge is what the loop reads before it has certainly defined it
// itself (definitions.h).
//
// Pure functions. Tested by linear_scan_test.
#pragma once

#include <vector>

#include "jit/vir/numbering.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

struct Interval {
  Reg reg;
  int begin = 0, end = 0;      // half steps, both inclusive
  Reg hint = {};               // the first source of the defining instruction, of the same kind
  double weight = 0;           // uses and definitions, each times 10^(loop depth)
  bool in_inner_loop = false;  // touched in a loop that contains no loop
  friend bool operator==(const Interval&, const Interval&) = default;
};

// One interval for each register that is used or defined, in the order of their beginnings.
// REQUIRES: verify(function) is ok.
std::vector<Interval> live_intervals(const Function& function);

}  // namespace tilewright::jit::vir
