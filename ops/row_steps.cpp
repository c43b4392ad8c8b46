// Row steps: expansion of a region's instructions into primitive steps.
//
// Tested by row_kernel_test.
#include "ops/row_steps.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tilewright::ops {
namespace {

using graph::DataType;
using graph::Op;
using Kind = Step::Kind;

bool is_integer_literal(const Step& step) {
  return step.kind == Kind::literal && step.value == std::trunc(step.value) &&
         std::abs(step.value) <= std::numeric_limits<std::int32_t>::max();
}

// The low 32 bits and the rest.
double half_of(double value, bool high) {
  const auto bits = static_cast<std::int64_t>(value);
  return static_cast<double>(high ? bits >> 32 : static_cast<std::int32_t>(bits));
}

bool is_compare(Op op) { return op >= Op::eq && op <= Op::ge; }

bool is_exact_integer(const Step& s) {
  return s.kind == Kind::literal ? s.value == std::trunc(s.value) : s.form != Form::real;
}

class Expansion {
 public:
  explicit Expansion(const RowKernel& spec) : spec_(spec) {}

  RowSteps run() {
    for (int i = 0; i < static_cast<int>(spec_.inputs.size()); ++i) values_.push_back(input(i));
    for (const RowInstruction& instruction : spec_.body) {
      values_.push_back(is_wide(instruction) ? expand_wide(instruction)
                                             : Value{.step = expand(instruction)});
    }
    for (std::size_t i = 0; i < spec_.outputs.size(); ++i) {
      const int value = values_[static_cast<std::size_t>(spec_.outputs[i])].step;
      result_.outputs.push_back(without_double_rounding(value, spec_.output_operands[i].dtype));
    }
    return std::move(result_);
  }

 private:
  // An i64 is its halves. As an input that does not vary it is also a step, rounded to f32, for
  // where it meets a float.
  struct Value {
    int step = -1;
    int low = -1, high = -1;
    bool wide() const { return low >= 0; }
  };

  const Step& step(int id) const { return result_.steps[static_cast<std::size_t>(id)]; }

  int append(Step added) {
    if (added.kind == Kind::elementwise || added.is_reduction()) {
      for (int i = 0; i < added.operand_count(); ++i) {
        const Step& operand = step(added.operands[static_cast<std::size_t>(i)]);
        added.varies |= operand.varies;
        added.level = std::max(added.level, operand.level);
      }
    }
    if (added.is_reduction()) {
      added.varies = false;
      ++added.level;
    }
    result_.steps.push_back(added);
    return static_cast<int>(result_.steps.size()) - 1;
  }

  Value input(int number) {
    const RowOperand& operand = spec_.inputs[static_cast<std::size_t>(number)];
    Step added{.kind = Kind::input, .dtype = operand.dtype};
    added.operands[0] = number;
    added.varies = operand.access == ColumnAccess::contiguous;
    if (operand.dtype != DataType::i64) {
      added.form = form_of(operand.dtype);
      return {.step = append(added)};
    }
    Step low = added, high = added;
    low.kind = Kind::low_half;
    high.kind = Kind::high_half;
    low.form = high.form = Form::integer;
    Value value{.low = append(low), .high = append(high)};
    if (!added.varies) value.step = append(added);
    return value;
  }

  int literal(double value) { return append({.kind = Kind::literal, .value = value}); }

  int real(Op op, int a, int b = -1) { return append({.op = op, .operands = {a, b, -1}}); }

  int reduce(Kind kind, int a, int b = -1) {
    return append({.kind = kind, .operands = {a, b, -1}});
  }

  int sum(int a) {
    const Step operand = step(a);
    const bool product = operand.kind == Kind::elementwise && operand.op == Op::mul &&
                         operand.form == Form::real && operand.varies;
    if (!product) return reduce(Kind::sum, a);
    return reduce(Kind::sum_of_products, operand.operands[0], operand.operands[1]);
  }

  int mean(int a) { return real(Op::div, sum(a), append({.kind = Kind::column_count})); }

  int softmax(int x) {
    const int largest = reduce(Kind::maximum_ignoring_nan, x);
    const int exponential = real(Op::exp, real(Op::sub, x, largest));
    return real(Op::mul, exponential, real(Op::reciprocal, sum(exponential)));
  }

  // x * rsqrt(mean_square + eps)
  int normalise(int x, int mean_square, double eps) {
    return real(Op::mul, x, real(Op::rsqrt, real(Op::add, mean_square, literal(eps))));
  }

