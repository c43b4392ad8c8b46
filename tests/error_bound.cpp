// Error bounds for fused regions: running error analysis, one rule per op.
#include "error_bound.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numbers>

#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using graph::Op;
using ops::RowInstruction;
using Row = std::vector<Bounded>;

constexpr double kUnit = 0x1p-24;   // of fp32's rounding
constexpr double kTiny = 0x1p-126;  // where relative bounds end
constexpr double kUnknown = std::numeric_limits<double>::infinity();
constexpr double kFunctionUlps = 8;  // of the polynomials; math_test has the sharp bounds

Bounded rounded(double value, double error, double units = 1) {
  constexpr double kOverflow = 3e38;  // beyond it the kernel has infinity and this has not
  if (std::isnan(error) || std::abs(value) > kOverflow) error = kUnknown;
  return {value, error + units * kUnit * (std::abs(value) + error) + kTiny};
}

Bounded add(Bounded a, Bounded b) { return rounded(a.value + b.value, a.error + b.error); }
Bounded negate(Bounded a) { return {-a.value, a.error}; }
Bounded exact(double value) { return {value, 0}; }
Bounded literal(double value) { return rounded(value, 0); }

Bounded multiply(Bounded a, Bounded b) {
  return rounded(a.value * b.value,
                 std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error);
}

Bounded divide(Bounded a, Bounded b) {
  const double smallest = std::abs(b.value) - b.error;
  const double value = a.value / b.value;
  return smallest <= 0 ? Bounded{value, kUnknown}
                       : rounded(value, (a.error + std::abs(value) * b.error) / smallest);
}

// f(a) with an error by its slope's bound on the reals, or by its ends where it is monotone.
Bounded with_slope(double (*f)(double), double slope, Bounded a) {
  return rounded(f(a.value), slope * a.error, kFunctionUlps);
}

Bounded monotone(double (*f)(double), Bounded a) {
  const double value = f(a.value);
  const double above = std::abs(f(a.value + a.error) - value);
  const double below = std::abs(f(a.value - a.error) - value);
  if (std::isnan(above) || std::isnan(below)) return {value, kUnknown};
  return rounded(value, std::max(above, below), kFunctionUlps);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double gelu(double x) { return x * 0.5 * std::erfc(-x / std::numbers::sqrt2); }
double gelu_tanh(double x) {
  return x * sigmoid(2 * std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x));
}
double inverse_root(double x) { return 1 / std::sqrt(x); }

Bounded power(Bounded a, double exponent) {
  if (exponent == 2) return multiply(a, a);
  if (exponent == 3) return multiply(multiply(a, a), a);
  if (exponent == -1) return divide(exact(1), a);
  return monotone(exponent == 0.5 ? [](double x) { return std::sqrt(x); } : inverse_root, a);
}

Bounded maximum(Bounded a, Bounded b) {
  return {std::max(a.value, b.value), std::max(a.error, b.error)};
}

Bounded convert(Bounded a, DataType type) {
  if (type == DataType::boolean) {
    const bool certain = std::abs(a.value) > a.error || a.error == 0;
    return {a.value != 0 ? 1.0 : 0.0, certain ? 0 : kUnknown};
  }
  const double value = ops::rounded_to(type, a.value);
  if (a.error == 0 || (type != DataType::bf16 && type != DataType::f16)) return {value, a.error};
  return {value, a.error + 2 * tolerance(type, a)};
}

Bounded choose(const RowInstruction& instruction, Bounded condition, Bounded b, Bounded c) {
  if (instruction.dtype == DataType::boolean) {
    b = convert(b, DataType::boolean);
    c = convert(c, DataType::boolean);
  }
  if (convert(condition, DataType::boolean).error == 0) return condition.value != 0 ? b : c;
  return {b.value, std::abs(b.value - c.value) + b.error + c.error};
}

Bounded compare(Op op, Bounded a, Bounded b) {
  const double distance = a.value - b.value;
  const double error = a.error + b.error;
  const bool certain = error == 0 || std::abs(distance) > error;
  const bool value = op == Op::eq   ? distance == 0
                     : op == Op::ne ? distance != 0
                     : op == Op::lt ? distance < 0
                     : op == Op::le ? distance <= 0
                     : op == Op::gt ? distance > 0
                                    : distance >= 0;
  return {value ? 1.0 : 0.0, certain ? 0 : kUnknown};
}

