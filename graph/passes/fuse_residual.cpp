// fuse_residual: an activation or an addition after a linear becomes part of the linear, which
// applies it to its accumulators before it stores them: one pass over memory less for each.
//
// The order of an epilogue is bias, activation, residual. A sum of two linears is fused into the
// one that is computed last. (A constant bias was joined by canonicalize.)
//
// Tested by passes_test, filetests/passes/fuse_residual.graph.
#include <array>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "graph/match.h"
#include "graph/passes.h"

namespace tilewright::graph {

namespace {

using match::find;
using match::named;
using match::op;
using match::Pattern;
using match::when;

bool has_no_residual(const Graph&, const Node& node) {
  return !node.attribute_or("residual", false);
}

bool has_no_activation(const Graph& graph, const Node& node) {
  return has_no_residual(graph, node) && node.attribute_or<std::string>("activation", "").empty();
}

std::string activation(const Node& node) {
  const bool tanh_form = node.attribute_or<std::string>("approximate", "none") == "tanh";
  return tanh_form ? "gelu_tanh" : std::string(name(node.op));
}

bool replace(Rewriter& rewriter, const Node& node, const Node& linear, Attributes added,
             std::vector<ValueId> more_operands) {
  std::vector<ValueId> operands = rewriter.mapped(linear.operands);
  operands.insert(operands.end(), more_operands.begin(), more_operands.end());
  Attributes attributes = std::move(added);
  attributes.insert(linear.attributes.begin(), linear.attributes.end());
  return rewriter.replace(node.results[0], Op::linear, std::move(operands), std::move(attributes));
}

bool fuse_activation(Rewriter& rewriter, const Node& node) {
  const Pattern linear = named("linear", when(has_no_activation, op(Op::linear)));
  const auto found = find(op(node.op, linear), rewriter, node.results[0]);
  if (!found) return false;
  return replace(rewriter, node, *rewriter.source().producer(found->value("linear")),
                 {{"activation", activation(node)}}, {});
}

bool fuse_addition(Rewriter& rewriter, const Node& node) {
  const Graph& graph = rewriter.source();
  std::array<std::size_t, 2> candidates = {0, 1};
  if (index(graph.value(node.operands[1]).producer) >
      index(graph.value(node.operands[0]).producer)) {
    candidates = {1, 0};
  }
  const Pattern linear = when(has_no_residual, op(Op::linear));
  for (std::size_t i : candidates) {
    const ValueId residual = node.operands[1 - i];
    if (!rewriter.uses().single(node.operands[i]) || residual == node.operands[i]) continue;
    const Pattern sum = [&](match::Match& match, ValueId value) {
      match.enter(graph.value(value).producer, false);
      return linear(match, node.operands[i]);
    };
    if (!find(sum, rewriter, node.results[0])) continue;
    if (replace(rewriter, node, *graph.producer(node.operands[i]), {{"residual", true}},
                {rewriter.mapped(residual)})) {
      return true;
    }
  }
  return false;
}

}  // namespace

Graph fuse_residual(Graph graph, const Target&) {
  // A second walk adds to linears that the first one made.
  for (std::size_t nodes = graph.nodes.size() + 1; graph.nodes.size() < nodes;) {
    nodes = graph.nodes.size();
    graph = rewrite(graph, [](Rewriter& rewriter, const Node& node) {
      switch (node.op) {
        case Op::silu:
        case Op::gelu:
        case Op::relu:
          return fuse_activation(rewriter, node);
        case Op::add:
          return fuse_addition(rewriter, node);
        default:
          return false;
      }
    });
  }
  return graph;
}

}  // namespace tilewright::graph
