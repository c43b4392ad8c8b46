// Patterns that read like the maths:
//
//   Pattern x = any("x");
//   Pattern scale = op(Op::rsqrt, op(Op::add, op(Op::mean, power(x, 2.0)), number("eps")));
//   Pattern norm = op(Op::mul, x, scale);
//   if (auto found = find(norm, rewriter, node.results[0])) ... found->value("x"), number("eps")
//
// Operands of add and mul match in either order. A name that occurs twice must be the same value
// both times. A match is refused if an intermediate value is read from outside it (the work would
// not go away), or if storage that it reads is written before its last node, where the
// replacement will read it.
//
// The choice of an operand order is final once the two operands matched: a pattern whose operands
// could be exchanged and fail only later must say which is which (shape, constant, op).
//
// Thread-compatible. Tested by passes_test.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "graph/graph.h"
#include "graph/rewrite.h"

namespace tilewright::graph::match {

// What has been bound so far, and in the end the match: values of the old graph.
class Match {
 public:
  explicit Match(const Graph& graph) : graph_(&graph) {}

  const Graph& graph() const { return *graph_; }
  bool has(std::string_view name) const { return values_.contains(name); }
  bool has_number(std::string_view name) const { return numbers_.contains(name); }
  ValueId value(std::string_view name) const { return values_.find(name)->second; }
  double number(std::string_view name) const { return numbers_.find(name)->second; }
  const Type& type(std::string_view name) const { return graph_->type(value(name)); }

  bool bind(std::string_view name, ValueId value);  // false: bound to another value
  bool bind(std::string_view name, double number);
  void enter(NodeId node, bool shared) { (shared ? shared_ : interior_).insert(node); }
  const std::set<NodeId>& interior() const { return interior_; }  // nodes that disappear
  const std::set<NodeId>& shared() const { return shared_; }      // nodes that may stay

 private:
  const Graph* graph_;
  std::map<std::string, ValueId, std::less<>> values_;
  std::map<std::string, double, std::less<>> numbers_;
  std::set<NodeId> interior_, shared_;
};

using Pattern = std::function<bool(Match&, ValueId)>;
using Condition = std::function<bool(const Graph&, const Node&)>;

Pattern any(std::string name);       // any value
Pattern constant(std::string name);  // a weight
Pattern number(std::string name);    // a scalar literal
Pattern number(double value);
// The result of an op; operands one by one, or none to accept all.
Pattern op(Op op, std::vector<Pattern> operands);
template <class... Patterns>
Pattern op(Op kind, Patterns... operands) {
  return op(kind, std::vector<Pattern>{std::move(operands)...});
}
Pattern power(Pattern base, double exponent);  // pow, or for 2 also base * base
Pattern either(Pattern first, Pattern second);
Pattern swapped(Pattern inner);          // a permute that exchanges the last two axes of inner
Pattern maybe_converted(Pattern inner);  // inner, or a float type converted to another
Pattern when(Condition condition, Pattern inner);  // and the producing node satisfies it
Pattern named(std::string name, Pattern inner);    // also binds the value itself
Pattern shared(Pattern inner);  // a view: its value may have other readers, it costs nothing

// The literal that a value is, if it is one.
std::optional<double> literal(const Graph& graph, ValueId value);

// Matches the value and checks what the head of this file promises.
std::optional<Match> find(const Pattern& pattern, const Rewriter& rewriter, ValueId root);

}  // namespace tilewright::graph::match
