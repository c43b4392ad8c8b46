// Turns a square of `lanes` vectors of 32-bit elements: what was element j of vector i is element i
// of vector j.
//
// Two rounds of unzipping turn squares of four by four within runs of four lanes, and one or two
// more turn the runs: lanes * log2(lanes) instructions, no memory, two registers beside the square.
//
// Tested by transpose_test.
#pragma once

#include <vector>

#include "jit/vir/builder.h"

namespace tilewright::ops {

// REQUIRES: square.size() == builder.lanes()
std::vector<jit::vir::Reg> transpose(jit::vir::Builder& builder,
                                     const std::vector<jit::vir::Reg>& square);

}  // namespace tilewright::ops
