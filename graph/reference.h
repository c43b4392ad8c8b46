// The references of the ops, as the interpreter calls them.
//
// They are declared from op_list.def and defined by theme in reference_*.cpp, so an op without a
// reference does not link. The graph has been verified; what a reference checks is what only run
// time knows.
//
// Tested by interpret_test, filetests/run.
#pragma once

#include <string_view>
#include <vector>

#include "graph/interpret.h"

namespace tilewright::graph::reference {

using Sizes = std::vector<std::int64_t>;

// One node at run time. The reference fills `result`, which is allocated in the shape that the
// graph states, or `cache` for kv_append.
struct Step {
  const Node& node;
  std::vector<const Argument*> operands;
  const SymbolValues& symbols;
  const Constants& constants;
  Tensor result;
  Cache cache;

  const Tensor& tensor(std::size_t i) const { return std::get<Tensor>(*operands[i]); }
  bool is_cache(std::size_t i) const { return std::holds_alternative<Cache>(*operands[i]); }
  // A dim of an attribute; verified to be there.
  Result<std::int64_t> dim(std::string_view attribute) const {
    return node.attribute<Shape>(attribute)[0].evaluate(symbols);
  }
};

#define GRAPH_OP(name, op_class, minimum, maximum, attributes) Status name(Step& step);
#include "graph/op_list.def"
#undef GRAPH_OP

// Coordinates of the element at `offset` of a contiguous tensor.
Sizes coordinates(std::int64_t offset, const Sizes& shape);
// Where these coordinates lie in a contiguous tensor that broadcasts to them: aligned at the last
// axis, axes of size 1 stand still.
std::int64_t offset_of(const Sizes& coordinates, const Sizes& shape);
// act(x) for the activation names of linear and gated_mlp_up; "" is the identity.
double activate(std::string_view activation, double x);

}  // namespace tilewright::graph::reference
