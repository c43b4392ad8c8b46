// match_attention: matmul(softmax(matmul(q, k.T) * scale + mask), v) becomes attention, and keys
// and values that were repeated for each group of query heads are read where they are:
//
//   k[b, kv, s, d] -> [b, kv, 1, s, d] -> expand [b, kv, n, s, d] -> [b, kv * n, s, d]
//
// head h of the repeated tensor is head h / n of the original, which is what attention's native
// grouped heads read. One pass over the keys replaces four kernels and a score matrix in memory.
//
// A conversion of the scores to fp32 and back is taken in: the fused op is in fp32 throughout. So
// are additive masks: one of 16 bits is widened, once for all the attentions that read it.
//
// Tested by passes_test, filetests/passes/match_attention.graph.
#include <map>
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

// The scale is applied to the product, or to q before it.
Pattern scores() {
  Pattern k_transposed = shared(swapped(any("k")));
  Pattern product = op(Op::matmul, any("q"), k_transposed);
  Pattern scaled_q = op(Op::mul, any("q"), number("scale"));
  return either(
      either(op(Op::mul, product, number("scale")), op(Op::div, product, number("divisor"))),
      either(op(Op::matmul, scaled_q, k_transposed), product));
}

Pattern weighted_values(Pattern scores) {
  Pattern weights = maybe_converted(op(Op::softmax, maybe_converted(std::move(scores))));
  return op(Op::matmul, weights, any("v"));
}

Pattern spelled_out() {
  return weighted_values(either(op(Op::add, scores(), any("mask")), scores()));
}

// (product + mask) / divisor is the same as product / divisor + mask if the mask is 0 or -inf.
Pattern scaled_after_mask() {
  Pattern product = op(Op::matmul, any("q"), shared(swapped(any("k"))));
  Pattern masked = op(Op::add, product, any("mask"));
  return weighted_values(
      either(op(Op::div, masked, number("divisor")), op(Op::mul, masked, number("scale"))));
}

bool is_causal_mask(const Graph& graph, ValueId value) {
  const Node* node = graph.producer(value);
  while (node != nullptr && node->op == Op::convert) node = graph.producer(node->operands[0]);
  return node != nullptr && node->op == Op::causal_mask;
}

double scale(const Match& found) {
  if (found.has_number("scale")) return found.number("scale");
  return found.has_number("divisor") ? 1.0 / found.number("divisor") : 1.0;
}

// What was repeated to give a value (a value of the new graph), and how often.
struct Repeated {
  ValueId source;
  Dim times = 1;
};

Repeated unrepeated(Rewriter& rewriter, ValueId value, NodeId reader) {
  const Graph& graph = rewriter.source();
  const Repeated itself{rewriter.mapped(value)};
  auto above = [&](ValueId result, Op op) {
    const Node* node = graph.producer(result);
    return node != nullptr && node->op == op ? node : nullptr;
  };
  const Node* joined = above(value, Op::reshape);
  const Node* expanded = joined != nullptr ? above(joined->operands[0], Op::expand) : nullptr;
  const Node* split = expanded != nullptr ? above(expanded->operands[0], Op::reshape) : nullptr;
  if (split == nullptr) return itself;

  const Shape& wide = graph.type(expanded->results[0]).shape;
  if (wide.size() != 5) return itself;
  const Dim &batch = wide[0], &heads = wide[1], &times = wide[2], &keys = wide[3], &size = wide[4];
  if (graph.type(split->results[0]).shape != Shape{batch, heads, 1, keys, size} ||
      graph.type(value).shape != Shape{batch, heads * times, keys, size}) {
    return itself;
  }
  const ValueId base = split->operands[0];
  const NodeId first = graph.value(split->results[0]).producer;
  if (rewriter.aliases().written_between(base, first, reader)) return itself;
  const Shape narrow = {batch, heads, keys, size};
  if (graph.type(base).shape == narrow) return {rewriter.mapped(base), times};
  auto source = rewriter.append(Op::reshape, {rewriter.mapped(base)}, {{"shape", narrow}});
  return source ? Repeated{*source, times} : itself;
}

