// The row kernel's specification: its canonical text and what of it has a vector form.
//
// Tested by row_kernel_test.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "jit/math.h"
#include "ops/columns.h"
#include "ops/row_kernel.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using graph::Op;

bool is_compare(Op op) {
  constexpr std::array kCompares{Op::eq, Op::ne, Op::lt, Op::le, Op::gt, Op::ge};
  return std::find(kCompares.begin(), kCompares.end(), op) != kCompares.end();
}

bool is_logical(Op op) {
  return op == Op::logical_and || op == Op::logical_or || op == Op::logical_not;
}

bool has_integer_form(Op op) {
  return op == Op::add || op == Op::sub || op == Op::mul || op == Op::neg || op == Op::where ||
         op == Op::convert;
}

// A literal is a double: beyond this it may stand for another integer than the one written.
constexpr double kLargestExact = 9007199254740992.0;

bool has_wide_form(Op op) {
  return is_compare(op) || op == Op::add || op == Op::sub || op == Op::neg || op == Op::abs ||
         op == Op::where || op == Op::convert;
}

// where's condition is not of its result's type.
std::size_t first_value(Op op) { return op == Op::where ? 1 : 0; }

struct OperandRange {
  std::size_t minimum, maximum;
};

OperandRange operand_range(Op op) {
  switch (op) {
    case Op::scalar:
      return {0, 0};
    case Op::where:
      return {3, 3};
    case Op::rms_norm:
      return {1, 2};
    case Op::layer_norm:
      return {1, 3};
    case Op::add:
    case Op::sub:
    case Op::mul:
    case Op::div:
    case Op::maximum:
    case Op::minimum:
    case Op::logical_and:
    case Op::logical_or:
      return {2, 2};
    default:
      return is_compare(op) ? OperandRange{2, 2} : OperandRange{1, 1};
  }
}

// What the checks need to know of an input or of an instruction's result.
struct Known {
  DataType dtype = DataType::f32;
  bool literal = false;
  double value = 0;
  bool row_input = false;  // an i64 may be rounded to f32
  bool varies = false;
};

bool fits_i32(const Known& known) {
  if (!known.literal) return known.dtype == DataType::i32 || known.dtype == DataType::boolean;
  return known.value == std::trunc(known.value) &&
         std::abs(known.value) <= std::numeric_limits<std::int32_t>::max();
}

class Check {
 public:
  explicit Check(const RowKernel& spec) : spec_(spec) {}

  Status run() {
    if (spec_.lanes != 8 && spec_.lanes != 16) return error("{} lanes", spec_.lanes);
    for (const RowOperand& input : spec_.inputs) {
      if (Status status = check_input(input); !status) return status;
    }
    for (const RowInstruction& instruction : spec_.body) {
      if (Status status = check_instruction(instruction); !status) return status;
    }
    if (spec_.outputs.size() != spec_.output_operands.size()) {
      return error("{} outputs with {} operands", spec_.outputs.size(),
                   spec_.output_operands.size());
    }
    for (std::size_t i = 0; i < spec_.outputs.size(); ++i) {
      if (Status status = check_output(spec_.outputs[i], spec_.output_operands[i]); !status) {
        return status;
      }
    }
    return {};
  }

 private:
  template <class... Args>
  static Status error(fmt::format_string<Args...> format, Args&&... args) {
    return Error{"row kernel: " + fmt::format(format, std::forward<Args>(args)...)};
  }

  Status check_input(const RowOperand& input) {
    const bool contiguous = input.access == ColumnAccess::contiguous;
    if (input.dtype != DataType::i64 && !has_vector_form(input.dtype)) {
      return error("a {} {} input has no vector form", contiguous ? "contiguous" : "broadcast",
                   name(input.dtype));
    }
    known_.push_back({.dtype = input.dtype, .row_input = !contiguous, .varies = contiguous});
    return {};
  }

  Status check_instruction(const RowInstruction& instruction) {
    const Op op = instruction.op;
    const auto [minimum, maximum] = operand_range(op);
    const std::size_t count = instruction.operands.size();
    if (count < minimum || count > maximum) return error("{} of {} operands", name(op), count);
    for (int operand : instruction.operands) {
      if (operand < 0 || operand >= static_cast<int>(known_.size())) {
        return error("{} reads %{} before it is defined", name(op), operand);
      }
    }
    Known result{.dtype = instruction.dtype};
    if (op == Op::scalar) {
      result.literal = true;
      result.value = instruction.value;
      known_.push_back(result);
      return {};
    }
    if (Status status = check_op(instruction); !status) return status;
    if (Status status = check_wide(instruction); !status) return status;
    result.varies = op_class(op) != graph::OpClass::reduction && any_varies(instruction);
    known_.push_back(result);
    return {};
  }

