// Rewriting: what a pass needs to know about a graph, and a builder of the graph that replaces it.
//
// A pass walks the old graph once, in order. For each node it either copies the node or replaces
// its result by a value that it appended to the new graph; what nothing reads any more is left out
// at the end. Every replacement has exactly the type of what it replaces, so a rule that is too
// eager is refused here and the node is copied.
//
// Reading a value later than the old graph did is wrong if its storage is written in between:
// Aliases knows which values share storage and who writes them.
//
// Thread-compatible. Tested by passes_test.
#pragma once

#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/graph.h"

namespace tilewright::graph {

// Position of a node in execution order.
inline int index(NodeId node) { return static_cast<int>(node); }
inline int index(ValueId value) { return static_cast<int>(value); }

// The values whose storage the node writes.
std::vector<ValueId> written_operands(const Node& node);
// Whether the node may be dropped when unused, moved, or computed once for two equal ones.
bool is_pure(const Node& node);

// Who reads each value, computed once for all values (Graph::users searches the whole graph).
class Uses {
 public:
  explicit Uses(const Graph& graph);
  std::span<const NodeId> users(ValueId value) const;  // in order, once per operand
  bool is_output(ValueId value) const;
  // Exactly one node reads the value, once, and it is not an output.
  bool single(ValueId value) const;

 private:
  std::vector<std::vector<NodeId>> users_;
  std::vector<bool> outputs_;
};

// Which values may share storage: views, mutated operands and their results, and whatever a
// fallback may have made a view of.
class Aliases {
 public:
  explicit Aliases(const Graph& graph);
  bool same(ValueId a, ValueId b) const;
  bool written(ValueId value) const;                                     // by any node
  bool written_between(ValueId value, NodeId first, NodeId last) const;  // both excluded

 private:
  std::vector<int> root_;                  // by value
  std::vector<std::vector<int>> writers_;  // by root: indices of nodes, ascending
};

class Rewriter {
 public:
  explicit Rewriter(const Graph& source);

  const Graph& source() const { return *source_; }
  const Uses& uses() const { return uses_; }
  const Aliases& aliases() const { return aliases_; }
  const Graph& built() const { return built_; }

  // The value of the new graph that stands for a value of the old one.
  ValueId mapped(ValueId old) const { return map_[static_cast<std::size_t>(old)]; }
  std::vector<ValueId> mapped(std::span<const ValueId> old) const;

  void copy(const Node& node);
  // Appends to the new graph; operands are values of the new graph. Nothing if the op's type rule
  // refuses them.
  std::optional<ValueId> append(Op op, std::vector<ValueId> operands, Attributes attributes);
  // Several sources, separated by ';', are joined along axis 0.
  ValueId append_constant(std::string source, Type type);
  // False, and nothing happens, unless the types are equal.
  bool replace(ValueId old, ValueId replacement);
  // append and replace.
  bool replace(ValueId old, Op op, std::vector<ValueId> operands, Attributes attributes);

  // The new graph, without what nothing reads.
  Graph finish() &&;

 private:
  std::string fresh_name(std::string_view stem);

  const Graph* source_;
  Uses uses_;
  Aliases aliases_;
  Graph built_;
  std::vector<ValueId> map_;
  std::set<std::string, std::less<>> names_;  // of the old graph, and invented ones
  std::set<ValueId> unnamed_;                 // of the new graph: may take a replaced value's name
};

// The same graph without nodes and values that nothing needs.
Graph remove_dead_code(const Graph& graph);

// Walks the graph; rule(rewriter, node) returns whether it replaced the node's results.
template <class Rule>
Graph rewrite(const Graph& graph, Rule rule) {
  Rewriter rewriter(graph);
  for (const Node& node : graph.nodes) {
    if (!rule(rewriter, node)) rewriter.copy(node);
  }
  return std::move(rewriter).finish();
}

}  // namespace tilewright::graph
