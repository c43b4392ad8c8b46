// The linear kernel: y[rows, n] = epilogue(x[rows, k] @ w[n, k].T) of fp32 x, for a few rows at a
// time (1 is the GEMV); with vdpbf16ps of bf16 x.
//
// One VIR builder for every weight type, number of lanes and epilogue; the block of `rows`
// accumulators is baked in, everything else about M is a run-time argument. Weights are packed once
// (pack.h) and serve prefill and decode.
//
// Every output is a sum of partial sums, each one chain of fused multiply-adds over
// partial_sum_length() of k in order, whatever the rows of a block, the lanes and the weight's
// type. So y has the same bits for every way to cut M into blocks and into threads, with AVX2 and
// AVX-512, and for a weight stored exactly in 16 bits or 12. (With vdpbf16ps a chain's steps are
// pairs of k, the odd one first, and subnormals are zero: other bits, no larger error.) One chain
// over all of k would be
// simpler, but its error grows with the chain's length: twice that of a blocked library at k = 576.
// The price is that the GEMV has only as many chains as a panel has vectors; it is bound by memory,
// not by them.
//
// Tested by linear_test (against a double-precision reference) and the differential test.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "graph/type.h"
#include "jit/base/result.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

// What to do to an accumulator before it is stored, in this order: + bias, activation, (gated:
// act(gate) * up), + residual.
struct Epilogue {
  bool bias = false;  // n values in the order of the stacked weight rows (gated: gates, then ups)
  bool residual = false;   // one value per output
  std::string activation;  // "", "silu", "gelu", "gelu_tanh", "relu"
  bool gated = false;      // panels hold gate and up columns interleaved; y has n/2 columns
  friend bool operator==(const Epilogue&, const Epilogue&) = default;
};

// What multiplies and adds.
enum class Arithmetic : std::uint8_t {
  fma,          // fp32 x, weights widened to fp32
  dot,          // vdpbf16ps: pairs of bf16 x and bf16 weights, sums in fp32
  tiles,        // tdpbf16ps, likewise: tile_kernel.h
  split_tiles,  // tdpbf16ps of fp32 x and any weights, each the sum of bf16 parts: tile_kernel.h
};

struct LinearKernel {
  Arithmetic arithmetic = Arithmetic::fma;
  int lanes = 8;              // fp32 lanes of a vector
  int rows = 1;               // rows of a block: 1..max_rows(lanes); tiles: 16 or 32
  int rest = 0;               // rows of one smaller block behind the others; 0: there is none
  std::int64_t n = 0, k = 0;  // of the packed weight (both gate and up counted when gated)
  graph::DataType weight = graph::DataType::f32;  // f32, bf16, f16: as stored; arithmetic is fp32
  bool twelve_bits = false;                       // the weight is bf16 stored as twelve_bits.h says
  graph::DataType output = graph::DataType::f32;  // f32, bf16, f16 (also bias and residual)
  Epilogue epilogue;
  bool many_blocks = false;      // in a call: x lies in pieces, and weights are asked for by block,
                                 // otherwise
  std::int64_t prefetch = 1024;  // so many bytes ahead, in lines; 0: not. The bits are the same
  // Not 0: into L2, and so many ahead into L1. Likewise
  std::int64_t prefetch_near = 0;
  int streams = 1;  // panels read side by side, of one block: 1 or 2. Likewise
};

// Argument slots. Strides in bytes. A panel is panel_columns() columns of the packed weight.
// x[block b, row r of it, k] is at x + b * x_block_stride + r * x_row_stride
// + k / partial_sum_length() * x_stretch_stride + k % partial_sum_length() * its size: rows in
// place have x_block_stride = rows * x_row_stride and stretches that follow each other; packed x
// (linear_task.h) has its stretches in the order in which the kernel reads them. Of bf16 x with an
// odd k one zero follows each row.
// With many_blocks a block's stretch is cut further, into pieces of P = piece_bytes() of each row,
// those of all its rows one after another: byte i of row r's stretch is at + (i / P * rows + r) * P
// + i % P, and x_row_stride is not read. One stream through memory, where rows one below the other
// are `rows` short ones: with a turn of the loop as long as a piece, 1.05 to 1.11 times the speed.
// The kernel computes, for each panel in [panel_begin, panel_begin + panel_count) and each of
// block_count >= 1 blocks of `rows` rows and one of `rest`, its piece of y. Panels are the outer
// loop, so that the weights are read from memory once.
struct LinearArgs {
  enum Slot {
    x,
    x_row_stride,
    x_block_stride,
    x_stretch_stride,
    weight,
    y,
    y_row_stride,
    bias,
    residual,
    residual_row_stride,
    panel_begin,
    panel_count,
    block_count,
    partial_sums,  // partial_sums_bytes(), aligned to 64, of this thread alone
    unpacked,      // aligned to 64, of this thread alone: unpacked_bytes(), only for weights in 12
                   // or 16 bits; of tiles tile_scratch_bytes()
    row_count,     // only for tiles: the rows of y; the last block may have more
    tile_state,    // only for tiles: 64 bytes of this thread alone
    count
  };
};

inline constexpr int kPartialSumsBytesPerRow = 32 * 4;  // a panel's columns
inline constexpr int kMostStreams = 2;
// Of k, in one chain of additions: a multiple of all unrolled steps. Shorter chains round less, and
// cost more: here the sums go to memory and back once for 128 multiply-adds each.
constexpr std::int64_t partial_sum_length() { return 128; }
std::int64_t partial_sums_bytes(std::int64_t rows);  // of all blocks of a call
std::int64_t unpacked_bytes();                       // a panel's stretch of k in fp32

graph::DataType input_type(const LinearKernel& spec);  // of x
int piece_bytes(int lanes);                            // of a row of x, with many blocks: a vector
int max_rows(int lanes);  // 6 with AVX2 (6 x 16), 12 with AVX-512 (12 x 32)
// The packed layout depends neither on lanes nor on the type.
constexpr std::int64_t panel_columns() { return 32; }
std::int64_t panel_count(std::int64_t n);  // n rounded up
bool is_tiled(Arithmetic arithmetic);
// Whether there is a kernel with several streams: of one row, with AVX-512 of up to four; but with
// AVX2 not of weights in 12 bits, whose unpacking leaves no registers for the sums of two panels
// (through memory: 0.8 of the speed). Called with several blocks it reads one stream.
bool reads_several_panels(const LinearKernel& spec);
std::string_view name(Arithmetic arithmetic);  // of kernels: "linear_amx_bf16"
std::string function_name(const LinearKernel& spec);
std::string print(const LinearKernel& spec);  // canonical: the kernel's identity in the cache key
// Error: why there is no kernel for this.
Status supported(const LinearKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build(const LinearKernel& spec);
// The scalar reference, in double; args as the kernel's. Not of tiles.
void reference(const LinearKernel& spec, const std::int64_t* args);

}  // namespace tilewright::ops
