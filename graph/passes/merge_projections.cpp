// merge_projections: linears that read the same x become one linear of the stacked weights, and
// slices of its result: one step for q, k and v, and x is read once.
//
// The stacked weight is a constant whose source names its parts, "a;b;c", joined along axis 0.
// A linear whose only reader can become its epilogue (fuse_residual) stays alone: the epilogue
// saves more than the merge. So does one whose weight something else reads (a tied embedding),
// which would be stored twice.
//
// Tested by passes_test, filetests/passes/merge_projections.graph.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "graph/passes.h"
#include "graph/rewrite.h"

namespace tilewright::graph {

namespace {

// A constant that nothing else reads and that is stored as the model has it.
bool is_own_constant(const Rewriter& rewriter, ValueId value) {
  const Node* node = rewriter.source().producer(value);
  const Type& type = rewriter.source().type(value);
  return node != nullptr && node->op == Op::constant && rewriter.uses().single(value) &&
         !node->attributes.contains("axis") && !node->attributes.contains("value") &&
         type.encoding.empty() && type.layout.empty();
}

bool awaits_epilogue(const Rewriter& rewriter, ValueId result) {
  if (!rewriter.uses().single(result)) return false;
  const NodeId id = rewriter.uses().users(result)[0];
  const Node& user = rewriter.source().nodes[static_cast<std::size_t>(id)];
  const bool activation = user.op == Op::silu || user.op == Op::gelu || user.op == Op::relu;
  if (user.op != Op::add) return activation;
  const Graph& graph = rewriter.source();
  return graph.type(user.operands[0]) == graph.type(user.operands[1]);
}

bool is_candidate(const Rewriter& rewriter, const Node& node) {
  if (node.op != Op::linear || node.attribute_or("residual", false) ||
      node.attribute_or("transposed", false) ||
      !node.attribute_or<std::string>("activation", "").empty()) {
    return false;
  }
  for (std::size_t i = 1; i < node.operands.size(); ++i) {
    if (!is_own_constant(rewriter, node.operands[i])) return false;
  }
  return !rewriter.aliases().written(node.operands[0]) &&
         !awaits_epilogue(rewriter, node.results[0]);
}

// What must be equal for two linears to be merged.
std::string family(const Graph& graph, const Node& node) {
  const Type& weight = graph.type(node.operands[1]);
  std::string key = std::to_string(index(node.operands[0])) + " " + std::string(name(weight.dtype));
  if (node.operands.size() == 3) key += " " + std::string(name(graph.type(node.operands[2]).dtype));
  return key;
}

using Family = std::vector<const Node*>;

// The parts' operand i (a weight or a bias) as one constant.
ValueId stack(Rewriter& rewriter, const Family& parts, std::size_t i) {
  std::string source;
  Dim size = 0;
  for (const Node* part : parts) {
    if (!source.empty()) source += ';';
    const Node* constant = rewriter.source().producer(part->operands[i]);
    source += constant->attribute<std::string>("source");
    size = size + rewriter.source().type(part->operands[i]).shape[0];
  }
  Type type = rewriter.source().type(parts[0]->operands[i]);
  type.shape[0] = size;
  return rewriter.append_constant(std::move(source), std::move(type));
}

// Replaces the results of all parts; they read only x and constants, so the first's place is fine.
bool merge(Rewriter& rewriter, const Family& parts) {
  const Node& first = *parts[0];
  std::vector<ValueId> operands = {rewriter.mapped(first.operands[0])};
  for (std::size_t i = 1; i < first.operands.size(); ++i) {
    operands.push_back(stack(rewriter, parts, i));
  }
  auto merged = rewriter.append(Op::linear, std::move(operands), first.attributes);
  if (!merged) return false;
  const auto axis = static_cast<std::int64_t>(rewriter.built().type(*merged).shape.size()) - 1;
  Dim start = 0;
  for (const Node* part : parts) {
    const Dim end = start + rewriter.source().type(part->operands[1]).shape[0];
    Attributes range = {{"axis", axis}, {"start", Shape{start}}, {"end", Shape{end}}};
    if (!rewriter.replace(part->results[0], Op::slice, {*merged}, std::move(range))) return false;
    start = end;
  }
  return true;
}

}  // namespace

Graph merge_projections(Graph graph, const Target&) {
  std::map<std::string, Family> families;
  bool collected = false;
  return rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
    if (!collected) {
      for (const Node& candidate : graph.nodes) {
        if (is_candidate(rewriter, candidate)) {
          families[family(graph, candidate)].push_back(&candidate);
        }
      }
      collected = true;
    }
    if (!is_candidate(rewriter, node)) return false;
    const Family& parts = families[family(graph, node)];
    if (parts.size() < 2) return false;
    return &node != parts[0] || merge(rewriter, parts);
  });
}

}  // namespace tilewright::graph
