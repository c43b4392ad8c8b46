// Graph to text: the exact inverse of parse.cpp.
//
// One node is one line, so that errors can name it by its line; node_lines is that numbering.
//
// Tested by graph_test, filetests/parse.
#include <fmt/format.h>

#include "graph/graph.h"
#include "graph/lexer.h"
#include "graph/node_lines.h"

namespace tilewright::graph {
namespace {

struct AttributePrinter {
  std::string operator()(std::int64_t value) const { return fmt::format("{}", value); }
  std::string operator()(double value) const { return print_double(value); }
  std::string operator()(bool value) const { return value ? "true" : "false"; }
  std::string operator()(const std::string& value) const { return quote(value); }
  std::string operator()(const std::vector<std::int64_t>& value) const {
    return fmt::format("[{}]", fmt::join(value, ", "));
  }
  std::string operator()(const Shape& value) const { return print(value); }
  std::string operator()(DataType value) const { return std::string(name(value)); }
};

// Ids are checked: a graph that the verifier rejects is printed too.
std::string value_text(const Graph& graph, ValueId id) {
  auto index = static_cast<std::size_t>(id);
  return index < graph.values.size() ? "%" + graph.values[index].name : "%?";
}

std::string type_text(const Graph& graph, ValueId id) {
  auto index = static_cast<std::size_t>(id);
  return index < graph.values.size() ? print(graph.values[index].type) : "?";
}

template <class Text>
std::string join(const std::vector<ValueId>& ids, Text text) {
  std::string result;
  for (ValueId id : ids) result += (result.empty() ? "" : ", ") + text(id);
  return result;
}

std::string print_node(const Graph& graph, const Node& node) {
  auto value = [&](ValueId id) { return value_text(graph, id); };
  auto type = [&](ValueId id) { return type_text(graph, id); };
  std::string line = join(node.results, value);
  if (!line.empty()) line += " = ";
  Attributes attributes = node.attributes;
  auto source = attributes.find("source");
  if (node.op == Op::constant && node.operands.empty() && source != attributes.end() &&
      std::holds_alternative<std::string>(source->second)) {
    line += "const " + quote(std::get<std::string>(source->second));
    attributes.erase(source);
  } else {
    line += name(node.op);
    if (!node.operands.empty() || operand_count(node.op).maximum != 0) {
      line += "(" + join(node.operands, value) + ")";
    }
  }
  std::string list = print(attributes);
  if (!list.empty()) line += " " + list;
  std::string types = join(node.results, type);
  return line + " : " + (node.results.size() == 1 ? types : "(" + types + ")");
}

// Walks the lines of the body in order: region headers and ends, and nodes.
template <class OnRegion, class OnEnd, class OnNode>
void walk(const Graph& graph, OnRegion on_region, OnEnd on_end, OnNode on_node) {
  int open = -1;
  for (const Node& node : graph.nodes) {
    if (node.region != open) {
      if (open >= 0) on_end();
      if (node.region >= 0) on_region(node.region);
      open = node.region;
    }
    on_node(node);
  }
  if (open >= 0) on_end();
}

}  // namespace

std::string print(const Attributes& attributes) {
  std::string text;
  for (const auto& [key, attribute] : attributes) {
    text += text.empty() ? "{" : ", ";
    text += key + " = " + std::visit(AttributePrinter(), attribute);
  }
  return text.empty() ? text : text + "}";
}

std::string print(const Graph& graph) {
  std::string parameters, types, body;
  for (ValueId id : graph.parameters) {
    if (!parameters.empty()) parameters += ", ";
    parameters += value_text(graph, id) + ": " + type_text(graph, id);
  }
  walk(
      graph, [&](int region) { body += fmt::format("  region {} {{\n", region); },
      [&] { body += "  }\n"; },
      [&](const Node& node) {
        body += (node.region >= 0 ? "    " : "  ") + print_node(graph, node) + "\n";
      });
  return fmt::format("graph {}({}) -> ({}) {{\n{}  return{}{}\n}}\n", graph.name, parameters,
                     join(graph.outputs, [&](ValueId id) { return type_text(graph, id); }), body,
                     graph.outputs.empty() ? "" : " ",
                     join(graph.outputs, [&](ValueId id) { return value_text(graph, id); }));
}

NodeLines node_lines(const Graph& graph) {
  NodeLines lines;
  int line = 1;
  walk(
      graph, [&](int) { ++line; }, [&] { ++line; },
      [&](const Node&) { lines.nodes.push_back(++line); });
  lines.outputs = line + 1;
  return lines;
}

}  // namespace tilewright::graph
