// The kernel that finds the largest logits: per block of a row, its largest value.
//
// The place within one block is then found by looking (greedy_search.cpp), so the kernel keeps no
// indices.
//
// Tested by greedy_search_test.
#pragma once

#include <cstdint>
#include <string>

#include "graph/type.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

constexpr std::int64_t kLargestBlock = 1024;  // elements

struct LargestKernel {
  int lanes = 8;
  graph::DataType input = graph::DataType::f32;  // f32, bf16, f16
};

// Argument slots.
//   x: the row's first element
//   blocks: how many blocks of kLargestBlock elements
//   largest: f32 per block; infinity also where a block holds a NaN
struct LargestArgs {
  enum Slot { x, blocks, largest, count };
};

std::string print(const LargestKernel& spec);
jit::vir::Function build(const LargestKernel& spec);

}  // namespace tilewright::ops
