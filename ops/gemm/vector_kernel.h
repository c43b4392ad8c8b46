// The linear kernel for vectors: fused multiply-adds of fp32, or vdpbf16ps. What its loops are, and
// why, is told in vector_kernel.cpp.
//
// Tested by linear_test.
#pragma once

#include "jit/vir/vir.h"
#include "ops/gemm/linear_kernel.h"

namespace tilewright::ops {

// Rows that several streams may have: the sums of two panels in registers.
int most_rows_in_streams(int lanes);

// REQUIRES: supported(spec), !is_tiled(spec.arithmetic)
jit::vir::Function build_vectors(const LinearKernel& spec);

}  // namespace tilewright::ops
