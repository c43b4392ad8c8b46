// Turns a square of `lanes` vectors of 32-bit elements: what was element j of vector i is element i
// of vector j.
//
// Two rounds of unzipping turn squares of four by four within runs of four lanes, and one or two
// more turn the runs: lanes * log2(lanes) instructions, no memory, two registers beside the square.
//
// Tested by transpose_test.
#pragma once

#include <array>
#include <vector>

#include "jit/vir/builder.h"

namespace tilewright::ops {

// REQUIRES: square.size() == builder.lanes()
std::vector<jit::vir::Reg> transpose(jit::vir::Builder& builder,
                                     const std::vector<jit::vir::Reg>& square);

// Turns runs of four lanes: what was run r of vector v is run v of vector r. REQUIRES: 16 lanes
std::array<jit::vir::Reg, 4> transpose_runs(jit::vir::Builder& builder,
                                            const std::array<jit::vir::Reg, 4>& vectors);

}  // namespace tilewright::ops
