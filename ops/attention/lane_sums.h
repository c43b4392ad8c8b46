// Sums of the lanes of vectors, of floats or of integers.
//
// Tested by attention_test.
#pragma once

#include <vector>

#include "jit/vir/builder.h"

namespace tilewright::ops {

// Builder::vadd or Builder::iadd.
using LaneAddition = jit::vir::Reg (jit::vir::Builder::*)(jit::vir::Reg, jit::vir::Reg);

// The sum of the lanes in every lane, in the order of lane_sums.
jit::vir::Reg lane_sum(jit::vir::Builder& builder, LaneAddition add, jit::vir::Reg a);

// Lane i: the sum of the lanes of a[i], of as many vectors as there are lanes. Each step adds
// neighbours, of two vectors at a time.
jit::vir::Reg lane_sums(jit::vir::Builder& builder, LaneAddition add, std::vector<jit::vir::Reg> a);

}  // namespace tilewright::ops
