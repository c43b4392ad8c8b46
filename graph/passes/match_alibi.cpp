// match_alibi: attention that a model spells out with batch and heads merged into one axis, and
// with a bias slope * position of the key (Press et al., arXiv 2108.12409), becomes attention with
// slopes:
//
//   scores[b*h, s, t] = bias[b*h, 1, t] + scale * (q[b*h, s, d] @ k[b*h, d, t])
//   softmax(scores[b, h, s, t] + mask) @ v
//
// A bias that adds slope * (any constant) to all keys gives the same weights, so positions may be
// counted from wherever a sequence begins.
//
// Tested by filetests/passes/match_alibi.graph.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "graph/match.h"
#include "graph/passes.h"

namespace tilewright::graph {

namespace {

using match::any;
using match::either;
using match::find;
using match::Match;
using match::maybe_converted;
using match::number;
using match::op;
using match::Pattern;
using match::shared;
using match::swapped;

Pattern spelled_out() {
  Pattern transposed = shared(swapped(any("k")));
  Pattern product = op(Op::matmul, any("q"), transposed);
  Pattern scaled = either(op(Op::mul, product, number("scale")), product);
  Pattern scores = op(Op::reshape, op(Op::add, scaled, any("bias")));
  Pattern masked = op(Op::add, scores, any("mask"));
  Pattern weights = maybe_converted(op(Op::softmax, maybe_converted(masked)));
  return op(Op::matmul, op(Op::reshape, weights), any("v"));
}

Shape without_ones(const Shape& shape) {
  Shape result;
  std::copy_if(shape.begin(), shape.end(), std::back_inserter(result),
               [](const Dim& size) { return !(size == Dim(1)); });
  return result;
}

// What [b, h, x, d] was reshaped to this [b*h, x, d].
std::optional<ValueId> unmerged(const Graph& graph, ValueId value) {
  const Node* node = graph.producer(value);
  if (node == nullptr || node->op != Op::reshape) return std::nullopt;
  const Shape& whole = graph.type(node->operands[0]).shape;
  if (whole.size() != 4) return std::nullopt;
  const Shape merged = {whole[0] * whole[1], whole[2], whole[3]};
  return graph.type(value).shape == merged ? std::optional(node->operands[0]) : std::nullopt;
}

bool counts_from_zero(const Graph& graph, ValueId value) {
  const Node* node = graph.producer(value);
  while (node != nullptr && (node->op == Op::convert || node->op == Op::reshape)) {
    node = graph.producer(node->operands[0]);
  }
  return node != nullptr && node->op == Op::arange && node->attribute<Shape>("start")[0] == Dim(0);
}

// The slopes [h] if bias[b*h, 1, t] is slope * (0, 1, 2 ...) for each sequence.
std::optional<ValueId> slopes_of(const Graph& graph, ValueId bias, const Dim& batch,
                                 const Dim& heads, const Dim& keys) {
  const Shape once = {heads, keys};
  const std::vector<Shape> steps = {{batch * heads, keys}, {batch, heads, keys}, once};
  while (true) {
    const Shape shape = without_ones(graph.type(bias).shape);
    if (std::find(steps.begin(), steps.end(), shape) == steps.end()) return std::nullopt;
    const Node* node = graph.producer(bias);
    if (node == nullptr) return std::nullopt;
    if (node->op == Op::reshape || node->op == Op::expand || node->op == Op::convert) {
      bias = node->operands[0];
      continue;
    }
    if (node->op != Op::mul || shape != once) return std::nullopt;
    for (std::size_t i : {0u, 1u}) {
      const bool per_head = without_ones(graph.type(node->operands[i]).shape) == Shape{heads};
      if (per_head && counts_from_zero(graph, node->operands[1 - i])) return node->operands[i];
    }
    return std::nullopt;
  }
}

bool replace(Rewriter& rewriter, const Node& node, const Match& found) {
  const Graph& graph = rewriter.source();
  const auto q = unmerged(graph, found.value("q")), k = unmerged(graph, found.value("k")),
             v = unmerged(graph, found.value("v"));
  if (!q || !k || !v || !is_float(found.type("mask").dtype)) return false;
  const Shape &queries = graph.type(*q).shape, &keys = graph.type(*k).shape;
  const auto slopes = slopes_of(graph, found.value("bias"), queries[0], queries[1], keys[2]);
  if (!slopes) return false;
  auto numbers =
      rewriter.append(Op::reshape, {rewriter.mapped(*slopes)}, {{"shape", Shape{queries[1]}}});
  auto mask = std::optional(rewriter.mapped(found.value("mask")));
  for (auto* value : {&numbers, &mask}) {
    if (!*value) return false;
    if (rewriter.built().type(**value).dtype == DataType::f32) continue;
    *value = rewriter.append(Op::convert, {**value}, {{"dtype", DataType::f32}});
  }
  const double scale = found.has_number("scale") ? found.number("scale") : 1.0;
  const auto attention = rewriter.append(
      Op::attention,
      {rewriter.mapped(*q), rewriter.mapped(*k), rewriter.mapped(*v), *mask, *numbers},
      {{"scale", scale}, {"causal", false}, {"slopes", true}});
  return attention && rewriter.replace(node.results[0], Op::reshape, {*attention},
                                       {{"shape", graph.type(node.results[0]).shape}});
}

}  // namespace

Graph match_alibi(Graph graph, const Target&) {
  const Pattern pattern = spelled_out();
  return rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
    if (node.op != Op::matmul) return false;
    const auto found = find(pattern, rewriter, node.results[0]);
    return found && replace(rewriter, node, *found);
  });
}

}  // namespace tilewright::graph
