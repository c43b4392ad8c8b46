// match_rms_norm: x * rsqrt(mean(x^2) + eps), with a weight or without, becomes rms_norm
// (Zhang & Sennrich, arXiv 1910.07467).
//
// Models differ in where they round to 16 bits: Llama converts before it multiplies by the weight,
// Gemma multiplies by (1 + weight) in fp32 and converts afterwards. The fused op computes in fp32
// and rounds once at the end, which is at least as accurate as either.
//
// Tested by passes_test, filetests/passes/match_rms_norm.graph.
#include <string>
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
using match::power;

// x / rms(x), in any of its spellings.
Pattern normalized() {
  Pattern x = any("x");
  Pattern mean_square = op(Op::add, op(Op::mean, power(x, 2.0)), number("eps"));
  Pattern reciprocal_root = either(op(Op::rsqrt, mean_square), power(mean_square, -0.5));
  return either(op(Op::mul, x, reciprocal_root), op(Op::div, x, op(Op::sqrt, mean_square)));
}

struct Form {
  Pattern pattern;
  bool plus_one;
};

// The largest pattern first.
std::vector<Form> forms() {
  Pattern inner = maybe_converted(normalized());
  Pattern weight = any("weight");
  Pattern weight_plus_one = op(Op::add, weight, number(1.0));
  return {
      {maybe_converted(op(Op::mul, inner, weight_plus_one)), true},
      {maybe_converted(op(Op::mul, inner, weight)), false},
      {inner, false},
  };
}

// Ways to read a value: before a widening conversion to fp32, which the fused op does by itself, or
// as it is. The result has the dtype of x, so Rewriter::replace accepts only the right way.
std::vector<ValueId> readings(const Rewriter& rewriter, ValueId value) {
  const Graph& graph = rewriter.source();
  const Node* producer = graph.producer(value);
  if (producer == nullptr || producer->op != Op::convert) return {value};
  const ValueId before = producer->operands[0];
  const DataType narrow = graph.type(before).dtype;
  const bool widened = graph.type(value).dtype == DataType::f32 &&
                       (narrow == DataType::bf16 || narrow == DataType::f16);
  if (!widened || rewriter.aliases().written(before)) return {value};
  return {before, value};
}

bool is_row(const Type& weight, const Type& x) {
  return weight.shape == Shape{x.shape.back()} && is_float(weight.dtype);
}

bool emit(Rewriter& rewriter, ValueId result, const Match& found, bool plus_one) {
  Attributes attributes = {{"eps", found.number("eps")}};
  if (plus_one) attributes["plus_one"] = true;
  std::vector<ValueId> weight;
  if (found.has("weight")) {
    weight.push_back(rewriter.mapped(readings(rewriter, found.value("weight")).front()));
  }
  for (ValueId x : readings(rewriter, found.value("x"))) {
    std::vector<ValueId> operands = {rewriter.mapped(x)};
    operands.insert(operands.end(), weight.begin(), weight.end());
    if (rewriter.replace(result, Op::rms_norm, std::move(operands), attributes)) return true;
  }
  return false;
}

}  // namespace

Graph match_rms_norm(Graph graph, const Target&) {
  const std::vector<Form> all = forms();
  return rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
    if (node.op != Op::mul && node.op != Op::div && node.op != Op::convert) return false;
    for (const Form& form : all) {
      auto found = find(form.pattern, rewriter, node.results[0]);
      if (!found || found->type("x").shape.empty()) continue;
      if (found->has("weight") && !is_row(found->type("weight"), found->type("x"))) continue;
      if (emit(rewriter, node.results[0], *found, form.plus_one)) return true;
    }
    return false;
  });
}

}  // namespace tilewright::graph
