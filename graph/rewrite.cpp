// Uses, Aliases, Rewriter and dead code removal (see rewrite.h).
// Tested by passes_test.
#include "graph/rewrite.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>

namespace tilewright::graph {

std::vector<ValueId> written_operands(const Node& node) {
  if (node.op == Op::index_copy || node.op == Op::kv_append) return {node.operands.front()};
  std::vector<ValueId> written;
  if (node.op == Op::external) {
    for (std::int64_t i : node.attribute_or<std::vector<std::int64_t>>("mutates", {})) {
      written.push_back(node.operands[static_cast<std::size_t>(i)]);
    }
  }
  return written;
}

// A fallback may have effects that we do not see (an assertion, the random number generator).
bool is_pure(const Node& node) {
  return node.op != Op::external && node.op != Op::index_copy && node.op != Op::kv_append;
}

Uses::Uses(const Graph& graph) : users_(graph.values.size()), outputs_(graph.values.size()) {
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    for (ValueId operand : graph.nodes[i].operands) {
      users_[static_cast<std::size_t>(operand)].push_back(static_cast<NodeId>(i));
    }
  }
  for (ValueId output : graph.outputs) outputs_[static_cast<std::size_t>(output)] = true;
}

std::span<const NodeId> Uses::users(ValueId value) const {
  return users_[static_cast<std::size_t>(value)];
}

bool Uses::is_output(ValueId value) const { return outputs_[static_cast<std::size_t>(value)]; }

bool Uses::single(ValueId value) const { return users(value).size() == 1 && !is_output(value); }

Aliases::Aliases(const Graph& graph) : root_(graph.values.size()), writers_(graph.values.size()) {
  std::iota(root_.begin(), root_.end(), 0);
  auto find = [&](ValueId value) {
    int root = index(value);
    while (root_[static_cast<std::size_t>(root)] != root) {
      root = root_[static_cast<std::size_t>(root)];
    }
    return root;
  };
  auto join = [&](ValueId a, ValueId b) { root_[static_cast<std::size_t>(find(a))] = find(b); };
  for (const Node& node : graph.nodes) {
    const bool one =
        op_class(node.op) == OpClass::view || node.op == Op::index_copy || node.op == Op::kv_append;
    for (ValueId result : node.results) {
      if (one) join(result, node.operands.front());
      if (node.op == Op::external) {
        for (ValueId operand : node.operands) join(result, operand);
      }
    }
  }
  std::vector<int> flat(root_.size());
  for (std::size_t i = 0; i < flat.size(); ++i) flat[i] = find(static_cast<ValueId>(i));
  root_ = std::move(flat);
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    for (ValueId written : written_operands(graph.nodes[i])) {
      const int root = root_[static_cast<std::size_t>(written)];
      writers_[static_cast<std::size_t>(root)].push_back(static_cast<int>(i));
    }
  }
}

bool Aliases::same(ValueId a, ValueId b) const {
  return root_[static_cast<std::size_t>(a)] == root_[static_cast<std::size_t>(b)];
}

bool Aliases::written(ValueId value) const {
  return !writers_[static_cast<std::size_t>(root_[static_cast<std::size_t>(value)])].empty();
}

bool Aliases::written_between(ValueId value, NodeId first, NodeId last) const {
  const auto& writers = writers_[static_cast<std::size_t>(root_[static_cast<std::size_t>(value)])];
  auto next = std::upper_bound(writers.begin(), writers.end(), index(first));
  return next != writers.end() && *next < index(last);
}

Rewriter::Rewriter(const Graph& source)
    : source_(&source), uses_(source), aliases_(source), map_(source.values.size(), ValueId::none) {
  built_.name = source.name;
  for (const Value& value : source.values) names_.insert(value.name);
  for (ValueId parameter : source.parameters) {
    map_[static_cast<std::size_t>(parameter)] =
        built_.add_parameter(source.value(parameter).name, source.type(parameter));
  }
}

std::vector<ValueId> Rewriter::mapped(std::span<const ValueId> old) const {
  std::vector<ValueId> values;
  for (ValueId value : old) values.push_back(mapped(value));
  return values;
}

