// The matmul kernel: y[m, n] = x[m, k] @ w[k, n] of two activations, all sizes run-time arguments.
//
// The linear kernel's sibling for a right side that is no constant: nothing is packed, w is read
// where it lies, by rows ([k, n], n contiguous) or, `transposed`, by columns ([n, k], k
// contiguous), as the keys of spelled-out attention lie. It serves what no attention pattern
// matched, and batched products of any model.
//
// Sums: by rows each output is a sum of chains of fused multiply-adds over partial_sum_length() of
// k in order, as the linear kernel's; transposed, each lane is one chain over every lanes-th k, and
// lanes are added as a butterfly. So the bits do not depend on how work is shared.
//
// Tested by matmul_test (against a double-precision reference) and the campaign of models.
#pragma once

#include <cstdint>
#include <string>

#include "graph/type.h"
#include "jit/base/result.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

struct MatmulKernel {
  int lanes = 8;
  bool transposed = false;
  graph::DataType input = graph::DataType::f32;   // of x and w: f32, bf16, f16
  graph::DataType output = graph::DataType::f32;  // f32, bf16, f16; arithmetic is fp32
};

// Argument slots. Strides in bytes. The kernel computes block_count blocks of block_rows() rows,
// then single_rows rows one at a time.
struct MatmulArgs {
  enum Slot {
    x,
    x_row_stride,
    w,
    w_row_stride,  // from one k to the next; transposed: from one column to the next
    y,
    y_row_stride,
    columns,
    depth,  // k
    block_count,
    single_rows,
    count
  };
};

std::int64_t block_rows(const MatmulKernel& spec);
std::string print(const MatmulKernel& spec);  // canonical: the kernel's identity in the cache key
// Error: why there is no kernel for this.
Status supported(const MatmulKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build(const MatmulKernel& spec);
// The scalar reference, in double; args as the kernel's.
void reference(const MatmulKernel& spec, const std::int64_t* args);

}  // namespace tilewright::ops
