// Text to graph: recursive descent, one function per rule of the grammar in README.md.
//
// The parser checks what a Graph cannot express (unknown names, duplicate names, types in the
// header that are not those of the results); everything else is left to verify(). A stated result
// type is taken as it is; a missing one is inferred. Any text gives a graph or an error.
//
// Tested by graph_test (also with broken texts), filetests/parse.
#include <fmt/format.h>

#include <limits>
#include <unordered_map>

#include "graph/node_lines.h"
#include "graph/parse_type.h"

namespace tilewright::graph {
namespace {

using Names = std::vector<std::string>;

class Parser {
 public:
  explicit Parser(std::string_view text) : lexer_(text) {}

  Result<ParsedText> parse() {
    bool parsed = header() && body() && end_of_text();
    if (!parsed) return Error{fmt::format("line {}: {}", error_line_, error_)};
    return ParsedText{std::move(graph_), std::move(lines_)};
  }

 private:
  // Errors: the first one is kept, and every rule returns false from there up.
  // About what was read last.
  bool fail(std::string message) { return fail_at(lexer_.last_line(), std::move(message)); }
  bool fail_at(int line, std::string message) {
    if (!error_.empty()) return false;
    error_line_ = line;
    error_ = std::move(message);
    return false;
  }
  bool expected(std::string_view what) {
    return fail_at(lexer_.line(), fmt::format("{} expected, found {}", what, lexer_.next()));
  }
  bool expect(std::string_view punctuation) {
    return lexer_.accept(punctuation) || expected(fmt::format("'{}'", punctuation));
  }
  template <class T>
  bool take(Result<T> result, T& out) {
    if (!result) return fail(result.error().message);
    out = std::move(*result);
    return true;
  }
  // item {"," item} close
  template <class Item>
  bool list(std::string_view close, Item item) {
    if (lexer_.accept(close)) return true;
    do {
      if (!item()) return false;
    } while (lexer_.accept(","));
    return expect(close);
  }

  bool header() {
    lines_.parameters = lexer_.line();
    if (!lexer_.accept_word("graph")) return expected("'graph'");
    auto name = lexer_.dotted();
    if (!name) return expected("the graph's name");
    graph_.name = *name;
    return expect("(") && list(")", [&] { return parameter(); }) && expect("->") && expect("(") &&
           list(")", [&] { return take(read_type(lexer_), output_types_.emplace_back()); }) &&
           expect("{");
  }

  bool parameter() {
    std::string name;
    Type type;
    if (!value_name(name) || !expect(":") || !take(read_type(lexer_), type)) return false;
    ValueId id = ValueId::none;
    if (!define(lexer_.last_line(), std::move(name), std::move(type), NodeId::none, id))
      return false;
    graph_.parameters.push_back(id);
    return true;
  }

  bool body() {
    int region = -1;
    while (true) {
      if (lexer_.accept("}")) {
        if (region < 0) return fail("'return' expected before the end of the graph");
        region = -1;
      } else if (lexer_.accept_word("region")) {
        if (region >= 0) return fail("a region inside a region");
        if (!region_number(region) || !expect("{")) return false;
      } else if (lexer_.accept_word("return")) {
        return region < 0 ? outputs() : fail("'return' inside a region");
      } else if (!node(region)) {
        return false;
      }
    }
  }

  bool region_number(int& region) {
    auto number = lexer_.number();
    bool legal = number && number->is_integer && number->in_range &&
                 number->integer <= std::numeric_limits<int>::max();
    if (!legal) return expected("the region's number");
    region = static_cast<int>(number->integer);
    return true;
  }

