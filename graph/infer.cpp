// infer: dispatches to the op's type rule, and the promotion and broadcasting that rules share.
//
// Tested by graph_test, filetests/verify.
#include <algorithm>
#include <array>

#include "graph/type_rules.h"

namespace tilewright::graph {
namespace type_rules {
namespace {

int category(DataType type) {
  if (is_float(type)) return 2;
  return type == DataType::boolean ? 0 : 1;
}

}  // namespace

DataType promote(DataType a, DataType b) {
  if (a == b) return a;
  if (category(a) != category(b)) return category(a) > category(b) ? a : b;
  if (size_in_bytes(a) != size_in_bytes(b)) return size_in_bytes(a) > size_in_bytes(b) ? a : b;
  // Different types of one size: bf16 and f16, or i8 and u8.
  return is_float(a) ? DataType::f32 : DataType::i16;
}

DataType promote(std::span<const Type> operands) {
  std::optional<DataType> with_dims, without_dims;
  for (const Type& operand : operands) {
    std::optional<DataType>& group = operand.shape.empty() ? without_dims : with_dims;
    group = group ? promote(*group, operand.dtype) : operand.dtype;
  }
  if (!with_dims) return *without_dims;
  if (!without_dims || category(*without_dims) <= category(*with_dims)) return *with_dims;
  return promote(*with_dims, *without_dims);
}

Result<Shape> broadcast(const Shape& a, const Shape& b) {
  const Shape& longer = a.size() >= b.size() ? a : b;
  const Shape& shorter = a.size() >= b.size() ? b : a;
  Shape result = longer;
  std::size_t offset = longer.size() - shorter.size();
  for (std::size_t i = 0; i < shorter.size(); ++i) {
    Dim& dim = result[offset + i];
    if (dim == shorter[i] || shorter[i] == Dim(1)) continue;
    if (dim != Dim(1)) {
      return error("shapes {} and {} do not broadcast: {} and {}", print(a), print(b), dim.print(),
                   shorter[i].print());
    }
    dim = shorter[i];
  }
  return result;
}

bool broadcasts_to(const Shape& shape, const Shape& target) {
  if (shape.size() > target.size()) return false;
  std::size_t offset = target.size() - shape.size();
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] != target[offset + i] && shape[i] != Dim(1)) return false;
  }
  return true;
}

bool may_be_equal(const Dim& a, const Dim& b) {
  Dim difference = a - b;
  return !difference.is_constant() || difference.constant() == 0;
}

}  // namespace type_rules

Result<std::vector<Type>> infer(Op op, std::span<const Type> operands,
                                const Attributes& attributes) {
  using Rule = Result<Type> (*)(const type_rules::Arguments&);
  constexpr std::array<Rule, op_count> rules{
#define GRAPH_OP(name, op_class, minimum, maximum, attributes) type_rules::name,
#include "graph/op_list.def"
#undef GRAPH_OP
  };
  if (Status status = check_signature(op, operands.size(), attributes); !status) {
    return status.error();
  }
  bool takes_cache = op == Op::kv_append || op == Op::cache_keys || op == Op::cache_values ||
                     op == Op::attention || op == Op::external;
  for (const Type& operand : operands) {
    if (operand.is_cache && !takes_cache) {
      return type_rules::error("{} does not take a cache", name(op));
    }
  }
  Result<Type> type = rules[static_cast<std::size_t>(op)]({op, operands, attributes});
  if (!type) return type.error();
  return std::vector<Type>{std::move(*type)};
}

}  // namespace tilewright::graph
