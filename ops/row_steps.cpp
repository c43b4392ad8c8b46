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

class Expansion {
 public:
  explicit Expansion(const RowKernel& spec) : spec_(spec) {}

  RowSteps run() {
    for (std::size_t i = 0; i < spec_.inputs.size(); ++i) {
      Step input{.kind = Kind::input, .dtype = spec_.inputs[i].dtype};
      input.operands[0] = static_cast<int>(i);
      input.form = form_of(input.dtype);
      input.varies = spec_.inputs[i].access == ColumnAccess::contiguous;
      values_.push_back(append(input));
    }
    for (const RowInstruction& instruction : spec_.body) values_.push_back(expand(instruction));
    for (std::size_t i = 0; i < spec_.outputs.size(); ++i) {
      const int value = values_[static_cast<std::size_t>(spec_.outputs[i])];
      result_.outputs.push_back(without_double_rounding(value, spec_.output_operands[i].dtype));
    }
    return std::move(result_);
  }

 private:
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
    return values_[static_cast<std::size_t>(instruction.operands[operand])];
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
  std::vector<int> values_;  // the step of each input and instruction
};

}  // namespace

int Step::operand_count() const {
  return static_cast<int>(std::find(operands.begin(), operands.end(), -1) - operands.begin());
}

RowSteps expand(const RowKernel& spec) { return Expansion(spec).run(); }

}  // namespace tilewright::ops
