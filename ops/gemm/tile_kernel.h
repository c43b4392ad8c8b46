// The linear kernel for many rows with AMX: tiles of 16 rows x 32 k of x meet tiles of 32 k x 16
// columns of the weight, which lie in the packed layout (pack.h) as the instructions want them.
//
// x is packed first, by a kernel of its own: bf16 as it is, or fp32 as three bf16, the upper bits,
// the middle ones and the lower ones, each rounded from what the ones above it leave, whose sum is
// x exactly. With weights that fit bf16 three products then give what an fp32 product gives. Any
// other weight, stored in fp32 or fp16, is split likewise, a piece of a panel at a time, and six
// products are computed: those that are left out are at most 2^-24 + 2^-34 of x * w, to either
// side. A weight that fits bf16 has the same bits of y in whatever form it is stored.
//
// tdpbf16ps adds 16 products at a time and those sums in fp32. Half a piece of k is summed from
// zero, the products of the lowest parts first, so that they meet sums of their own size; both
// halves together are added to the pieces before them: the error is below that of PyTorch's fp32
// (perf/results/linear-amx.md). So torch.set_float32_matmul_precision("highest"), the default,
// allows it; "high" and "medium" would allow less exact products, and change nothing here.
//
// AMX takes subnormals for zero, so fp32 has this bound beyond its rounding: if both the largest
// |x| of a row and the largest |w| are at least kSmallestFactor, and their product too, y is wrong
// by at most k * 2^-39 of that product (2^-40 with three products). And parts of an infinity are no
// numbers, rounding up may become one, and sums may overflow that would not in another order.
// in_range() says whether neither concerns a row; rows that it refuses are multiplied by the kernel
// with fused multiply-adds.
//
// Tested by tile_kernel_test, tests/python/test_matrix_kernels.py (the error).
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "jit/vir/vir.h"
#include "ops/gemm/linear_kernel.h"

namespace tilewright::ops {

inline constexpr int kTileRows = 16;
inline constexpr int kTileStateBytes = 64;
inline constexpr float kSmallestFactor = 0x1p-84f, kLargestFactor = 0x1p127f;

// Packed x of one block of rows: [ceil(k / 32)][parts][rows][32] bf16, parts from the lowest up,
// zero where there is no x.
struct TilePack {
  Arithmetic arithmetic = Arithmetic::tiles;
  int rows = kTileRows;
  std::int64_t k = 0;
};

struct TilePackArgs {
  enum Slot {
    x,
    x_row_stride,
    row_count,  // rows of x, at most `rows`
    y,
    // Of fp32 x: 16 x u32 for each row of x, the largest of which is the pattern of its largest
    // |x|; aligned to 64.
    magnitudes,
    count
  };
};

inline constexpr int kMagnitudeBytes = 64;  // of a row

std::int64_t block_bytes(const TilePack& spec);
std::string print(const TilePack& spec);
jit::vir::Function build(const TilePack& spec);

// LinearArgs::unpacked: a piece's sums of fp32, and its weights where they are not read in place.
std::int64_t tile_scratch_bytes(const LinearKernel& spec);

// Whether fp32 weights up to this can be multiplied by tiles at all; and rows of fp32 x with these
// magnitudes by them.
bool in_range(float largest_weight);
bool in_range(std::span<const std::uint32_t> magnitudes, float largest_weight, std::int64_t k);

// REQUIRES: supported(spec), is_tiled(spec.arithmetic)
jit::vir::Function build_tiled(const LinearKernel& spec);

}  // namespace tilewright::ops
