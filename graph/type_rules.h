// Type rules: for each op of op_list.def one function from operand types and attributes to the type
// of the result, and the pieces that they share.
//
// The functions are declared from the table and defined by theme in type_rules_*.cpp, so an op
// without a rule does not link. infer() calls them after check_signature, which is what lets them
// read attributes and operands without asking.
//
// Tested by graph_test, filetests/verify.
#pragma once

#include <fmt/format.h>

#include <span>
#include <string_view>
#include <vector>

#include "graph/graph.h"

namespace tilewright::graph::type_rules {

struct Arguments {
  Op op;
  std::span<const Type> operands;
  const Attributes& attributes;

  const Type& operand(std::size_t index) const { return operands[index]; }
  const Shape& shape(std::size_t index) const { return operands[index].shape; }
  template <class T>
  const T& attribute(std::string_view key) const {
    return std::get<T>(attributes.find(key)->second);
  }
  template <class T>
  T attribute_or(std::string_view key, T otherwise) const {
    auto found = attributes.find(key);
    return found == attributes.end() ? otherwise : std::get<T>(found->second);
  }
};

#define GRAPH_OP(name, op_class, minimum, maximum, attributes) \
  Result<Type> name(const Arguments& arguments);
#include "graph/op_list.def"
#undef GRAPH_OP

template <class... Parts>
Error error(fmt::format_string<Parts...> format, Parts&&... parts) {
  return Error{fmt::format(format, std::forward<Parts>(parts)...)};
}

inline Type tensor(DataType dtype, Shape shape) { return Type{dtype, std::move(shape)}; }

// The dtype that two values of equal rank meet in, as torch.promote_types.
DataType promote(DataType a, DataType b);
// The dtype of an elementwise result, as torch.result_type: a 0-d operand counts only if its
// category (bool < integer < float) is above that of all operands with dimensions.
DataType promote(std::span<const Type> operands);

// Aligned at the last axis; equal dims or a literal 1. Two different symbols are an error.
Result<Shape> broadcast(const Shape& a, const Shape& b);
// Whether `shape` broadcasts to exactly `target`.
bool broadcasts_to(const Shape& shape, const Shape& target);
// False if the two are certainly different; symbols that differ in name may be equal at run time.
bool may_be_equal(const Dim& a, const Dim& b);

}  // namespace tilewright::graph::type_rules
