// match_rope: x * cos + rotate_half(x) * sin becomes rope (RoFormer, arXiv 2104.09864, in the
// "half" style of GPT-NeoX and Llama): rotate_half(x) = cat(-x[half:], x[:half]).
//
// With 16-bit tensors the fused op rounds once instead of three times.
//
// Tested by passes_test, filetests/passes/match_rope.graph.
#include <cstdint>

#include "graph/match.h"
#include "graph/passes.h"

namespace tilewright::graph {

namespace {

using match::any;
using match::find;
using match::Match;
using match::named;
using match::op;
using match::Pattern;
using match::when;

std::int64_t axis_of(const Graph& graph, const Node& node) {
  const auto rank = static_cast<std::int64_t>(graph.type(node.results[0]).shape.size());
  const auto axis = node.attribute<std::int64_t>("axis");
  return axis < 0 ? axis + rank : axis;
}

bool on_last_axis(const Graph& graph, const Node& node) {
  const auto rank = static_cast<std::int64_t>(graph.type(node.results[0]).shape.size());
  return axis_of(graph, node) == rank - 1;
}

Pattern rotated() {
  Pattern x = any("x");
  Pattern low = named("low", when(on_last_axis, op(Op::slice, x)));
  Pattern high = named("high", when(on_last_axis, op(Op::slice, x)));
  Pattern rotated_half = when(on_last_axis, op(Op::cat, op(Op::neg, high), low));
  return op(Op::add, op(Op::mul, rotated_half, any("sin")), op(Op::mul, x, any("cos")));
}

bool is_range(const Match& found, const char* name, const Dim& start, const Dim& end) {
  const Node& slice = *found.graph().producer(found.value(name));
  return slice.attribute<Shape>("start")[0] == start && slice.attribute<Shape>("end")[0] == end &&
         slice.attribute_or<std::int64_t>("step", 1) == 1;
}

bool takes_halves(const Match& found) {
  const Dim& size = found.type("x").shape.back();
  if (!size.is_constant() || size.constant() % 2 != 0) return false;
  const Dim half = size.constant() / 2;
  return is_range(found, "low", 0, half) && is_range(found, "high", half, size);
}

}  // namespace

Graph match_rope(Graph graph, const Target&) {
  const Pattern pattern = rotated();
  return rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
    if (node.op != Op::add) return false;
    auto found = find(pattern, rewriter, node.results[0]);
    return found && takes_halves(*found) &&
           rewriter.replace(
               node.results[0], Op::rope,
               {rewriter.mapped(found->value("x")), rewriter.mapped(found->value("cos")),
                rewriter.mapped(found->value("sin"))},
               {{"style", std::string("half")}});
  });
}

}  // namespace tilewright::graph
