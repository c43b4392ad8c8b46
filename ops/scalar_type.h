// Scalar types: one element of any type in memory, as a double. For references and tests, where
// clarity counts and speed does not.
//
// Tested by rope_kernel_test (all 2^16 patterns of bf16 and f16).
#pragma once

#include "graph/type.h"

namespace tilewright::ops {

// Rounded to nearest, ties to even, to a value that the floating type holds (infinity above its
// largest). Other types: unchanged.
double rounded_to(graph::DataType type, double value);

double read_scalar(graph::DataType type, const void* from);
// Rounds as rounded_to; integers truncate; boolean stores value != 0.
void write_scalar(graph::DataType type, void* to, double value);

}  // namespace tilewright::ops
