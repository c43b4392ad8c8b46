// The row kernel: a fused region of elementwise ops, reductions, norms and softmax over rows of any
// length.
//
// Floating values are f32 in registers whatever their type: bf16 and f16 round where they are
// stored or converted, not between fused ops. i32 is exact (add, sub, mul, neg, compares, where);
// where it meets a float it is rounded to f32, as an i64 that does not vary along the row is. i64
// is exact, too (add, sub, neg, abs, compares, where, conversions to i32 and boolean), but is not
// stored: positions end in masks. All stores come in the last pass over a row, so an output's row
// may be an input's row of the same element size.
//
// A region is a small straight-line program over rows [rows, columns]. Elementwise results live in
// registers; a reduction ends a pass over the row, and later passes recompute or reload what they
// need. Columns run in full vectors with a masked tail, so any length works and no byte outside an
// operand is touched.
//
// Tested by row_kernel_test (scalar reference, all ops x dtypes x lengths, guard pages).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "graph/type.h"
#include "jit/base/result.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

// How an operand's element moves along the columns.
enum class ColumnAccess : std::uint8_t {
  contiguous,  // element stride 1
  broadcast,   // one element for the whole row (stride 0)
};

struct RowOperand {
  graph::DataType dtype = graph::DataType::f32;  // f32, bf16, f16; boolean, i32; inputs: i64
  ColumnAccess access = ColumnAccess::contiguous;
};

// One step of the region. Operands index earlier instructions: 0..inputs-1 are the inputs, then
// results in order.
struct RowInstruction {
  graph::Op op;  // elementwise, sum/mean/amax, softmax, rms_norm, layer_norm, scalar
  std::vector<int> operands = {};
  double value = 0;   // scalar's value, pow's exponent, a norm's eps
  bool flag = false;  // gelu: tanh form; rms_norm: plus_one
  graph::DataType dtype =
      graph::DataType::f32;  // of the result (convert rounds to it; compares give boolean)
};

struct RowKernel {
  int lanes = 8;
  std::int64_t columns = -1;  // baked in when >= 0, else a run-time argument
  std::vector<RowOperand> inputs;
  std::vector<RowInstruction> body;
  std::vector<int> outputs;  // indices as for operands; a row-reduced result is stored once per row
  std::vector<RowOperand> output_operands;  // dtype and access (broadcast: one element per row)
};

// Argument slots: rows, columns, then per input (pointer, row stride in bytes), then per output the
// same.
struct RowArgs {
  enum Slot { rows, columns, first_operand };
  static int pointer(int operand) {
    return first_operand + 2 * operand;
  }  // inputs first, then outputs
  static int row_stride(int operand) { return first_operand + 2 * operand + 1; }
  static int count(const RowKernel& spec) {
    return first_operand + 2 * static_cast<int>(spec.inputs.size() + spec.outputs.size());
  }
};

// Error: why this region cannot be generated (an op or dtype that has no vector form).
Status supported(const RowKernel& spec);
std::string print(const RowKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build(const RowKernel& spec);
// The scalar reference, one element after another, in double where the kernel has float. args as
// the kernel's.
void reference(const RowKernel& spec, const std::int64_t* args);

}  // namespace tilewright::ops
