// Which instructions multiply a linear layer or a tile of attention: a fixed rule of the target,
// the types and what is recorded for the CPU, so that two starts give the same kernels, keys and
// bits.
//
// Tested by linear_test and prefill_attention_test.
#pragma once

#include <cstdint>
#include <optional>

#include "graph/type.h"
#include "jit/base/target.h"
#include "ops/attention/attention_kernel.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/pack.h"

namespace tilewright::ops {

// A product of rows of x, of this type, by a packed weight.
struct ArithmeticChoice {
  Arithmetic few_rows = Arithmetic::fma;
  std::optional<Arithmetic> many_rows;  // more than most_rows_without_tiles, by tiles
  friend bool operator==(const ArithmeticChoice&, const ArithmeticChoice&) = default;
};

inline constexpr std::int64_t most_rows_without_tiles = 8;
inline constexpr int most_fp32_products = 6;

// fp32_products: of bf16, with which tiles may multiply fp32 x: up to 3 or most_fp32_products, or
// 0. What is out of their range is not asked (tile_kernel.h).
ArithmeticChoice choose_arithmetic(const Target& target, std::int64_t fp32_products,
                                   graph::DataType x, PackedForm weight);

// Of attention that fills tiles of rows.
Arithmetic choose_arithmetic(const Target& target, const AttentionKernel& attention);

// Whether vdpbf16ps multiplies in attention that goes token by token, and whether vpdpbusd.
bool attention_by_dots(const Target& target, AttentionKernel attention);
bool attention_in_integers(const Target& target, AttentionKernel attention);

}  // namespace tilewright::ops
