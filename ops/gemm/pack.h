// Packing of linear weights: one layout for prefill and decode, GEMV and GEMM, every ISA.
//
//   panels of 32 columns (output features), n rounded up to 32 with zeros
//   f32        [n/32][k][32]                       each k step is one linear run of 128 bytes
//   bf16, f16  [n/32][ceil(k/2)][2][16][2]         AMX / vdpbf16ps order: pairs of k interleaved, 2
//   x 16 columns;
//                                                  k rounded up to a multiple of 32 with zeros
//   12 bits    bf16 of which one bit in four is saved, where weights come from memory:
//   twelve_bits.h gated      a panel holds 16 gate columns, then their 16 up columns
//
// Tested by pack_test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "graph/type.h"

namespace tilewright::ops {

// A row-major [rows, k] block of a weight, or a [k, rows] one; several blocks stacked along rows
// make one merged weight.
struct WeightBlock {
  const void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t row_stride = 0;  // bytes; transposed: between neighbouring k
  bool transposed = false;
};

// How a packed weight is stored.
struct PackedForm {
  graph::DataType dtype = graph::DataType::f32;
  bool twelve_bits = false;  // of bf16
};

// Not of 12 bits, whose size depends on the values.
std::int64_t packed_bytes(std::int64_t n, std::int64_t k, graph::DataType dtype);

// Packs panels [panel_begin, panel_end) of the stacked blocks (gated: exactly two blocks of equal
// rows, gate and up) into `packed`, which has packed_bytes. The blocks hold values of `source`:
// that is `dtype`, or f32 whose values all fit a 16-bit `dtype` (exact.h). Callable from several
// threads for disjoint panels.
void pack_panels(std::span<const WeightBlock> blocks, std::int64_t k, graph::DataType source,
                 graph::DataType dtype, bool gated, std::int64_t panel_begin,
                 std::int64_t panel_end, void* packed);

// One of them, to memory of its own.
void pack_panel(std::span<const WeightBlock> blocks, std::int64_t k, graph::DataType source,
                graph::DataType dtype, bool gated, std::int64_t panel, void* packed);

// The k values of the packed row `row` (of all blocks; gated: as they are interleaved), as
// `source`.
void unpack_row(const void* packed, std::int64_t row, std::int64_t k, PackedForm form,
                graph::DataType source, void* to);

// The inverse: writes the values of blocks[index], as `source` and row-major without padding
// between rows. The addresses in `blocks` are not looked at.
void unpack_block(const void* packed, std::span<const WeightBlock> blocks, std::size_t index,
                  std::int64_t k, PackedForm form, graph::DataType source, bool gated, void* to);

}  // namespace tilewright::ops
