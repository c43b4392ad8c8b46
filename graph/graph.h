// Graph: the tensor-level IR. Values are numbered and typed; nodes are in execution order; text is
// the interface.
//
//   graph layer(%x: f32[b, s, 576], %kv: cache<f32, 3 x 64>) -> (f32[b, s, 576]) {
//     %w = const "input_layernorm.weight" : f32[576]
//     %n = rms_norm(%x, %w) {eps = 1e-05} : f32[b, s, 576]
//     region 0 {
//       %a, %b = ...
//     }
//     return %n
//   }
//
// Mutation is explicit: index_copy and kv_append write operand 0 and return it; no other op writes.
// A region groups nodes that become one program step.
//
// A Graph is a value; passes take one and return one. Thread-compatible.
// Tested by graph_test, filetests/{parse,verify}.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "graph/type.h"
#include "jit/base/result.h"

namespace tilewright::graph {

enum class Op : std::uint8_t {
#define GRAPH_OP(name, op_class, minimum, maximum, attributes) name,
#include "graph/op_list.def"
#undef GRAPH_OP
};
inline constexpr std::size_t op_count = 0
#define GRAPH_OP(name, op_class, minimum, maximum, attributes) +1
#include "graph/op_list.def"
#undef GRAPH_OP
    ;

enum class OpClass : std::uint8_t {
  source,
  view,
  elementwise,
  reduction,
  normalisation,
  contraction,
  data,
  composite,
  fallback
};

std::string_view name(Op op);
OpClass op_class(Op op);
std::optional<Op> op(std::string_view name);

// What an op's attribute list may hold, from its row of op_list.def.
enum class AttributeKind : std::uint8_t { integer, floating, boolean, string, ints, dims, dtype };
struct AttributeRule {
  std::string_view key;
  AttributeKind kind;
  bool optional;
};
std::span<const AttributeRule> attribute_rules(Op op);
struct OperandCount {
  int minimum, maximum;  // maximum -1: any
};
OperandCount operand_count(Op op);

enum class ValueId : std::int32_t { none = -1 };
enum class NodeId : std::int32_t { none = -1 };

using Attribute = std::variant<std::int64_t, double, bool, std::string, std::vector<std::int64_t>,
                               Shape, DataType>;
using Attributes = std::map<std::string, Attribute, std::less<>>;

struct Value {
  std::string name;  // without '%'; unique in the graph
  Type type;
  NodeId producer = NodeId::none;  // none: a parameter
};

struct Node {
  Op op;
  std::vector<ValueId> operands = {};
  std::vector<ValueId> results = {};
  Attributes attributes = {};
  int region = -1;  // -1: not assigned

  // REQUIRES: the attribute exists with that kind (the verifier has checked it), unless a default
  // is given.
  template <class T>
  const T& attribute(std::string_view key) const {
    return std::get<T>(attributes.find(key)->second);
  }
  template <class T>
  T attribute_or(std::string_view key, T otherwise) const {
    auto found = attributes.find(key);
    return found == attributes.end() ? otherwise : std::get<T>(found->second);
  }
};

// Which operands of an attention are what; -1: it has none.
struct AttentionOperands {
  bool cache = false;  // operand 1 is a cache, else keys, and operand 2 values
  int mask = -1, slopes = -1, sinks = -1;
};
// REQUIRES: an attention with as many operands as its attributes say
AttentionOperands attention_operands(bool cache, std::size_t operands,
                                     const Attributes& attributes);

struct Graph {
  std::string name = "graph";
  std::vector<Value> values;  // indexed by ValueId
  std::vector<Node> nodes;    // in execution order; NodeId is the index
  std::vector<ValueId> parameters;
  std::vector<ValueId> outputs;

  const Value& value(ValueId id) const { return values[static_cast<std::size_t>(id)]; }
  Value& value(ValueId id) { return values[static_cast<std::size_t>(id)]; }
  const Type& type(ValueId id) const { return value(id).type; }
  const Node* producer(ValueId id) const {
    NodeId node = value(id).producer;
    return node == NodeId::none ? nullptr : &nodes[static_cast<std::size_t>(node)];
  }
  // The nodes that read a value, in order; outputs do not count.
  std::vector<NodeId> users(ValueId id) const;
  bool is_output(ValueId id) const;

  // Appends; result types are inferred by the op's type rule (error: why the operands do not fit).
  // The name is made unique, and legal: [A-Za-z0-9_.]+.
  Result<ValueId> append(Op op, std::vector<ValueId> operands, Attributes attributes,
                         std::string result_name = "");
  // The same for an external node, whose result types are stated: as many results as types.
  Result<std::vector<ValueId>> append_external(std::vector<ValueId> operands, Attributes attributes,
                                               std::vector<Type> types,
                                               std::vector<std::string> result_names = {});
  ValueId add_parameter(std::string name, Type type);
  ValueId add_constant(std::string source, Type type, std::string name = "");

 private:
  std::string unique_name(std::string_view wanted, std::string_view otherwise) const;
  std::vector<ValueId> append_node(Node node, std::vector<Type> types,
                                   std::span<const std::string> names);
};

std::string print(const Graph& graph);
std::string print(const Attributes& attributes);  // {eps = 1e-05}; "" if there are none
Result<Graph> parse(std::string_view text);       // the error begins with "line N: "
Status verify(const Graph& graph);  // the error begins with "line N: " of print(graph)
// Operand count, attribute names, presence and kinds, as the op's row says.
Status check_signature(Op op, std::size_t operands, const Attributes& attributes);
// Types of the results of an op from its operands and attributes. Error: why they do not fit.
// constant and external have no rule, their types are stated.
Result<std::vector<Type>> infer(Op op, std::span<const Type> operands,
                                const Attributes& attributes);

}  // namespace tilewright::graph
