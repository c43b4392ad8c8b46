// The quantising kernel: rows of head_dim elements become integers of 8 bits and a scale per row,
// as jit/base/eight_bits.h says, bit by bit: what appends to a cache of i8.
//
// Two passes over a row, which stays in L1: its largest magnitude, then the integers.
//
// Tested by quantize_kernel_test.
#pragma once

#include <string>

#include "graph/type.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

struct QuantizeKernel {
  int lanes = 8;
  int head_dim = 64;
  graph::DataType input = graph::DataType::f32;  // f32, bf16, f16
};

// `rows` rows (heads of one token); strides in bytes. y_row_stride lies between rows of integers
// and also between their scales (f32).
struct QuantizeArgs {
  enum Slot { rows, x, x_row_stride, y, scales, y_row_stride, count };
};

std::string print(const QuantizeKernel& spec);
jit::vir::Function build(const QuantizeKernel& spec);

}  // namespace tilewright::ops