  Status check_op(const RowInstruction& instruction) {
    const Op op = instruction.op;
    const graph::OpClass kind = op_class(op);
    if (kind != graph::OpClass::elementwise && kind != graph::OpClass::reduction &&
        kind != graph::OpClass::normalisation) {
      return error("{} is not a row op", name(op));
    }
    if (op == Op::pow && !jit::math::pow_supported(instruction.value)) {
      return error("pow with exponent {} has no vector form", instruction.value);
    }
    if (op == Op::where && at(instruction.operands[0]).dtype == DataType::i64) {
      return error("where on an i64 condition has no vector form");
    }
    return check_result_type(instruction);
  }

  Status check_result_type(const RowInstruction& instruction) {
    const Op op = instruction.op;
    const DataType type = instruction.dtype;
    const bool gives_boolean = is_compare(op) || is_logical(op);
    const bool keeps_boolean = op == Op::where || op == Op::convert;
    if (type == DataType::i64) return {};  // see check_wide
    if (!has_vector_form(type) || gives_boolean != (type == DataType::boolean)) {
      if (!(keeps_boolean && type == DataType::boolean)) {
        return error("{} to {} has no vector form", name(op), name(type));
      }
    }
    const bool narrows = op == Op::convert && at(instruction.operands[0]).dtype == DataType::i64;
    if (type != DataType::i32 || narrows) return {};
    if (!has_integer_form(op)) return error("{} of i32 has no vector form", name(op));
    for (std::size_t i = first_value(op); i < instruction.operands.size(); ++i) {
      if (const Known& operand = at(instruction.operands[i]); !fits_i32(operand)) {
        return error("{} of {} to i32 has no vector form", name(op), name(operand.dtype));
      }
    }
    return {};
  }

  // Where an i64 meets a float it is rounded, as ATen does it; only an input that does not vary has
  // that form. Elsewhere all operands are integers.
  Status check_wide(const RowInstruction& instruction) {
    bool wide = instruction.dtype == DataType::i64, meets_float = is_float(instruction.dtype);
    bool only_rows = true, exact = true;
    for (std::size_t i = first_value(instruction.op); i < instruction.operands.size(); ++i) {
      const Known& known = at(instruction.operands[i]);
      meets_float |= known.literal ? known.value != std::trunc(known.value) : is_float(known.dtype);
      exact &= !known.literal || std::abs(known.value) <= kLargestExact;
      if (known.literal || known.dtype != DataType::i64) continue;
      wide = true;
      only_rows &= known.row_input;
    }
    if (!wide) return {};
    if (!meets_float) {
      if (!exact) return error("{} of i64 and a literal beyond 2^53", name(instruction.op));
      if (has_wide_form(instruction.op)) return {};
      return error("{} of i64 has no vector form", name(instruction.op));
    }
    if (only_rows && instruction.dtype != DataType::i64) return {};
    return error("{} of i64 and float has no vector form", name(instruction.op));
  }

  Status check_output(int output, const RowOperand& operand) {
    if (output < 0 || output >= static_cast<int>(known_.size())) {
      return error("output %{} is not defined", output);
    }
    const Known& value = at(output);
    if (!has_vector_form(operand.dtype)) {
      return error("an output of {} has no vector form", name(operand.dtype));
    }
    const bool wide = value.dtype == DataType::i64 && !value.literal;
    if (wide || (operand.dtype == DataType::i32 && !fits_i32(value))) {
      return error("{} to {} has no vector form", name(value.dtype), name(operand.dtype));
    }
    if (operand.access == ColumnAccess::broadcast && value.varies) {
      return error("output %{} varies along the row and is stored once", output);
    }
    return {};
  }

  bool any_varies(const RowInstruction& instruction) const {
    return std::any_of(instruction.operands.begin(), instruction.operands.end(),
                       [&](int operand) { return at(operand).varies; });
  }

  const Known& at(int index) const { return known_[static_cast<std::size_t>(index)]; }

  const RowKernel& spec_;
  std::vector<Known> known_;
};

std::string_view name(ColumnAccess access) {
  return access == ColumnAccess::contiguous ? "contiguous" : "broadcast";
}

}  // namespace

Status supported(const RowKernel& spec) { return Check(spec).run(); }

std::string print(const RowKernel& spec) {
  std::string text = fmt::format("row lanes={} columns={} {{\n", spec.lanes,
                                 spec.columns < 0 ? "any" : std::to_string(spec.columns));
  std::size_t number = 0;
  for (const RowOperand& input : spec.inputs) {
    text += fmt::format("  %{} = input {} {}\n", number++, name(input.dtype), name(input.access));
  }
  for (const RowInstruction& instruction : spec.body) {
    text += fmt::format("  %{} = {}(", number++, name(instruction.op));
    const char* separator = "";
    for (int operand : instruction.operands) {
      text += fmt::format("{}%{}", separator, operand);
      separator = ", ";
    }
    text += fmt::format(") value={}{} : {}\n", instruction.value, instruction.flag ? " flag" : "",
                        name(instruction.dtype));
  }
  for (std::size_t i = 0; i < spec.outputs.size(); ++i) {
    const RowOperand& operand = spec.output_operands[i];
    text += fmt::format("  output %{} {} {}\n", spec.outputs[i], name(operand.dtype),
                        name(operand.access));
  }
  return text + "}\n";
}

}  // namespace tilewright::ops
