// The epilogue of a linear kernel: what happens to the sums between the last product and the store.
// It is ordinary VIR, so the allocator sees it.
//
// Tested by linear_test.
#pragma once

#include <cstdint>

#include "jit/vir/builder.h"
#include "ops/gemm/linear_kernel.h"

namespace tilewright::ops {

// A run of neighbouring outputs of one row, at most a vector of them.
struct OutputVector {
  jit::vir::Reg value;     // the sum (gated: the gate's)
  jit::vir::Reg up;        // gated: the up projection's sum
  std::int64_t first = 0;  // its first column, from the panel's first output column
  int count = 0;           // columns that exist, 1..lanes
};

// Where the panel's first output column of a row is; each is valid if the epilogue reads it.
struct OutputRow {
  jit::vir::Reg y;
  jit::vir::Reg residual;
  jit::vir::Reg bias;  // the gates'; the ups' follow all gates'
};

// Finishes and stores one vector.
void finish_vector(jit::vir::Builder& builder, const LinearKernel& spec, const OutputVector& vector,
                   const OutputRow& row);

// A panel's columns of one row after the other.
class PanelRows {
 public:
  PanelRows(jit::vir::Builder& builder, const LinearKernel& spec, jit::vir::Reg panel);

  // Asks for what finish() will read and write of the next `rows` rows, which it consumes: they lie
  // a whole row's length from each other, so the hardware does not, and each would be waited for
  // (with 3072 columns of fp32 8 % of a layer with k = 576).
  void ask(jit::vir::Reg rows) const;

  // Finishes and stores the next `rows` rows, whose sums lie one row below the other. Consumes
  // `rows` and moves `sums` behind them.
  void finish(jit::vir::Reg rows, jit::vir::Reg sums);

 private:
  // Of each row the first `width` outputs.
  void finish(int width, jit::vir::Reg rows, jit::vir::Reg sums);

  jit::vir::Builder& b_;
  const LinearKernel& spec_;
  jit::vir::Reg offset_;  // of the panel's columns, bytes
  OutputRow next_;
};

}  // namespace tilewright::ops
