// verify: everything that a Graph can express and must not. In this order:
//
//   ids         every operand, result, parameter and output names a value of the graph
//   names       of values, unique, and of the graph: not empty, [A-Za-z0-9_.]+
//   producers   a value is a parameter, or a result of the one node that it names as its producer
//   order       an operand is a parameter or the result of an earlier node
//   signature   operand count; attributes known, present unless optional, of the kind of the table
//   types       results are what infer() says, one per inferred type; stated types (parameters,
//               constants, external) have no negative dims; a cache is f32, bf16, f16 or i8
//   storage     encoding and layout stand on constants only
//   mutation    index_copy and kv_append write a parameter, or the result of an earlier write to
//               one; indices in `mutates` of an external node are operands
//   overwritten a value that was overwritten, or a view of it, is not read afterwards: the result
//               of the write is
//   regions     the nodes of one region are consecutive
//   outputs     types in the header are those of the values (by construction)
//
// Not checked: sizes that only run time knows (lengths behind different symbols, indices).
// What an external node with `mutates` overwrites has no result to read instead, so its operands
// stay readable.
//
// Tested by filetests/verify, graph_test.
#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <string_view>

#include "graph/graph.h"
#include "graph/node_lines.h"

namespace tilewright::graph {
namespace {

class Verifier {
 public:
  Verifier(const Graph& graph, const NodeLines& lines) : graph_(graph), lines_(lines) {}

  Status verify() {
    if (!check_ids()) return located();
    line_ = lines_.parameters;
    if (!check_values() || !check_parameters()) return located();
    for (std::size_t i = 0; i < graph_.nodes.size(); ++i) {
      line_ = lines_.nodes[i];
      if (!check_node(static_cast<NodeId>(i))) return located();
    }
    line_ = lines_.outputs;
    for (ValueId output : graph_.outputs) {
      if (!check_read(output)) return located();
    }
    return {};
  }

 private:
  template <class... Parts>
  bool fail(fmt::format_string<Parts...> format, Parts&&... parts) {
    message_ = fmt::format(format, std::forward<Parts>(parts)...);
    return false;
  }
  Error located() const { return Error{fmt::format("line {}: {}", line_, message_)}; }

  static std::size_t index(ValueId id) { return static_cast<std::size_t>(id); }
  const std::string& name_of(ValueId id) const { return graph_.value(id).name; }

  bool check_ids() {
    auto exist = [this](const std::vector<ValueId>& ids) {
      return std::all_of(ids.begin(), ids.end(),
                         [this](ValueId id) { return index(id) < graph_.values.size(); });
    };
    line_ = lines_.parameters;
    if (!exist(graph_.parameters)) return fail("a parameter is not a value of the graph");
    for (std::size_t i = 0; i < graph_.nodes.size(); ++i) {
      line_ = lines_.nodes[i];
      const Node& node = graph_.nodes[i];
      if (!exist(node.operands)) return fail("an operand is not a value of the graph");
      if (!exist(node.results)) return fail("a result is not a value of the graph");
    }
    line_ = lines_.outputs;
    return exist(graph_.outputs) || fail("an output is not a value of the graph");
  }

  static bool is_name(std::string_view text) {
    constexpr std::string_view legal =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.";
    return !text.empty() && text.find_first_not_of(legal) == std::string_view::npos;
  }

  bool check_values() {
    if (!is_name(graph_.name)) return fail("'{}' is not a name", graph_.name);
    std::set<std::string_view> names;
    for (const Value& value : graph_.values) {
      if (!is_name(value.name)) return fail("'{}' is not a name", value.name);
      if (!names.insert(value.name).second) return fail("%{} is defined twice", value.name);
    }
    defined_.assign(graph_.values.size(), false);
    writable_.assign(graph_.values.size(), false);
    overwritten_.assign(graph_.values.size(), false);
    roots_.resize(graph_.values.size());
    for (std::size_t i = 0; i < roots_.size(); ++i) roots_[i] = i;
    return true;
  }

  bool check_parameters() {
    for (ValueId id : graph_.parameters) {
      if (defined_[index(id)]) return fail("%{} is a parameter twice", name_of(id));
      if (graph_.value(id).producer != NodeId::none) {
        return fail("%{} is a parameter and has a producer", name_of(id));
      }
      if (!check_stated_type(id, false)) return false;
      defined_[index(id)] = writable_[index(id)] = true;
    }
    return true;
  }

