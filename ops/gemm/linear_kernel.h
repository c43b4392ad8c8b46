// The linear kernel: y[rows, n] = epilogue(x[rows, k] @ w[n, k].T), for a few rows at a time (1 is
// the GEMV).
//
// One VIR builder for every weight type, number of lanes and epilogue; the block of `rows`
// accumulators is baked in, everything else about M is a run-time argument. Weights are packed once
// (pack.h) and serve prefill and decode.
//
// Tested by linear_test (against a double-precision reference) and the differential test.
#pragma once

#include <cstdint>
#include <string>

#include "graph/type.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

// What to do to an accumulator before it is stored, in this order: + bias, activation, (gated:
// act(gate) * up),
// + residual.
struct Epilogue {
  bool bias = false;
  bool residual = false;
  std::string activation;  // "", "silu", "gelu", "gelu_tanh", "relu"
  bool gated = false;      // panels hold gate and up columns interleaved; y has n/2 columns
  friend bool operator==(const Epilogue&, const Epilogue&) = default;
};

struct LinearKernel {
  int lanes = 8;              // fp32 lanes of a vector
  int rows = 1;               // rows of a block: 1..max_rows(lanes)
  std::int64_t n = 0, k = 0;  // of the packed weight (both gate and up counted when gated)
  graph::DataType weight = graph::DataType::f32;  // f32, bf16, f16: as stored; arithmetic is fp32
  graph::DataType input = graph::DataType::f32;   // f32, bf16, f16
  graph::DataType output = graph::DataType::f32;  // f32, bf16, f16 (also bias and residual)
  Epilogue epilogue;
};

// Argument slots. Strides in bytes. A panel is panel_columns() columns of the packed weight.
// The kernel computes, for each panel in [panel_begin, panel_begin + panel_count) and each of
// block_count blocks of `rows` rows, its piece of y. Panels are the outer loop, so that a panel
// stays in cache over all row blocks.
struct LinearArgs {
  enum Slot {
    x,
    x_row_stride,
    weight,
    y,
    y_row_stride,
    bias,
    residual,
    residual_row_stride,
    panel_begin,
    panel_count,
    block_count,
    count
  };
};

int max_rows(int lanes);  // 6 with AVX2 (6x16), 8 or more with AVX-512
std::int64_t
panel_columns();  // 32 for every weight type: the packed layout does not depend on lanes
std::int64_t panel_count(std::int64_t n);     // n rounded up
std::string print(const LinearKernel& spec);  // canonical: the kernel's identity in the cache key
jit::vir::Function build(const LinearKernel& spec);

}  // namespace tilewright::ops
