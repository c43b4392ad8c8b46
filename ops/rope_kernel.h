// The rotary kernel: out = x * cos + rotate_half(x) * sin over rows of head_dim elements (RoFormer,
// arXiv 2104.09864; "half" style: the second half of the row is the partner of the first).
//
// Also the copy kernel: rows of contiguous elements from one strided place to another, with dtype
// conversion; it makes cat, contiguous and cache appends. Its variants cut rows into pieces
// (linear_task.h) and look them up in a table.
//
// Tested by rope_kernel_test.
#pragma once

#include <cstdint>
#include <string>

#include "graph/type.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

struct RopeKernel {
  int lanes = 8;
  int head_dim = 64;  // even
  graph::DataType input = graph::DataType::f32, table = graph::DataType::f32,
                  output = graph::DataType::f32;
};

// `rows` rows (heads of one token): x and y move by their row strides (bytes); cos and sin are one
// row for all.
struct RopeArgs {
  enum Slot { rows, x, x_row_stride, cos, sin, y, y_row_stride, count };
};

std::string print(const RopeKernel& spec);
jit::vir::Function build(const RopeKernel& spec);

struct CopyKernel {
  int lanes = 8;
  graph::DataType input = graph::DataType::f32,
                  output = graph::DataType::f32;  // f32, bf16, f16, or equal types
};

// rows x columns elements; strides in bytes; columns are contiguous on both sides.
struct CopyArgs {
  enum Slot { rows, columns, x, x_row_stride, y, y_row_stride, count };
};

std::string print(const CopyKernel& spec);
jit::vir::Function build(const CopyKernel& spec);

// Rows cut into pieces, those of all rows one after another: y[piece][row]. A piece is a vector of
// the output, of 32-bit elements (f32) or pairs of equal 16-bit ones.
struct PieceArgs {
  enum Slot { rows, pieces, x, x_row_stride, y, count };
};
std::string print_pieces(const CopyKernel& spec);
// REQUIRES: the output is f32, or both types are one of 2 or 4 bytes.
jit::vir::Function build_pieces(const CopyKernel& spec);

// Embedding: y[i] = table[index[i]], rows of `columns` elements; indices are i64 and were checked
// by the caller.
struct EmbeddingArgs {
  enum Slot { rows, columns, table, table_row_stride, indices, y, y_row_stride, count };
};
std::string print_embedding(const CopyKernel& spec);
jit::vir::Function build_embedding(const CopyKernel& spec);

}  // namespace tilewright::ops
