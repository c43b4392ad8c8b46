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

}  // namespace

PanelRows::PanelRows(Builder& builder, const LinearKernel& spec, Reg panel)
    : b_(builder), spec_(spec), offset_(b_.mul(panel, panel_output_bytes(spec))) {
  next_.y = b_.add(b_.arg(LinearArgs::y), offset_);
  if (spec.epilogue.residual) next_.residual = b_.add(b_.arg(LinearArgs::residual), offset_);
}

void PanelRows::ask(Reg rows) const {
  const Reg y = b_.copy(next_.y);
  const Reg residual = spec_.epilogue.residual ? b_.copy(next_.residual) : Reg{};
  b_.loop(rows, [&] {
    for (std::int64_t line = 0; line < panel_output_bytes(spec_); line += kLineBytes) {
      b_.prefetch(b_.at(y, line), 1);
      if (spec_.epilogue.residual) b_.prefetch(b_.at(residual, line), 1);
    }
    b_.add_to(y, b_.arg(LinearArgs::y_row_stride));
    if (spec_.epilogue.residual) b_.add_to(residual, b_.arg(LinearArgs::residual_row_stride));
  });
}

void PanelRows::finish(Reg rows, Reg sums) {
  const std::int64_t outputs = spec_.n / runs(spec_), panel_outputs = panel_columns() / runs(spec_);
  const auto width = static_cast<int>(panel_outputs), tail = static_cast<int>(outputs % width);
  if (tail == 0) return finish(width, rows, sums);
  const std::int64_t last = outputs / panel_outputs * panel_output_bytes(spec_);
  b_.if_nonzero(
      b_.add(offset_, -last), [&] { finish(width, rows, sums); },
      [&] { finish(tail, rows, sums); });
}

void PanelRows::finish(int width, Reg rows, Reg sums) {
  OutputRow row = next_;
  if (spec_.epilogue.bias) row.bias = b_.add(b_.arg(LinearArgs::bias), offset_);
  const int vectors = static_cast<int>(panel_columns()) / spec_.lanes;
  const int stored = vectors / runs(spec_);
  const auto sum = [&](int i) {
    return b_.load(jit::vir::Element::f32, b_.at(sums, i * b_.vector_bytes()));
  };
  b_.loop(rows, [&] {
    for (int j = 0; j < stored; ++j) {
      OutputVector vector;
      vector.first = j * spec_.lanes;
      vector.count = std::clamp(width - j * spec_.lanes, 0, spec_.lanes);
      if (vector.count == 0) continue;
      vector.value = sum(j);
      if (spec_.epilogue.gated) vector.up = sum(j + stored);
      finish_vector(b_, spec_, vector, row);
    }
    b_.add_to(row.y, b_.arg(LinearArgs::y_row_stride));
    if (spec_.epilogue.residual) b_.add_to(row.residual, b_.arg(LinearArgs::residual_row_stride));
    b_.add_to(sums, kPartialSumsBytesPerRow);
  });
}

}  // namespace tilewright::ops
