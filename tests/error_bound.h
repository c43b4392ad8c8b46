// Error bounds for fused regions: evaluates a region in double with a bound on the rounding error
// that any fp32 implementation of the row kernel may have, from its own accumulation depth.
//
// It is written apart from the kernel and from ops/row_reference.cpp, and judges both.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/row_kernel.h"

namespace tilewright {

// A value and how far from it a right fp32 result may lie; infinite where rounding may decide
// (a comparison of equal values, a division by almost nothing).
struct Bounded {
  double value = 0;
  double error = 0;
};

// The output of that number for one row: `columns` elements, in front of the rounding to its type.
// `row` of the operands that `args` describes (the kernel's arguments).
std::vector<std::vector<Bounded>> bounded_outputs(const ops::RowKernel& spec,
                                                  const std::int64_t* args, std::int64_t row);

// What rounding to the type may add to `bounded`.
double tolerance(graph::DataType type, const Bounded& bounded);

}  // namespace tilewright