void Rewriter::copy(const Node& node) {
  Node clone = node;
  clone.operands = mapped(node.operands);
  const auto producer = static_cast<NodeId>(built_.nodes.size());
  for (ValueId& result : clone.results) {
    built_.values.push_back({source_->value(result).name, source_->type(result), producer});
    const auto id = static_cast<ValueId>(built_.values.size() - 1);
    map_[static_cast<std::size_t>(result)] = id;
    result = id;
  }
  built_.nodes.push_back(std::move(clone));
}

std::optional<ValueId> Rewriter::append(Op op, std::vector<ValueId> operands,
                                        Attributes attributes) {
  auto result = built_.append(op, std::move(operands), std::move(attributes), fresh_name(name(op)));
  if (!result.ok()) return std::nullopt;
  unnamed_.insert(*result);
  return *result;
}

ValueId Rewriter::append_constant(std::string source, Type type) {
  ValueId constant = built_.add_constant(std::move(source), std::move(type), fresh_name("merged"));
  built_.nodes.back().attributes["axis"] = std::int64_t{0};
  return constant;
}

bool Rewriter::replace(ValueId old, ValueId replacement) {
  if (built_.type(replacement) != source_->type(old)) return false;
  map_[static_cast<std::size_t>(old)] = replacement;
  // An old value that is replaced is not copied, so its name is free: dumps keep their names.
  if (unnamed_.erase(replacement) > 0) {
    built_.value(replacement).name = source_->value(old).name;
  }
  return true;
}

bool Rewriter::replace(ValueId old, Op op, std::vector<ValueId> operands, Attributes attributes) {
  auto value = append(op, std::move(operands), std::move(attributes));
  return value && replace(old, *value);
}

Graph Rewriter::finish() && {
  for (ValueId output : source_->outputs) built_.outputs.push_back(mapped(output));
  return remove_dead_code(built_);
}

std::string Rewriter::fresh_name(std::string_view stem) {
  for (std::size_t i = built_.values.size();; ++i) {
    std::string candidate = std::string(stem) + "." + std::to_string(i);
    if (names_.insert(candidate).second) return candidate;
  }
}

Graph remove_dead_code(const Graph& graph) {
  std::vector<bool> needed(graph.values.size());
  auto need = [&](ValueId value) { needed[static_cast<std::size_t>(value)] = true; };
  auto is_needed = [&](ValueId value) { return needed[static_cast<std::size_t>(value)]; };
  std::vector<bool> kept(graph.nodes.size());
  for (ValueId output : graph.outputs) need(output);
  for (std::size_t i = graph.nodes.size(); i-- > 0;) {
    const Node& node = graph.nodes[i];
    kept[i] = !is_pure(node) || std::any_of(node.results.begin(), node.results.end(), is_needed);
    if (kept[i]) std::for_each(node.operands.begin(), node.operands.end(), need);
  }

  Graph result;
  result.name = graph.name;
  std::vector<ValueId> map(graph.values.size(), ValueId::none);
  auto add = [&](ValueId old, NodeId producer) {
    Value value = graph.value(old);
    value.producer = producer;
    result.values.push_back(std::move(value));
    return map[static_cast<std::size_t>(old)] = static_cast<ValueId>(result.values.size() - 1);
  };
  for (ValueId parameter : graph.parameters) {
    result.parameters.push_back(add(parameter, NodeId::none));
  }
  for (std::size_t i = 0; i < graph.nodes.size(); ++i) {
    if (!kept[i]) continue;
    Node node = graph.nodes[i];
    for (ValueId& operand : node.operands) operand = map[static_cast<std::size_t>(operand)];
    const auto producer = static_cast<NodeId>(result.nodes.size());
    for (ValueId& value : node.results) value = add(value, producer);
    result.nodes.push_back(std::move(node));
  }
  for (ValueId output : graph.outputs) {
    result.outputs.push_back(map[static_cast<std::size_t>(output)]);
  }
  return result;
}

}  // namespace tilewright::graph
