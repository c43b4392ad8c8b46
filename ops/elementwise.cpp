// Elementwise ops on vector registers: real, integer and mask forms.
//
// Tested by row_kernel_test.
#include "ops/elementwise.h"

#include <cassert>

#include "jit/math.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using graph::Op;
using jit::vir::Builder;
using jit::vir::Reg;
namespace math = jit::math;

Reg not_a_number(Builder& b, Reg x) { return b.not_equal(x, x); }

// Compiled code has no mask constants: 0 == 0 in every lane.
Reg all_lanes(Builder& b) {
  Reg zero = b.zero();
  return b.iequal(zero, zero);
}

Reg mask_not(Builder& b, Reg mask) { return b.mask_andn(mask, all_lanes(b)); }

Reg mask_xor(Builder& b, Reg x, Reg y) { return b.mask_or(b.mask_andn(x, y), b.mask_andn(y, x)); }

Reg minimum(Builder& b, Reg x, Reg y) {
  return b.select(not_a_number(b, x), x, b.vmin(x, y));  // vmin gives y when y is NaN
}

Reg emit_real(Builder& b, Op op, std::span<const Reg> x, bool tanh_form) {
  switch (op) {
    case Op::add:
      return b.vadd(x[0], x[1]);
    case Op::sub:
      return b.vsub(x[0], x[1]);
    case Op::mul:
      return b.vmul(x[0], x[1]);
    case Op::div:
      return b.vdiv(x[0], x[1]);
    case Op::maximum:
      return maximum(b, x[0], x[1]);
    case Op::minimum:
      return minimum(b, x[0], x[1]);
    case Op::neg:
      return b.vxor(x[0], b.splat_bits(0x80000000u));
    case Op::abs:
      return b.vand(x[0], b.splat_bits(0x7fffffffu));
    case Op::reciprocal:
      return b.vdiv(b.splat(1.0f), x[0]);
    case Op::sqrt:
      return b.vsqrt(x[0]);
    case Op::rsqrt:
      return math::rsqrt(b, x[0]);
    case Op::exp:
      return math::exp(b, x[0]);
    case Op::expm1:
      return math::expm1(b, x[0]);
    case Op::log:
      return math::log(b, x[0]);
    case Op::log1p:
      return math::log1p(b, x[0]);
    case Op::sin:
      return math::sin(b, x[0]);
    case Op::cos:
      return math::cos(b, x[0]);
    case Op::tanh:
      return math::tanh(b, x[0]);
    case Op::erf:
      return math::erf(b, x[0]);
    case Op::sigmoid:
      return math::sigmoid(b, x[0]);
    case Op::silu:
      return math::silu(b, x[0]);
    case Op::gelu:
      return tanh_form ? math::gelu_tanh(b, x[0]) : math::gelu(b, x[0]);
    case Op::relu:
      return b.vmax(b.zero(), x[0]);  // the second operand when either is NaN
    case Op::eq:
      return b.equal(x[0], x[1]);
    case Op::ne:
      return b.not_equal(x[0], x[1]);
    case Op::lt:
      return b.less(x[0], x[1]);
    case Op::le:
      return b.less_equal(x[0], x[1]);
    case Op::gt:
      return b.less(x[1], x[0]);
    case Op::ge:
      return b.less_equal(x[1], x[0]);
    case Op::where:
      return b.select(x[0], x[1], x[2]);
    default:
      return {};
  }
}

Reg emit_integer(Builder& b, Op op, std::span<const Reg> x) {
  switch (op) {
    case Op::add:
      return b.iadd(x[0], x[1]);
    case Op::sub:
      return b.isub(x[0], x[1]);
    case Op::mul:
      return b.imul(x[0], x[1]);
    case Op::neg:
      return b.isub(b.zero(), x[0]);
    case Op::eq:
      return b.iequal(x[0], x[1]);
    case Op::ne:
      return mask_not(b, b.iequal(x[0], x[1]));
    case Op::lt:
      return b.igreater(x[1], x[0]);
    case Op::le:
      return mask_not(b, b.igreater(x[0], x[1]));
    case Op::gt:
      return b.igreater(x[0], x[1]);
    case Op::ge:
      return mask_not(b, b.igreater(x[1], x[0]));
    case Op::where:
      return b.select(x[0], x[1], x[2]);
    default:
      return {};
  }
}

