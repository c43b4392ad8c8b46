// See epilogue.h.
//
// Tested by linear_test.
#include "ops/gemm/epilogue.h"

#include <algorithm>

#include "jit/math.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Builder;
using jit::vir::Reg;

// Lane i xor `lane` of every lane i: brings `lane` to lane 0, and back.
Reg exchange(Builder& b, Reg value, int lane) {
  for (int distance = 1; distance <= lane; distance *= 2) {
    if ((lane & distance) != 0) value = b.swap(value, distance);
  }
  return value;
}

Block part_of_vector(Builder& b, std::int64_t first, int count) {
  if (count == b.lanes()) return {Block::Part::vector, {}, first, {}, 0};
  return {Block::Part::masked, {}, first, b.tail_mask(b.constant(count)), 0};
}

void store_columns(Builder& b, DataType type, Reg base, std::int64_t first, int count, Reg value) {
  if (count == b.lanes() || has_masked_moves(type, b.lanes())) {
    return store(b, type, base, part_of_vector(b, first, count), value);
  }
  for (int lane = 0; lane < count; ++lane) {
    const Block one{Block::Part::single, {}, first + lane, {}, 0};
    store(b, type, base, one, exchange(b, value, lane));
  }
}

Reg activate(Builder& b, const std::string& activation, Reg x) {
  if (activation == "silu") return jit::math::silu(b, x);
  if (activation == "gelu") return jit::math::gelu(b, x);
  if (activation == "gelu_tanh") return jit::math::gelu_tanh(b, x);
  if (activation == "relu") return b.vmax(b.zero(), x);  // the second operand if it is NaN
  return x;
}

// `count` elements of a type from base[first]; the other lanes are 0. AVX2 cannot mask 16-bit
// moves: there the elements of an incomplete vector, which only the last panel has, move one at a
// time.
Reg load_columns(Builder& b, DataType type, Reg base, std::int64_t first, int count) {
  if (count == b.lanes() || has_masked_moves(type, b.lanes())) {
    return load(b, type, base, part_of_vector(b, first, count));
  }
  Reg value;
  for (int lane = 0; lane < count; ++lane) {
    Reg one = load(b, type, base, {Block::Part::single, {}, first + lane, {}, 0});
    one = exchange(b, one, lane);
    value = lane == 0 ? one : b.vor(value, one);
  }
  return value;
}

}  // namespace

void finish_vector(Builder& b, const LinearKernel& spec, const OutputVector& vector,
                   const OutputRow& row) {
  const auto with_bias = [&](Reg sum, std::int64_t first) {
    if (!spec.epilogue.bias) return sum;
    return b.vadd(sum, load_columns(b, spec.output, row.bias, first, vector.count));
  };
  Reg value = activate(b, spec.epilogue.activation, with_bias(vector.value, vector.first));
  if (spec.epilogue.gated) {
    value = b.vmul(value, with_bias(vector.up, vector.first + spec.n / 2));
  }
  if (spec.epilogue.residual) {
    value = b.vadd(value, load_columns(b, spec.output, row.residual, vector.first, vector.count));
  }
  store_columns(b, spec.output, row.y, vector.first, vector.count, value);
}

namespace {

constexpr std::int64_t kLineBytes = 64;

int runs(const LinearKernel& spec) { return spec.epilogue.gated ? 2 : 1; }

std::int64_t panel_output_bytes(const LinearKernel& spec) {
  return panel_columns() / runs(spec) * graph::size_in_bytes(spec.output);
}

// Stores `width` outputs of each row, `offset` bytes from the rows' beginnings.
void finish_rows(Builder& b, const LinearKernel& spec, Reg offset, int width, Reg rows, Reg sums) {
  OutputRow row;
  row.y = b.add(b.arg(LinearArgs::y), offset);
  if (spec.epilogue.residual) row.residual = b.add(b.arg(LinearArgs::residual), offset);
  if (spec.epilogue.bias) row.bias = b.add(b.arg(LinearArgs::bias), offset);
  const int vectors = static_cast<int>(panel_columns()) / spec.lanes;
  const int stored = vectors / runs(spec);
  const auto sum = [&](int i) {
    return b.load(jit::vir::Element::f32, b.at(sums, i * b.vector_bytes()));
  };
  b.loop(rows, [&] {
    for (int j = 0; j < stored; ++j) {
      OutputVector vector;
      vector.first = j * spec.lanes;
      vector.count = std::clamp(width - j * spec.lanes, 0, spec.lanes);
      if (vector.count == 0) continue;
      vector.value = sum(j);
      if (spec.epilogue.gated) vector.up = sum(j + stored);
      finish_vector(b, spec, vector, row);
    }
    b.add_to(row.y, b.arg(LinearArgs::y_row_stride));
    if (spec.epilogue.residual) b.add_to(row.residual, b.arg(LinearArgs::residual_row_stride));
    b.add_to(sums, kPartialSumsBytesPerRow);
  });
}

}  // namespace

RowsAhead::RowsAhead(Builder& builder, const LinearKernel& spec, Reg panel)
    : b_(builder), spec_(spec) {
  const Reg offset = b_.mul(panel, panel_output_bytes(spec));
  y_ = b_.add(b_.arg(LinearArgs::y), offset);
  if (spec.epilogue.residual) residual_ = b_.add(b_.arg(LinearArgs::residual), offset);
}

void RowsAhead::ask(Reg rows) {
  b_.loop(rows, [&] {
    for (std::int64_t line = 0; line < panel_output_bytes(spec_); line += kLineBytes) {
      b_.prefetch(b_.at(y_, line), 1);
      if (spec_.epilogue.residual) b_.prefetch(b_.at(residual_, line), 1);
    }
    b_.add_to(y_, b_.arg(LinearArgs::y_row_stride));
    if (spec_.epilogue.residual) b_.add_to(residual_, b_.arg(LinearArgs::residual_row_stride));
  });
}

void finish_panel(Builder& b, const LinearKernel& spec, Reg panel, Reg rows, Reg sums) {
  const std::int64_t outputs = spec.n / runs(spec), panel_outputs = panel_columns() / runs(spec);
  const std::int64_t panel_bytes = panel_output_bytes(spec);
  const Reg offset = b.mul(panel, panel_bytes);
  const auto width = static_cast<int>(panel_outputs), tail = static_cast<int>(outputs % width);
  if (tail == 0) return finish_rows(b, spec, offset, width, rows, sums);
  b.if_nonzero(
      b.add(offset, -(outputs / panel_outputs * panel_bytes)),
      [&] { finish_rows(b, spec, offset, width, rows, sums); },
      [&] { finish_rows(b, spec, offset, tail, rows, sums); });
}

}  // namespace tilewright::ops