Bounded integer(const RowInstruction& instruction, Bounded a, Bounded b) {
  const double value = instruction.op == Op::add   ? a.value + b.value
                       : instruction.op == Op::sub ? a.value - b.value
                       : instruction.op == Op::mul ? a.value * b.value
                                                   : -a.value;
  // Exact also as fp32, which other ops may take it in; beyond that nothing is claimed.
  return {value, std::abs(value) <= 0x1p24 ? 0 : kUnknown};
}

Bounded elementwise(const RowInstruction& instruction, Bounded a, Bounded b, Bounded c) {
  const auto exp = [](double x) { return std::exp(x); };
  const auto root = [](double x) { return std::sqrt(x); };
  const Bounded truth = convert(a, DataType::boolean), other = convert(b, DataType::boolean);
  const auto logical = [&](bool value) {
    return Bounded{value ? 1.0 : 0.0, truth.error + other.error};
  };
  switch (instruction.op) {
    case Op::add:
    case Op::sub:
    case Op::mul:
    case Op::neg:
      if (instruction.dtype == DataType::i32) return integer(instruction, a, b);
      if (instruction.op == Op::neg) return negate(a);
      if (instruction.op == Op::mul) return multiply(a, b);
      return add(a, instruction.op == Op::sub ? negate(b) : b);
    case Op::div:
      return divide(a, b);
    case Op::maximum:
      return maximum(a, b);
    case Op::minimum:
      return negate(maximum(negate(a), negate(b)));
    case Op::pow:
      return power(a, instruction.value);
    case Op::abs:
      return {std::abs(a.value), a.error};
    case Op::reciprocal:
      return divide(exact(1), a);
    case Op::sqrt:
      return monotone(root, a);
    case Op::rsqrt:
      return std::abs(a.value) > a.error ? monotone(inverse_root, a)
                                         : Bounded{inverse_root(a.value), kUnknown};
    case Op::exp:
      return monotone(exp, a);
    case Op::expm1:
      return monotone([](double x) { return std::expm1(x); }, a);
    case Op::log:
      return monotone([](double x) { return std::log(x); }, a);
    case Op::log1p:
      return monotone([](double x) { return std::log1p(x); }, a);
    case Op::sin:
      return with_slope([](double x) { return std::sin(x); }, 1, a);
    case Op::cos:
      return with_slope([](double x) { return std::cos(x); }, 1, a);
    case Op::tanh:
      return with_slope([](double x) { return std::tanh(x); }, 1, a);
    case Op::erf:
      return with_slope([](double x) { return std::erf(x); }, 1.13, a);
    case Op::sigmoid:
      return with_slope(sigmoid, 0.25, a);
    case Op::silu:
      return with_slope(silu, 1.1, a);
    case Op::relu:
      return maximum(a, exact(0));
    case Op::gelu:  // small results of negative arguments have absolute bounds
      return with_slope(instruction.flag ? gelu_tanh : gelu, 1.13, {a.value, a.error + 0x1p-21});
    case Op::convert:
      return convert(a, instruction.dtype);
    case Op::where:
      return choose(instruction, a, b, c);
    case Op::logical_and:
      return logical(a.value != 0 && b.value != 0);
    case Op::logical_or:
      return logical(a.value != 0 || b.value != 0);
    case Op::logical_not:
      return logical(a.value == 0);
    default:
      return compare(instruction.op, a, b);
  }
}

// At most columns / 8 + 8 additions in a row, whatever the lanes.
Bounded sum(const Row& x) {
  Bounded total;
  double magnitude = 0;
  for (const Bounded& element : x) {
    total.value += element.value;
    total.error += element.error;
    magnitude += std::abs(element.value) + element.error;
  }
  const double depth = static_cast<double>(x.size()) / 8 + 8;
  return {total.value, total.error + depth * kUnit * magnitude + kTiny};
}

Bounded mean(const Row& x) { return divide(sum(x), exact(static_cast<double>(x.size()))); }

Row map(const Row& x, const std::function<Bounded(Bounded)>& f) {
  Row result(x.size());
  std::transform(x.begin(), x.end(), result.begin(), f);
  return result;
}

Bounded largest(const Row& x) {
  Bounded result = x[0];
  for (const Bounded& element : x) result = maximum(result, element);
  return result;
}