  int rms_norm(const RowInstruction& instruction) {
    const int x = value(instruction, 0);
    int result = normalise(x, mean(real(Op::mul, x, x)), instruction.value);
    if (instruction.operands.size() < 2) return result;
    int weight = value(instruction, 1);
    if (instruction.flag) weight = real(Op::add, weight, literal(1));
    return real(Op::mul, result, weight);
  }

  int layer_norm(const RowInstruction& instruction) {
    const int x = value(instruction, 0);
    const int centred = real(Op::sub, x, mean(x));
    int result = normalise(centred, mean(real(Op::mul, centred, centred)), instruction.value);
    if (instruction.operands.size() > 1) result = real(Op::mul, result, value(instruction, 1));
    if (instruction.operands.size() > 2) result = real(Op::add, result, value(instruction, 2));
    return result;
  }

  // A square is a product, so that the sum of squares is one FMA.
  int power(int x, double exponent) {
    if (exponent == 2) return real(Op::mul, x, x);
    return append({.op = Op::pow, .operands = {x, -1, -1}, .value = exponent});
  }

  int value(const RowInstruction& instruction, std::size_t operand) const {
    return whole(instruction, operand).step;
  }

  const Value& whole(const RowInstruction& instruction, std::size_t operand) const {
    return values_[static_cast<std::size_t>(instruction.operands[operand])];
  }

  // --- i64

  // Whether halves are computed: not where an i64 meets a float and is rounded.
  bool is_wide(const RowInstruction& instruction) const {
    if (instruction.op == Op::scalar) return false;
    if (instruction.dtype == DataType::i64) return true;
    if (is_float(instruction.dtype)) return false;
    bool wide = false;
    for (std::size_t i = 0; i < instruction.operands.size(); ++i) {
      const Value& operand = whole(instruction, i);
      wide |= operand.wide();
      if (!operand.wide() && !is_exact_integer(step(operand.step))) return false;
    }
    return wide;
  }

  int primitive(Op op, Form operand_form, Form form, std::array<int, 3> operands) {
    return append({.op = op, .operands = operands, .form = form, .operand_form = operand_form});
  }

  int integer(Op op, int a, int b) {
    return primitive(op, Form::integer, Form::integer, {a, b, -1});
  }

  int compare(Op op, int a, int b) { return primitive(op, Form::integer, Form::mask, {a, b, -1}); }
  int both(int a, int b) { return primitive(Op::logical_and, Form::mask, Form::mask, {a, b, -1}); }
  int either(int a, int b) { return primitive(Op::logical_or, Form::mask, Form::mask, {a, b, -1}); }
  int negation(int a) { return primitive(Op::logical_not, Form::mask, Form::mask, {a, -1, -1}); }

  // a < b as unsigned integers: as signed ones after the sign bit is flipped.
  int below(int a, int b) {
    const int flip = literal(std::numeric_limits<std::int32_t>::min());
    return compare(Op::lt, integer(Op::add, a, flip), integer(Op::add, b, flip));
  }

  Value widened(const RowInstruction& instruction, std::size_t operand) {
    const Value given = whole(instruction, operand);
    if (given.wide()) return given;
    const Step narrow = step(given.step);
    if (narrow.kind == Kind::literal) {
      const int low = literal(half_of(narrow.value, false));
      return {.low = low, .high = literal(half_of(narrow.value, true))};
    }
    const int zero = literal(0);
    if (narrow.form == Form::mask) return {.low = integer(Op::add, given.step, zero), .high = zero};
    return {.low = given.step, .high = integer(Op::sub, zero, compare(Op::lt, given.step, zero))};
  }

  Value wide_sum(const Value& a, const Value& b) {
    const int low = integer(Op::add, a.low, b.low);
    const int carry = below(low, a.low);
    return {.low = low, .high = integer(Op::add, integer(Op::add, a.high, b.high), carry)};
  }

  Value difference(const Value& a, const Value& b) {
    const int borrow = below(a.low, b.low);
    const int low = integer(Op::sub, a.low, b.low);
    return {.low = low, .high = integer(Op::sub, integer(Op::sub, a.high, b.high), borrow)};
  }

  Value chosen(int condition, const Value& a, const Value& b) {
    const auto half = [&](int x, int y) {
      return primitive(Op::where, Form::integer, Form::integer, {condition, x, y});
    };
    const int low = half(a.low, b.low);
    return {.low = low, .high = half(a.high, b.high)};
  }

