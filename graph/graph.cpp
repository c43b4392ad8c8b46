// The graph's tables and its growth: names of ops, attribute rules, users, append.
//
// Tested by graph_test.
#include "graph/graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "jit/base/fork_static.h"

namespace tilewright::graph {
namespace {

struct OpRow {
  std::string_view name;
  OpClass op_class;
  OperandCount operands;
  std::string_view attributes;
};

constexpr std::array op_rows{
#define GRAPH_OP(name, op_class, minimum, maximum, attributes) \
  OpRow{#name, OpClass::op_class, {minimum, maximum}, attributes},
#include "graph/op_list.def"
#undef GRAPH_OP
};

const OpRow& row(Op op) { return op_rows[static_cast<std::size_t>(op)]; }

constexpr std::array<std::pair<std::string_view, AttributeKind>, 7> attribute_kinds{
    {{"int", AttributeKind::integer},
     {"float", AttributeKind::floating},
     {"bool", AttributeKind::boolean},
     {"string", AttributeKind::string},
     {"ints", AttributeKind::ints},
     {"dims", AttributeKind::dims},
     {"dtype", AttributeKind::dtype}}};

// REQUIRES: the text is an attribute list of op_list.def
std::vector<AttributeRule> parse_rules(std::string_view text) {
  std::vector<AttributeRule> rules;
  while (!text.empty()) {
    std::size_t end = std::min(text.find(' '), text.size());
    std::string_view item = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    AttributeRule rule{};
    rule.optional = item.ends_with('?');
    if (rule.optional) item.remove_suffix(1);
    std::size_t colon = item.find(':');
    rule.key = item.substr(0, colon);
    for (auto [name, kind] : attribute_kinds) {
      if (name == item.substr(colon + 1)) rule.kind = kind;
    }
    rules.push_back(rule);
  }
  return rules;
}

bool has_kind(const Attribute& attribute, AttributeKind kind) {
  switch (kind) {
    case AttributeKind::integer:
      return std::holds_alternative<std::int64_t>(attribute);
    case AttributeKind::floating:
      return std::holds_alternative<double>(attribute);
    case AttributeKind::boolean:
      return std::holds_alternative<bool>(attribute);
    case AttributeKind::string:
      return std::holds_alternative<std::string>(attribute);
    case AttributeKind::ints:
      return std::holds_alternative<std::vector<std::int64_t>>(attribute);
    case AttributeKind::dims:
      return std::holds_alternative<Shape>(attribute);
    case AttributeKind::dtype:
      return std::holds_alternative<DataType>(attribute);
  }
  return false;
}

std::string_view kind_name(AttributeKind kind) {
  return attribute_kinds[static_cast<std::size_t>(kind)].first;
}

}  // namespace

std::string_view name(Op op) { return row(op).name; }
OpClass op_class(Op op) { return row(op).op_class; }
OperandCount operand_count(Op op) { return row(op).operands; }

std::optional<Op> op(std::string_view name) {
  for (std::size_t i = 0; i < op_rows.size(); ++i) {
    if (op_rows[i].name == name) return static_cast<Op>(i);
  }
  return std::nullopt;
}

std::span<const AttributeRule> attribute_rules(Op op) {
  static constinit ForkStatic<const std::vector<std::vector<AttributeRule>>> rules;
  const auto& all_rules = rules.get([] {
    std::vector<std::vector<AttributeRule>> all;
    for (const OpRow& op_row : op_rows) all.push_back(parse_rules(op_row.attributes));
    return all;
  });
  return all_rules[static_cast<std::size_t>(op)];
}

Status check_signature(Op op, std::size_t operands, const Attributes& attributes) {
  auto [minimum, maximum] = operand_count(op);
  auto count = static_cast<std::int64_t>(operands);
  if (count < minimum || (maximum >= 0 && count > maximum)) {
    std::string range = maximum < 0          ? fmt::format("at least {}", minimum)
                        : minimum == maximum ? fmt::format("{}", minimum)
                                             : fmt::format("{} to {}", minimum, maximum);
    return Error{fmt::format("{} takes {} operands, found {}", name(op), range, count)};
  }
  std::span<const AttributeRule> rules = attribute_rules(op);
  for (const AttributeRule& rule : rules) {
    auto found = attributes.find(rule.key);
    if (found == attributes.end()) {
      if (rule.optional) continue;
      return Error{fmt::format("{} needs the attribute '{}'", name(op), rule.key)};
    }
    if (!has_kind(found->second, rule.kind)) {
      return Error{
          fmt::format("attribute '{}' must be of kind {}", rule.key, kind_name(rule.kind))};
    }
  }
  for (const auto& [key, attribute] : attributes) {
    bool known = std::any_of(rules.begin(), rules.end(),
                             [&key = key](const AttributeRule& rule) { return rule.key == key; });
    if (!known) return Error{fmt::format("{} has no attribute '{}'", name(op), key)};
  }
  return {};
}

std::vector<NodeId> Graph::users(ValueId id) const {
  std::vector<NodeId> result;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const std::vector<ValueId>& operands = nodes[i].operands;
    if (std::find(operands.begin(), operands.end(), id) != operands.end()) {
      result.push_back(static_cast<NodeId>(i));
    }
  }
  return result;
}

bool Graph::is_output(ValueId id) const {
  return std::find(outputs.begin(), outputs.end(), id) != outputs.end();
}

// The next value's number makes names unique nearly always, so that one look at the values is
// enough; the loop is for graphs whose names were numbered otherwise.
std::string Graph::unique_name(std::string_view wanted, std::string_view otherwise) const {
  std::string base(wanted);
  for (char& c : base) {
    bool legal = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                 c == '_' || c == '.';
    if (!legal) c = '_';
  }
  auto taken = [this](const std::string& name) {
    return std::any_of(values.begin(), values.end(),
                       [&](const Value& value) { return value.name == name; });
  };
  if (!base.empty() && !taken(base)) return base;
  if (base.empty()) base = otherwise;
  std::size_t number = values.size();
  std::string name = fmt::format("{}_{}", base, number);
  while (taken(name)) name = fmt::format("{}_{}", base, ++number);
  return name;
}

std::vector<ValueId> Graph::append_node(Node node, std::vector<Type> types,
                                        std::span<const std::string> names) {
  for (std::size_t i = 0; i < types.size(); ++i) {
    std::string_view wanted = i < names.size() ? std::string_view(names[i]) : std::string_view();
    Value value{unique_name(wanted, graph::name(node.op)), std::move(types[i]),
                static_cast<NodeId>(nodes.size())};
    node.results.push_back(static_cast<ValueId>(values.size()));
    values.push_back(std::move(value));
  }
  nodes.push_back(std::move(node));
  return nodes.back().results;
}

Result<ValueId> Graph::append(Op op, std::vector<ValueId> operands, Attributes attributes,
                              std::string result_name) {
  std::vector<Type> operand_types;
  for (ValueId operand : operands) operand_types.push_back(type(operand));
  Result<std::vector<Type>> types = infer(op, operand_types, attributes);
  if (!types) return types.error();
  Node node{op, std::move(operands), {}, std::move(attributes)};
  return append_node(std::move(node), std::move(*types), std::span(&result_name, 1)).front();
}

Result<std::vector<ValueId>> Graph::append_external(std::vector<ValueId> operands,
                                                    Attributes attributes, std::vector<Type> types,
                                                    std::vector<std::string> result_names) {
  if (Status status = check_signature(Op::external, operands.size(), attributes); !status) {
    return status.error();
  }
  Node node{Op::external, std::move(operands), {}, std::move(attributes)};
  return append_node(std::move(node), std::move(types), result_names);
}

ValueId Graph::add_parameter(std::string name, Type type) {
  values.push_back(Value{unique_name(name, "parameter"), std::move(type)});
  parameters.push_back(static_cast<ValueId>(values.size() - 1));
  return parameters.back();
}

ValueId Graph::add_constant(std::string source, Type type, std::string name) {
  Node node{Op::constant, {}, {}, {{"source", std::move(source)}}};
  std::vector<Type> types;
  types.push_back(std::move(type));
  return append_node(std::move(node), std::move(types), std::span(&name, 1)).front();
}

AttentionOperands attention_operands(bool cache, std::size_t operands,
                                     const Attributes& attributes) {
  AttentionOperands found{.cache = cache};
  int next = static_cast<int>(operands);
  const auto flagged = [&](std::string_view key) {
    const auto attribute = attributes.find(key);
    return attribute != attributes.end() && std::get<bool>(attribute->second);
  };
  if (flagged("sinks")) found.sinks = --next;
  if (flagged("slopes")) found.slopes = --next;
  if (!cache && next > 3) found.mask = 3;
  return found;
}

}  // namespace tilewright::graph