Row softmax(const Row& x) {
  const Bounded top = largest(x);
  const auto exp = [](double v) { return std::exp(v); };
  const Row e = map(x, [&](Bounded v) { return monotone(exp, add(v, negate(top))); });
  const Bounded scale = divide(exact(1), sum(e));
  return map(e, [&](Bounded v) { return multiply(v, scale); });
}

Row normalise(const Row& x, double eps) {
  const Bounded square = mean(map(x, [](Bounded v) { return multiply(v, v); }));
  const Bounded scale = monotone(inverse_root, add(square, literal(eps)));
  return map(x, [&](Bounded v) { return multiply(v, scale); });
}

Row evaluate(const RowInstruction& instruction, const std::vector<Row>& values,
             std::size_t columns) {
  const auto at = [&](std::size_t operand, std::size_t i) {
    if (operand >= instruction.operands.size()) return Bounded{};
    return values[static_cast<std::size_t>(instruction.operands[operand])][i];
  };
  if (instruction.op == Op::scalar) return Row(columns, literal(instruction.value));
  const Row& x = values[static_cast<std::size_t>(instruction.operands[0])];
  Row result(columns);
  switch (instruction.op) {
    case Op::sum:
      return Row(columns, sum(x));
    case Op::mean:
      return Row(columns, mean(x));
    case Op::amax:
      return Row(columns, largest(x));
    case Op::softmax:
      return softmax(x);
    case Op::rms_norm:
      result = normalise(x, instruction.value);
      if (instruction.operands.size() < 2) return result;
      for (std::size_t i = 0; i < columns; ++i) {
        const Bounded weight = instruction.flag ? add(exact(1), at(1, i)) : at(1, i);
        result[i] = multiply(result[i], weight);
      }
      return result;
    case Op::layer_norm: {
      const Bounded centre = negate(mean(x));
      result = normalise(map(x, [&](Bounded v) { return add(v, centre); }), instruction.value);
      for (std::size_t i = 0; i < columns; ++i) {
        if (instruction.operands.size() > 1) result[i] = multiply(result[i], at(1, i));
        if (instruction.operands.size() > 2) result[i] = add(result[i], at(2, i));
      }
      return result;
    }
    default:
      for (std::size_t i = 0; i < columns; ++i) {
        result[i] = elementwise(instruction, at(0, i), at(1, i), at(2, i));
      }
      return result;
  }
}

}  // namespace

std::vector<std::vector<Bounded>> bounded_outputs(const ops::RowKernel& spec,
                                                  const std::int64_t* args, std::int64_t row) {
  const auto columns = static_cast<std::size_t>(args[ops::RowArgs::columns]);
  std::vector<Row> values;
  for (std::size_t k = 0; k < spec.inputs.size(); ++k) {
    const ops::RowOperand& input = spec.inputs[k];
    const int operand = static_cast<int>(k);
    const auto* data = reinterpret_cast<const std::byte*>(args[ops::RowArgs::pointer(operand)]) +
                       row * args[ops::RowArgs::row_stride(operand)];
    const bool moves = input.access == ops::ColumnAccess::contiguous;
    const auto size = static_cast<std::size_t>(moves ? size_in_bytes(input.dtype) : 0);
    Row& value = values.emplace_back(columns);
    for (std::size_t i = 0; i < columns; ++i) {
      value[i] = exact(ops::read_scalar(input.dtype, data + i * size));
    }
  }
  for (const RowInstruction& instruction : spec.body) {
    values.push_back(evaluate(instruction, values, columns));
  }
  std::vector<Row> outputs;
  for (std::size_t k = 0; k < spec.outputs.size(); ++k) {
    Row& output = outputs.emplace_back(values[static_cast<std::size_t>(spec.outputs[k])]);
    if (spec.output_operands[k].dtype != DataType::boolean) continue;
    for (Bounded& element : output) element = convert(element, DataType::boolean);
  }
  return outputs;
}

double tolerance(DataType type, const Bounded& bounded) {
  const double magnitude = std::abs(bounded.value) + bounded.error;
  switch (type) {
    case DataType::bf16:
      return bounded.error + 0x1p-8 * magnitude;
    case DataType::f16:
      return bounded.error + 0x1p-11 * magnitude + 0x1p-24;
    case DataType::f32:
      return bounded.error + kUnit * magnitude;
    default:
      return bounded.error;
  }
}

}  // namespace tilewright
