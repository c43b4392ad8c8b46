// match_cached_attention: attention over the tensors that a cache holds, under a causal mask,
// becomes attention over the cache, which reads its blocks where they are. Models that compute
// attention themselves are captured in the first form, and match_attention has made one node of it.
//
// Tested by filetests/passes/match_cached_attention.graph.
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "graph/passes.h"
#include "graph/rewrite.h"

namespace tilewright::graph {

namespace {

const Node* producer_of(const Graph& graph, ValueId value, Op op) {
  const Node* node = graph.producer(value);
  while (node != nullptr && node->op == Op::convert && op != Op::convert) {
    node = graph.producer(node->operands[0]);
  }
  return node != nullptr && node->op == op ? node : nullptr;
}

bool match(Rewriter& rewriter, const Node& node) {
  const Graph& graph = rewriter.source();
  if (graph.type(node.operands[1]).is_cache) return false;
  const AttentionOperands form = attention_operands(false, node.operands.size(), node.attributes);
  const Node* keys = producer_of(graph, node.operands[1], Op::cache_keys);
  const Node* values = producer_of(graph, node.operands[2], Op::cache_values);
  if (keys == nullptr || values == nullptr || form.mask < 0) return false;
  const Node* mask =
      producer_of(graph, node.operands[static_cast<std::size_t>(form.mask)], Op::causal_mask);
  const ValueId cache = keys->operands[0];
  if (mask == nullptr || values->operands[0] != cache) return false;
  const NodeId first = graph.value(keys->results[0]).producer;
  const NodeId self = graph.value(node.results[0]).producer;
  if (rewriter.aliases().written_between(cache, first, self)) return false;

  std::vector<ValueId> operands = {rewriter.mapped(node.operands[0]), rewriter.mapped(cache)};
  for (int index : {form.slopes, form.sinks}) {
    if (index < 0) continue;
    operands.push_back(rewriter.mapped(node.operands[static_cast<std::size_t>(index)]));
  }
  Attributes attributes = node.attributes;
  attributes["causal"] = true;
  if (const auto window = mask->attribute_or("window", std::int64_t{0}); window > 0) {
    attributes["window"] = window;
  }
  return rewriter.replace(node.results[0], Op::attention, std::move(operands),
                          std::move(attributes));
}

}  // namespace

Graph match_cached_attention(Graph graph, const Target&) {
  return rewrite(graph, [](Rewriter& rewriter, const Node& node) {
    return node.op == Op::attention && match(rewriter, node);
  });
}

}  // namespace tilewright::graph