  int equal(const Value& a, const Value& b) {
    const int high = compare(Op::eq, a.high, b.high);
    return both(high, compare(Op::eq, a.low, b.low));
  }

  int less(const Value& a, const Value& b) {
    const int high = compare(Op::lt, a.high, b.high);
    const int same = compare(Op::eq, a.high, b.high);
    return either(high, both(same, below(a.low, b.low)));
  }

  int compared(Op op, const Value& a, const Value& b) {
    switch (op) {
      case Op::eq:
        return equal(a, b);
      case Op::ne:
        return negation(equal(a, b));
      case Op::lt:
        return less(a, b);
      case Op::ge:
        return negation(less(a, b));
      case Op::gt:
        return less(b, a);
      default:  // le
        return negation(less(b, a));
    }
  }

  Value expand_wide(const RowInstruction& instruction) {
    const Op op = instruction.op;
    if (op == Op::where) {
      const Value a = widened(instruction, 1);
      return chosen(value(instruction, 0), a, widened(instruction, 2));
    }
    const Value x = widened(instruction, 0);
    if (is_compare(op)) return {.step = compared(op, x, widened(instruction, 1))};
    if (op == Op::add) return wide_sum(x, widened(instruction, 1));
    if (op == Op::sub) return difference(x, widened(instruction, 1));
    const int none = literal(0);
    const Value zero{.low = none, .high = none};
    if (op == Op::neg) return difference(zero, x);
    if (op == Op::abs) return chosen(compare(Op::lt, x.high, none), difference(zero, x), x);
    // convert
    if (instruction.dtype == DataType::i64) return x;
    if (instruction.dtype == DataType::i32) return {.step = integer(Op::add, x.low, none)};
    return {.step = negation(equal(x, zero))};
  }

  int expand(const RowInstruction& instruction) {
    switch (instruction.op) {
      case Op::scalar:
        return literal(instruction.value);
      case Op::pow:
        return power(value(instruction, 0), instruction.value);
      case Op::sum:
        return sum(value(instruction, 0));
      case Op::mean:
        return mean(value(instruction, 0));
      case Op::amax:
        return reduce(Kind::maximum, value(instruction, 0));
      case Op::softmax:
        return softmax(value(instruction, 0));
      case Op::rms_norm:
        return rms_norm(instruction);
      case Op::layer_norm:
        return layer_norm(instruction);
      default:
        return elementwise(instruction);
    }
  }

  int elementwise(const RowInstruction& instruction) {
    Step added{.op = instruction.op, .flag = instruction.flag, .dtype = instruction.dtype};
    for (std::size_t i = 0; i < instruction.operands.size(); ++i) {
      added.operands[i] = value(instruction, i);
    }
    added.form = form_of(instruction.dtype);
    added.operand_form = operand_form(instruction, added);
    return append(added);
  }

  Form operand_form(const RowInstruction& instruction, const Step& added) const {
    switch (instruction.op) {
      case Op::eq:
      case Op::ne:
      case Op::lt:
      case Op::le:
      case Op::gt:
      case Op::ge:
        return compared_form(instruction.op, step(added.operands[0]), step(added.operands[1]));
      case Op::convert:
        return step(added.operands[0]).form;
      default:  // logical ops give a mask of masks, where and arithmetic what they take
        return added.form;
    }
  }

  static Form compared_form(Op op, const Step& a, const Step& b) {
    const auto exact = [](const Step& s) { return s.form != Form::real || is_integer_literal(s); };
    const bool masks = a.form == Form::mask && b.form == Form::mask;
    if (masks && (op == Op::eq || op == Op::ne)) return Form::mask;
    return exact(a) && exact(b) ? Form::integer : Form::real;
  }

  // A store rounds, so a conversion to the stored type just before it has nothing to do.
  int without_double_rounding(int value, DataType stored) const {
    const Step& last = step(value);
    const bool rounds = last.kind == Kind::elementwise && last.op == Op::convert;
    const bool same = last.form == Form::real && last.dtype == stored;
    return rounds && same ? last.operands[0] : value;
  }

  const RowKernel& spec_;
  RowSteps result_;
  std::vector<Value> values_;  // of each input and instruction
};

}  // namespace

int Step::operand_count() const {
  return static_cast<int>(std::find(operands.begin(), operands.end(), -1) - operands.begin());
}

RowSteps expand(const RowKernel& spec) { return Expansion(spec).run(); }

}  // namespace tilewright::ops