// Masks of 16 bits by their values in fp32, both of the new graph.
using WideMasks = std::map<ValueId, ValueId>;

ValueId widened(Rewriter& rewriter, ValueId mask, WideMasks& known) {
  const DataType dtype = rewriter.built().type(mask).dtype;
  if (!is_float(dtype) || dtype == DataType::f32) return mask;
  if (auto found = known.find(mask); found != known.end()) return found->second;
  const auto wide = rewriter.append(Op::convert, {mask}, {{"dtype", DataType::f32}});
  return wide ? known[mask] = *wide : mask;
}

// q, k, v [, mask] are values of the old graph.
bool emit(Rewriter& rewriter, const Node& node, const std::vector<ValueId>& values,
          const Attributes& attributes, WideMasks& masks) {
  const NodeId self = rewriter.source().value(node.results[0]).producer;
  const Repeated k = unrepeated(rewriter, values[1], self);
  const Repeated v = unrepeated(rewriter, values[2], self);
  std::vector<ValueId> operands = rewriter.mapped(values);
  if (k.times == v.times) {
    operands[1] = k.source;
    operands[2] = v.source;
  }
  if (operands.size() > 3) operands[3] = widened(rewriter, operands[3], masks);
  if (node.op == Op::attention && operands == rewriter.mapped(node.operands)) return false;
  return rewriter.replace(node.results[0], Op::attention, std::move(operands), attributes);
}

// The value before it was widened from `type`, which attention does by itself; else the value.
ValueId before_widening(const Rewriter& rewriter, ValueId value, DataType type) {
  const Node* node = rewriter.source().producer(value);
  const bool widens = node != nullptr && node->op == Op::convert &&
                      rewriter.source().type(value).dtype == DataType::f32 &&
                      rewriter.source().type(node->operands[0]).dtype == type;
  return widens && !rewriter.aliases().written(node->operands[0]) ? node->operands[0] : value;
}

struct Patterns {
  Pattern plain = spelled_out(), late = scaled_after_mask();
};

bool match_spelled_out(Rewriter& rewriter, const Node& node, const Patterns& patterns,
                       WideMasks& masks) {
  const Graph& graph = rewriter.source();
  auto found = find(patterns.plain, rewriter, node.results[0]);
  if (!found) {
    found = find(patterns.late, rewriter, node.results[0]);
    if (!found || scale(*found) <= 0 || !is_causal_mask(graph, found->value("mask"))) return false;
  }
  const Type& v = found->type("v");
  std::vector<ValueId> values = {before_widening(rewriter, found->value("q"), v.dtype),
                                 before_widening(rewriter, found->value("k"), v.dtype),
                                 found->value("v")};
  const Type &q = graph.type(values[0]), &k = graph.type(values[1]);
  // One key head is broadcast to all query heads.
  const bool plain = q.dtype == k.dtype && q.dtype == v.dtype && q.shape.size() == 4 &&
                     k.shape.size() == 4 && v.shape.size() == 4 &&
                     (q.shape[1] == k.shape[1] || k.shape[1] == Dim(1)) &&
                     k.shape[2] == v.shape[2] && v.shape[1] == k.shape[1];
  if (!plain) return false;
  if (found->has("mask")) {
    if (!is_float(found->type("mask").dtype)) return false;
    values.push_back(found->value("mask"));
  }
  return emit(rewriter, node, values, {{"scale", scale(*found)}, {"causal", false}}, masks);
}

}  // namespace

Graph match_attention(Graph graph, const Target&) {
  const Patterns patterns;
  WideMasks masks;
  return rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
    if (node.op == Op::attention) {
      return node.operands.size() > 2 &&
             emit(rewriter, node, node.operands, node.attributes, masks);
    }
    return node.op == Op::matmul && match_spelled_out(rewriter, node, patterns, masks);
  });
}

}  // namespace tilewright::graph