Reg emit_mask(Builder& b, Op op, std::span<const Reg> x) {
  switch (op) {
    case Op::logical_and:
      return b.mask_and(x[0], x[1]);
    case Op::logical_or:
      return b.mask_or(x[0], x[1]);
    case Op::logical_not:
      return mask_not(b, x[0]);
    case Op::eq:
      return mask_not(b, mask_xor(b, x[0], x[1]));
    case Op::ne:
      return mask_xor(b, x[0], x[1]);
    case Op::where:
      return b.mask_or(b.mask_and(x[0], x[1]), b.mask_andn(x[0], x[2]));
    default:
      return {};
  }
}

Reg round_to_f16(Builder& b, Reg x) {
  Reg sign = b.vand(x, b.splat_bits(0x80000000u));
  Reg magnitude = b.vxor(x, sign);
  // Normal numbers lose 13 bits of mantissa; the addition rounds to nearest, ties to even.
  Reg lowest_kept_bit = b.vand(b.vshift_right(magnitude, 13), b.splat_bits(1));
  Reg normal = b.iadd(b.iadd(magnitude, b.splat_bits(0xfff)), lowest_kept_bit);
  normal = b.vand(normal, b.splat_bits(0xffffe000u));
  // Below 2^-14 the step is 2^-24 whatever the exponent: the last bit of numbers in [0.5, 1).
  Reg half = b.splat(0.5f);
  Reg subnormal = b.vsub(b.vadd(magnitude, half), half);
  Reg rounded = b.select(b.less(magnitude, b.splat(0x1p-14f)), subnormal, normal);
  Reg overflow = b.less_equal(b.splat(65520.0f), magnitude);
  rounded = b.select(overflow, b.splat_bits(0x7f800000u), rounded);
  rounded = b.vor(rounded, sign);
  return b.select(not_a_number(b, x), x, rounded);
}

}  // namespace

Form form_of(DataType type) {
  if (type == DataType::boolean) return Form::mask;
  return type == DataType::i32 ? Form::integer : Form::real;
}

Reg change_form(Builder& b, Reg value, Form from, Form to) {
  if (from == to) return value;
  if (to == Form::mask) {
    if (from == Form::real) return b.not_equal(value, b.zero());
    return mask_not(b, b.iequal(value, b.zero()));
  }
  if (from == Form::integer) return b.to_f32(value);
  assert(from == Form::mask);
  return b.select(value, to == Form::real ? b.splat(1.0f) : b.splat_bits(1), b.zero());
}

Reg emit_elementwise(Builder& builder, Op op, Form form, std::span<const Reg> operands,
                     bool tanh_form) {
  Reg result;
  switch (form) {
    case Form::real:
      result = emit_real(builder, op, operands, tanh_form);
      break;
    case Form::integer:
      result = emit_integer(builder, op, operands);
      break;
    case Form::mask:
      result = emit_mask(builder, op, operands);
      break;
  }
  assert(result.valid());
  return result;
}

Reg round_to(Builder& b, DataType type, Reg value) {
  if (type == DataType::bf16) return b.vshift_left(b.round_to_bf16_bits(value), 16);
  return type == DataType::f16 ? round_to_f16(b, value) : value;
}

Reg maximum(Builder& b, Reg x, Reg y) {
  return b.select(not_a_number(b, x), x, b.vmax(x, y));  // vmax gives y when y is NaN
}

}  // namespace tilewright::ops
