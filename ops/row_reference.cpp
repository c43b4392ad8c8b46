// The row kernel's scalar reference: one element after another, in double, straight from the
// specification. It shares nothing with the builder.
//
// Tested by row_kernel_test.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>

#include "ops/row_kernel.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using graph::Op;
using Row = std::vector<double>;  // of `columns` elements

double maximum(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
  return std::max(a, b);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double gelu(double x, bool tanh_form) {
  if (!tanh_form) return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2));
  const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  return 0.5 * x * (1 + std::tanh(inner));
}

// i32 arithmetic wraps.
double as_i32(double x) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(static_cast<std::int64_t>(x)));
}

double convert(double x, DataType type) {
  if (type == DataType::boolean) return x != 0;
  return type == DataType::bf16 || type == DataType::f16 ? rounded_to(type, x) : x;
}

double elementwise(const RowInstruction& instruction, double a, double b, double c) {
  const bool integer = instruction.dtype == DataType::i32;
  switch (instruction.op) {
    case Op::add:
      return integer ? as_i32(a + b) : a + b;
    case Op::sub:
      return integer ? as_i32(a - b) : a - b;
    case Op::mul:
      return integer ? as_i32(a * b) : a * b;
    case Op::div:
      return a / b;
    case Op::maximum:
      return maximum(a, b);
    case Op::minimum:
      return -maximum(-a, -b);
    case Op::pow:
      return std::pow(a, instruction.value);
    case Op::neg:
      return integer ? as_i32(-a) : -a;
    case Op::abs:
      return std::abs(a);
    case Op::reciprocal:
      return 1 / a;
    case Op::sqrt:
      return std::sqrt(a);
    case Op::rsqrt:
      return 1 / std::sqrt(a);
    case Op::exp:
      return std::exp(a);
    case Op::expm1:
      return std::expm1(a);
    case Op::log:
      return std::log(a);
    case Op::log1p:
      return std::log1p(a);
    case Op::sin:
      return std::sin(a);
    case Op::cos:
      return std::cos(a);
    case Op::tanh:
      return std::tanh(a);
    case Op::erf:
      return std::erf(a);
    case Op::sigmoid:
      return sigmoid(a);
    case Op::silu:
      return a * sigmoid(a);
    case Op::relu:
      return maximum(a, 0);
    case Op::gelu:
      return gelu(a, instruction.flag);
    case Op::convert:
      return convert(a, instruction.dtype);
    case Op::where:
      return convert(a != 0 ? b : c, instruction.dtype);
    case Op::eq:
      return a == b;
    case Op::ne:
      return a != b;
    case Op::lt:
      return a < b;
    case Op::le:
      return a <= b;
    case Op::gt:
      return a > b;
    case Op::ge:
      return a >= b;
    case Op::logical_and:
      return a != 0 && b != 0;
    case Op::logical_or:
      return a != 0 || b != 0;
    case Op::logical_not:
      return a == 0;
    default:
      return std::numeric_limits<double>::quiet_NaN();
  }
}

double sum(const Row& x) { return std::accumulate(x.begin(), x.end(), 0.0); }

double largest(const Row& x) {
  return std::accumulate(x.begin(), x.end(), -std::numeric_limits<double>::infinity(), maximum);
}

double mean_square(const Row& x) {
  return std::inner_product(x.begin(), x.end(), x.begin(), 0.0) / static_cast<double>(x.size());
}

Row softmax(Row x) {
  const double maximum = largest(x);
  for (double& element : x) element = std::exp(element - maximum);
  const double total = sum(x);
  for (double& element : x) element /= total;
  return x;
}

Row rms_norm(Row x, const Row* weight, const RowInstruction& instruction) {
  const double scale = 1 / std::sqrt(mean_square(x) + instruction.value);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] *= scale;
    if (weight != nullptr) x[i] *= instruction.flag ? 1 + (*weight)[i] : (*weight)[i];
  }
  return x;
}

Row layer_norm(Row x, const Row* weight, const Row* bias, double eps) {
  const double mean = sum(x) / static_cast<double>(x.size());
  for (double& element : x) element -= mean;
  const double scale = 1 / std::sqrt(mean_square(x) + eps);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] *= scale;
    if (weight != nullptr) x[i] *= (*weight)[i];
    if (bias != nullptr) x[i] += (*bias)[i];
  }
  return x;
}

Row evaluate(const RowInstruction& instruction, const std::vector<Row>& values,
             std::size_t columns) {
  const auto operand = [&](std::size_t i) -> const Row* {
    if (i >= instruction.operands.size()) return nullptr;
    return &values[static_cast<std::size_t>(instruction.operands[i])];
  };
  const Row* x = operand(0);
  switch (instruction.op) {
    case Op::scalar:
      return Row(columns, instruction.value);
    case Op::sum:
      return Row(columns, sum(*x));
    case Op::mean:
      return Row(columns, sum(*x) / static_cast<double>(columns));
    case Op::amax:
      return Row(columns, largest(*x));
    case Op::softmax:
      return softmax(*x);
    case Op::rms_norm:
      return rms_norm(*x, operand(1), instruction);
    case Op::layer_norm:
      return layer_norm(*x, operand(1), operand(2), instruction.value);
    default:
      break;
  }
  Row result(columns);
  const Row* b = operand(1);
  const Row* c = operand(2);
  for (std::size_t i = 0; i < columns; ++i) {
    result[i] =
        elementwise(instruction, (*x)[i], b != nullptr ? (*b)[i] : 0, c != nullptr ? (*c)[i] : 0);
  }
  return result;
}

}  // namespace

void reference(const RowKernel& spec, const std::int64_t* args) {
  const std::int64_t baked = spec.columns;
  const auto columns = static_cast<std::size_t>(baked >= 0 ? baked : args[RowArgs::columns]);
  const int inputs = static_cast<int>(spec.inputs.size());
  const auto element = [&](int operand, std::int64_t row, const RowOperand& type, std::size_t i) {
    const std::int64_t size = size_in_bytes(type.dtype);
    const bool moves = type.access == ColumnAccess::contiguous;
    const std::int64_t offset = moves ? static_cast<std::int64_t>(i) * size : 0;
    return args[RowArgs::pointer(operand)] + row * args[RowArgs::row_stride(operand)] + offset;
  };
  for (std::int64_t row = 0; row < args[RowArgs::rows]; ++row) {
    std::vector<Row> values;
    for (int k = 0; k < inputs; ++k) {
      const RowOperand& type = spec.inputs[static_cast<std::size_t>(k)];
      Row& value = values.emplace_back(columns);
      for (std::size_t i = 0; i < columns; ++i) {
        value[i] = read_scalar(type.dtype, std::bit_cast<void*>(element(k, row, type, i)));
      }
    }
    for (const RowInstruction& instruction : spec.body) {
      values.push_back(evaluate(instruction, values, columns));
    }
    for (std::size_t k = 0; k < spec.outputs.size(); ++k) {
      const RowOperand& type = spec.output_operands[k];
      const Row& value = values[static_cast<std::size_t>(spec.outputs[k])];
      const std::size_t stored = type.access == ColumnAccess::contiguous ? columns : 1;
      for (std::size_t i = 0; i < std::min(stored, columns); ++i) {
        const std::int64_t to = element(inputs + static_cast<int>(k), row, type, i);
        write_scalar(type.dtype, std::bit_cast<void*>(to), value[i]);
      }
    }
  }
}

}  // namespace tilewright::ops