  bool outputs() {
    int line = lines_.outputs = lexer_.last_line();
    if (!lexer_.accept("}")) {
      do {
        if (!operand(graph_.outputs)) return false;
      } while (lexer_.accept(","));
      if (!expect("}")) return false;
    }
    if (graph_.outputs.size() != output_types_.size()) {
      return fail_at(line, fmt::format("{} results returned, the header states {}",
                                       graph_.outputs.size(), output_types_.size()));
    }
    for (std::size_t i = 0; i < output_types_.size(); ++i) {
      const Value& value = graph_.value(graph_.outputs[i]);
      if (value.type == output_types_[i]) continue;
      return fail_at(line, fmt::format("%{} is {}, the header states {}", value.name,
                                       print(value.type), print(output_types_[i])));
    }
    return true;
  }

  bool end_of_text() { return lexer_.at_end() || expected("the end of the text"); }

  // [names "="] op ["(" operands ")"] ["{" attributes "}"] [":" types]
  bool node(int region) {
    int line = lexer_.line();
    Names names;
    if (!result_names(names)) return false;
    Node node{Op::constant};
    node.region = region;
    if (!operation(node)) return false;
    std::vector<Type> types;
    bool stated = lexer_.accept(":");
    if (stated ? !result_types(types) : !inferred_types(line, node, types)) return false;
    if (names.size() != types.size()) {
      return fail_at(line, fmt::format("{} names for {} results", names.size(), types.size()));
    }
    auto id = static_cast<NodeId>(graph_.nodes.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
      ValueId result = ValueId::none;
      if (!define(line, std::move(names[i]), std::move(types[i]), id, result)) return false;
      node.results.push_back(result);
    }
    graph_.nodes.push_back(std::move(node));
    lines_.nodes.push_back(line);
    return true;
  }

  bool result_names(Names& names) {
    if (!lexer_.accept("%")) return true;
    do {
      auto name = lexer_.dotted();
      if (!name) return expected("a name after '%'");
      names.emplace_back(*name);
      if (!lexer_.accept(",")) return expect("=");
    } while (lexer_.accept("%"));
    return expected("'%'");
  }

  bool operation(Node& node) {
    if (lexer_.accept_word("const")) {
      auto source = lexer_.string();
      if (!source) return expected("the constant's name in quotes");
      node.attributes["source"] = std::move(*source);
    } else {
      auto word = lexer_.identifier();
      if (!word) return expected("an operation");
      auto found = op(*word);
      if (!found) return fail(fmt::format("unknown op '{}'", *word));
      node.op = *found;
      if (lexer_.accept("(") && !list(")", [&] { return operand(node.operands); })) return false;
    }
    return !lexer_.accept("{") || list("}", [&] { return attribute(node); });
  }

  bool operand(std::vector<ValueId>& operands) {
    std::string name;
    if (!value_name(name)) return false;
    auto found = ids_.find(name);
    if (found == ids_.end()) return fail(fmt::format("%{} is not defined", name));
    operands.push_back(found->second);
    return true;
  }

  bool result_types(std::vector<Type>& types) {
    if (!lexer_.accept("(")) return take(read_type(lexer_), types.emplace_back());
    return list(")", [&] { return take(read_type(lexer_), types.emplace_back()); });
  }

  bool inferred_types(int line, const Node& node, std::vector<Type>& types) {
    std::vector<Type> operands;
    for (ValueId id : node.operands) operands.push_back(graph_.type(id));
    Result<std::vector<Type>> result = infer(node.op, operands, node.attributes);
    if (!result) return fail_at(line, result.error().message);
    types = std::move(*result);
    return true;
  }

  bool attribute(Node& node) {
    auto key = lexer_.identifier();
    if (!key) return expected("an attribute");
    if (!expect("=")) return false;
    Attribute value;
    if (!attribute_value(kind_of(node.op, *key), value)) return false;
    if (!node.attributes.emplace(*key, std::move(value)).second) {
      return fail(fmt::format("attribute '{}' is given twice", *key));
    }
    return true;
  }

  static std::optional<AttributeKind> kind_of(Op op, std::string_view key) {
    for (const AttributeRule& rule : attribute_rules(op)) {
      if (rule.key == key) return rule.kind;
    }
    return std::nullopt;
  }