  bool check_stated_type(ValueId id, bool constant) {
    const Type& type = graph_.type(id);
    for (const Dim& dim : type.shape) {
      if (dim.is_constant() && dim.constant() < 0) {
        return fail("%{} has a negative dimension: {}", name_of(id), print(type));
      }
    }
    bool storable = type.dtype == DataType::f32 || type.dtype == DataType::bf16 ||
                    type.dtype == DataType::f16 || type.dtype == DataType::i8;
    if (type.is_cache && (!storable || type.shape.size() != 2)) {
      return fail("%{}: a cache is f32, bf16, f16 or i8 and has two dims", name_of(id));
    }
    if (type.is_cache && constant) return fail("%{}: a constant is not a cache", name_of(id));
    if (!constant && !(type.encoding.empty() && type.layout.empty())) {
      return fail("%{}: only constants have an encoding or a layout", name_of(id));
    }
    return true;
  }

  bool check_node(NodeId id) {
    const Node& node = graph_.nodes[static_cast<std::size_t>(id)];
    for (ValueId operand : node.operands) {
      if (!check_read(operand)) return false;
    }
    Status signature = check_signature(node.op, node.operands.size(), node.attributes);
    if (!signature) return fail("{}", signature.error().message);
    if (!check_types(node) || !check_results(id, node) || !check_region(node)) return false;
    return check_effects(node);
  }

  bool check_read(ValueId id) {
    if (!defined_[index(id)]) return fail("%{} is used before it is defined", name_of(id));
    if (overwritten_[roots_[index(id)]]) {
      return fail("%{} was overwritten; read the result of the write", name_of(id));
    }
    return true;
  }

  bool check_types(const Node& node) {
    if (node.op == Op::external || node.op == Op::constant) {
      if (node.op == Op::constant && node.results.size() != 1) {
        return fail("a constant has one result");
      }
      return std::all_of(node.results.begin(), node.results.end(), [&](ValueId id) {
        return check_stated_type(id, node.op == Op::constant);
      });
    }
    std::vector<Type> operands;
    for (ValueId operand : node.operands) operands.push_back(graph_.type(operand));
    Result<std::vector<Type>> types = infer(node.op, operands, node.attributes);
    if (!types) return fail("{}", types.error().message);
    if (node.results.size() != types->size()) {
      return fail("{} has {} results, found {}", name(node.op), types->size(), node.results.size());
    }
    for (std::size_t i = 0; i < types->size(); ++i) {
      const Type& stated = graph_.type(node.results[i]);
      if (stated == (*types)[i]) continue;
      return fail("%{} is {}, stated as {}", name_of(node.results[i]), print((*types)[i]),
                  print(stated));
    }
    return true;
  }

  bool check_results(NodeId id, const Node& node) {
    for (ValueId result : node.results) {
      if (defined_[index(result)]) return fail("%{} is defined twice", name_of(result));
      if (graph_.value(result).producer != id) {
        return fail("%{} names another producer", name_of(result));
      }
      defined_[index(result)] = true;
    }
    return true;
  }

  bool check_region(const Node& node) {
    if (node.region == region_) return true;
    if (node.region >= 0 && !regions_.insert(node.region).second) {
      return fail("region {} is not consecutive", node.region);
    }
    region_ = node.region;
    return true;
  }

  // What the node writes, and what its results share memory with.
  bool check_effects(const Node& node) {
    if (op_class(node.op) == OpClass::view) {
      roots_[index(node.results[0])] = roots_[index(node.operands[0])];
    }
    if (node.op == Op::contiguous || node.op == Op::external) {  // fresh memory, nobody else's
      for (ValueId result : node.results) writable_[index(result)] = true;
    }
    if (node.op == Op::index_copy || node.op == Op::kv_append) {
      std::size_t target = index(node.operands[0]);
      if (!writable_[target]) {
        return fail("{} writes %{}, which is neither a parameter nor the result of a write",
                    name(node.op), graph_.values[target].name);
      }
      overwritten_[target] = true;
      writable_[index(node.results[0])] = true;
    }
    if (node.op == Op::external && node.attributes.contains("mutates")) {
      for (std::int64_t i : node.attribute<std::vector<std::int64_t>>("mutates")) {
        if (i < 0 || static_cast<std::size_t>(i) >= node.operands.size()) {
          return fail("external mutates operand {} of {}", i, node.operands.size());
        }
      }
    }
    return true;
  }

  const Graph& graph_;
  const NodeLines& lines_;
  int line_ = 0;
  std::string message_;
  int region_ = -1;
  std::set<int> regions_;
  // By ValueId. A root is the value whose memory a view shows.
  std::vector<bool> defined_, writable_, overwritten_;
  std::vector<std::size_t> roots_;
};

}  // namespace

Status verify(const Graph& graph, const NodeLines& lines) {
  return Verifier(graph, lines).verify();
}

Status verify(const Graph& graph) { return verify(graph, node_lines(graph)); }

}  // namespace tilewright::graph
