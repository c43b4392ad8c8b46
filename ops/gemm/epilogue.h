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

// Asks for what finish_panel will read and write of the rows that come next: a panel's columns of
// one row lie a whole row's length from those of another, so the hardware does not, and each would
// be waited for (with 3072 columns of fp32 8 % of a layer with k = 576).
class RowsAhead {
 public:
  RowsAhead(jit::vir::Builder& builder, const LinearKernel& spec, jit::vir::Reg panel);
  // Consumes `rows`.
  void ask(jit::vir::Reg rows);

 private:
  jit::vir::Builder& b_;
  const LinearKernel& spec_;
  jit::vir::Reg y_, residual_;
};

// Finishes and stores the first `rows` rows of a panel, whose sums lie one row below the other.
// Consumes `rows` and moves `sums` behind them.
void finish_panel(jit::vir::Builder& builder, const LinearKernel& spec, jit::vir::Reg panel,
                  jit::vir::Reg rows, jit::vir::Reg sums);

}  // namespace tilewright::ops