  // The kind decides between spellings that look alike: [1, 2] as ints or dims, 1 as int or float.
  bool attribute_value(std::optional<AttributeKind> kind, Attribute& value) {
    if (auto text = lexer_.string()) {
      value = std::move(*text);
      return true;
    }
    if (lexer_.accept_word("true")) {
      value = true;
      return true;
    }
    if (lexer_.accept_word("false")) {
      value = false;
      return true;
    }
    if (kind == AttributeKind::dims) return shape_value(value);
    if (lexer_.accept("[")) return ints_value(value);
    if (auto number = lexer_number()) return number_value(*number, kind, value);
    auto word = lexer_.identifier();
    auto dtype = word ? data_type(*word) : std::nullopt;
    if (!dtype) return expected("the attribute's value");
    value = *dtype;
    return true;
  }

  struct SignedNumber {
    Number number;
    bool negative = false;
  };

  // A number with its sign, or inf or nan.
  std::optional<SignedNumber> lexer_number() {
    bool negative = lexer_.accept("-");
    if (auto number = lexer_.number()) return SignedNumber{*number, negative};
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    if (lexer_.accept_word("inf")) return SignedNumber{{false, true, 0, infinity}, negative};
    if (lexer_.accept_word("nan")) return SignedNumber{{false, true, 0, nan}, false};
    return std::nullopt;
  }

  bool number_value(const SignedNumber& text, std::optional<AttributeKind> kind, Attribute& value) {
    if (text.number.is_integer && kind != AttributeKind::floating) {
      std::int64_t integer = 0;
      if (!integer_value(text, integer)) return false;
      value = integer;
      return true;
    }
    if (!text.number.in_range) return fail("number out of range");
    value = text.negative ? -text.number.floating : text.number.floating;
    return true;
  }

  bool integer_value(const SignedNumber& text, std::int64_t& value) {
    constexpr std::uint64_t limit = std::uint64_t{1} << 63;
    bool legal = text.number.is_integer && text.number.in_range &&
                 (text.negative || text.number.integer < limit);
    if (!legal) return fail("integer out of range");
    std::uint64_t bits = text.number.integer;
    value = static_cast<std::int64_t>(text.negative ? 0 - bits : bits);
    return true;
  }

  bool ints_value(Attribute& value) {
    std::vector<std::int64_t> ints;
    bool parsed = list("]", [&] {
      auto number = lexer_number();
      if (!number) return expected("an integer");
      return integer_value(*number, ints.emplace_back());
    });
    value = std::move(ints);
    return parsed;
  }

  bool shape_value(Attribute& value) {
    Shape shape;
    bool parsed = take(read_shape(lexer_), shape);
    value = std::move(shape);
    return parsed;
  }

  bool value_name(std::string& name) {
    if (!lexer_.accept("%")) return expected("'%'");
    auto word = lexer_.dotted();
    if (!word) return expected("a name after '%'");
    name = *word;
    return true;
  }

  bool define(int line, std::string name, Type type, NodeId producer, ValueId& id) {
    id = static_cast<ValueId>(graph_.values.size());
    if (!ids_.emplace(name, id).second) {
      return fail_at(line, fmt::format("%{} is defined twice", name));
    }
    graph_.values.push_back(Value{std::move(name), std::move(type), producer});
    return true;
  }

  Lexer lexer_;
  Graph graph_;
  NodeLines lines_;
  std::unordered_map<std::string, ValueId> ids_;
  std::vector<Type> output_types_;
  std::string error_;
  int error_line_ = 0;
};

}  // namespace

Result<ParsedText> parse_with_lines(std::string_view text) { return Parser(text).parse(); }

Result<Graph> parse(std::string_view text) {
  Result<ParsedText> parsed = parse_with_lines(text);
  if (!parsed) return parsed.error();
  return std::move(parsed->graph);
}

}  // namespace tilewright::graph
