// Row steps: a fused region as primitive steps, which is what the row kernel's builder emits.
//
// Norms and softmax become elementwise steps around reductions. Each step knows its level: the
// number of passes over the row that must have ended before it can be computed (a reduction's
// result has the level of its operand plus one), and whether it varies along the columns. Steps
// that do not vary are computed once per row, with equal lanes.
//
// An i64 is two integers, its halves: arithmetic carries from one to the other, compares look at
// both. So it is exact, and the builder knows nothing wider than 32 bits.
//
// Tested by row_kernel_test.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "ops/elementwise.h"
#include "ops/row_kernel.h"

namespace tilewright::ops {

struct Step {
  enum class Kind : std::uint8_t {
    input,     // the region's input of that number: operands[0]
    low_half,  // of an i64 input, as an integer
    high_half,
    literal,               // value, in whatever form its user needs
    column_count,          // of the row, as a real
    elementwise,           // op
    sum,                   // of operands[0]
    sum_of_products,       // of operands[0] * operands[1]: one FMA per vector, fewer roundings
    maximum,               // NaN if any element is
    maximum_ignoring_nan,  // for softmax, whose sum brings NaN back
  };
  Kind kind = Kind::elementwise;
  graph::Op op = graph::Op::add;
  std::array<int, 3> operands{-1, -1, -1};
  double value = 0;
  bool flag = false;
  graph::DataType dtype = graph::DataType::f32;
  Form form = Form::real;          // of the result
  Form operand_form = Form::real;  // the form its operands are taken in (where: after the first)
  bool varies = false;
  int level = 0;

  bool is_input() const { return kind <= Kind::high_half; }
  bool is_reduction() const { return kind >= Kind::sum; }
  int operand_count() const;
};

struct RowSteps {
  std::vector<Step> steps;   // operands come before their users
  std::vector<int> outputs;  // the step of each output of the region
};

// REQUIRES: supported(spec)
RowSteps expand(const RowKernel& spec);

}  // namespace tilewright::ops
