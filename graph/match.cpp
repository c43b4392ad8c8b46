// The matcher (see match.h): a pattern is a function that binds names as it walks up from a value.
// Tested by passes_test.
#include "graph/match.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace tilewright::graph::match {

namespace {

bool is_commutative(Op op) {
  return op == Op::add || op == Op::mul || op == Op::maximum || op == Op::minimum;
}

// Tries a pattern and takes back what it bound if it fails.
bool attempt(const Pattern& pattern, Match& match, ValueId value) {
  Match before = match;
  if (pattern(match, value)) return true;
  match = std::move(before);
  return false;
}

bool operands_match(const std::vector<Pattern>& patterns, Match& match, const Node& node) {
  auto in_order = [&](bool swapped) {
    Match before = match;
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      const std::size_t operand = swapped ? patterns.size() - 1 - i : i;
      if (!patterns[i](match, node.operands[operand])) {
        match = std::move(before);
        return false;
      }
    }
    return true;
  };
  if (patterns.size() != node.operands.size()) return false;
  return in_order(false) || (is_commutative(node.op) && in_order(true));
}

// Every reader of the value is a node of the match.
bool read_only_inside(const Match& match, const Uses& uses, ValueId value) {
  if (uses.is_output(value)) return false;
  auto users = uses.users(value);
  return std::all_of(users.begin(), users.end(),
                     [&](NodeId user) { return match.interior().contains(user); });
}

}  // namespace

bool Match::bind(std::string_view name, ValueId value) {
  return values_.emplace(name, value).first->second == value;
}

bool Match::bind(std::string_view name, double number) {
  return numbers_.emplace(name, number).first->second == number;
}

std::optional<double> literal(const Graph& graph, ValueId value) {
  const Node* node = graph.producer(value);
  if (node == nullptr || node->op != Op::scalar) return std::nullopt;
  return node->attribute<double>("value");
}

Pattern any(std::string name) {
  return [name = std::move(name)](Match& match, ValueId value) { return match.bind(name, value); };
}

Pattern constant(std::string name) {
  return [name = std::move(name)](Match& match, ValueId value) {
    const Node* node = match.graph().producer(value);
    return node != nullptr && node->op == Op::constant && match.bind(name, value);
  };
}

Pattern number(std::string name) {
  return [name = std::move(name)](Match& match, ValueId value) {
    auto found = literal(match.graph(), value);
    return found && match.bind(name, *found);
  };
}

Pattern number(double expected) {
  return
      [expected](Match& match, ValueId value) { return literal(match.graph(), value) == expected; };
}

Pattern op(Op op, std::vector<Pattern> operands) {
  return [op, operands = std::move(operands)](Match& match, ValueId value) {
    const Node* node = match.graph().producer(value);
    if (node == nullptr || node->op != op) return false;
    if (!operands.empty() && !operands_match(operands, match, *node)) return false;
    match.enter(match.graph().value(value).producer, false);
    return true;
  };
}

Pattern power(Pattern base, double exponent) {
  Pattern pow =
      when([exponent](const Graph&,
                      const Node& node) { return node.attribute<double>("exponent") == exponent; },
           op(Op::pow, base));
  return exponent == 2.0 ? either(pow, op(Op::mul, base, base)) : pow;
}

Pattern either(Pattern first, Pattern second) {
  return [first = std::move(first), second = std::move(second)](Match& match, ValueId value) {
    return attempt(first, match, value) || attempt(second, match, value);
  };
}

Pattern swapped(Pattern inner) {
  auto exchanges = [](const Graph&, const Node& node) {
    auto order = node.attribute<std::vector<std::int64_t>>("order");
    if (order.size() < 2) return false;
    std::swap(order[order.size() - 1], order[order.size() - 2]);
    return std::is_sorted(order.begin(), order.end());
  };
  return when(exchanges, op(Op::permute, std::move(inner)));
}

Pattern maybe_converted(Pattern inner) {
  auto between_floats = [](const Graph& graph, const Node& node) {
    return is_float(graph.type(node.operands[0]).dtype) &&
           is_float(graph.type(node.results[0]).dtype);
  };
  return either(inner, when(between_floats, op(Op::convert, inner)));
}

Pattern when(Condition condition, Pattern inner) {
  return [condition = std::move(condition), inner = std::move(inner)](Match& match, ValueId value) {
    if (!inner(match, value)) return false;
    const Node* node = match.graph().producer(value);
    return node != nullptr && condition(match.graph(), *node);
  };
}

Pattern named(std::string name, Pattern inner) {
  return [name = std::move(name), inner = std::move(inner)](Match& match, ValueId value) {
    return inner(match, value) && match.bind(name, value);
  };
}

Pattern shared(Pattern inner) {
  return [inner = std::move(inner)](Match& match, ValueId value) {
    Match before = match;
    Match trial(match);
    if (!inner(trial, value)) return false;
    for (NodeId node : trial.interior()) {
      if (!before.interior().contains(node)) trial.enter(node, true);
    }
    match = std::move(trial);
    return true;
  };
}

std::optional<Match> find(const Pattern& pattern, const Rewriter& rewriter, ValueId root) {
  const Graph& graph = rewriter.source();
  Match match(graph);
  if (!pattern(match, root)) return std::nullopt;
  const NodeId last = graph.value(root).producer;
  for (NodeId id : match.interior()) {
    const Node& node = graph.nodes[static_cast<std::size_t>(id)];
    for (ValueId operand : node.operands) {
      if (rewriter.aliases().written_between(operand, id, last)) return std::nullopt;
    }
    const bool may_stay = id == last || match.shared().contains(id);
    if (!may_stay && !read_only_inside(match, rewriter.uses(), node.results[0])) {
      return std::nullopt;
    }
  }
  return match;
}

}  // namespace tilewright::graph::match
