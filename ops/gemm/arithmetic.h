// Which instructions multiply a linear layer: a fixed rule of the target and the types, so that two
// starts give the same kernels, keys and bits.
//
// Tested by linear_test.
#pragma once

#include <cstdint>
#include <optional>

#include "graph/type.h"
#include "jit/base/env.h"
#include "jit/base/target.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/pack.h"

namespace tilewright::ops {

// A product of rows of x, of this type, by a packed weight.
struct ArithmeticChoice {
  Arithmetic few_rows = Arithmetic::fma;
  std::optional<Arithmetic> many_rows;  // more than most_rows_without_tiles, by tiles
};

inline constexpr std::int64_t most_rows_without_tiles = 8;

// largest_weight: of |w|; 0 is unknown. Only fp32 x asks for it.
ArithmeticChoice choose_arithmetic(const Target& target, Fp32Mode fp32, graph::DataType x,
                                   PackedForm weight, float largest_weight);

}  // namespace tilewright::ops
