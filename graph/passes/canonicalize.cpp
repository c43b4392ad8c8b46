// canonicalize: removes what does nothing, joins chains of views, computes equal values once, and
// gives linear layers one form. A capture is full of such nodes (conversions to the same type, a
// factor 1.0, the same unsqueeze in each layer), and every later pass matches simpler patterns
// without them.
//
// Removing a node lets its result share storage with its operand, so that is not done where
// something writes that storage, nor for a computed result that the graph returns.
//
// Tested by passes_test, filetests/passes/canonicalize.graph.
#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "graph/match.h"
#include "graph/passes.h"
#include "graph/rewrite.h"

namespace tilewright::graph {

namespace {

using Ints = std::vector<std::int64_t>;

// Rules look at the operands in the graph being built, which is simplified up to here.
struct Subject {
  Rewriter& rewriter;
  const Node& node;
  std::vector<ValueId> operands;  // of the new graph
  ValueId result;                 // of the old graph

  const Graph& built() const { return rewriter.built(); }
  const Node* producer(std::size_t operand, Op op) const {
    const Node* found = built().producer(operands[operand]);
    return found != nullptr && found->op == op ? found : nullptr;
  }
  const Type& type() const { return rewriter.source().type(result); }
  bool may_share_storage() const {
    return !rewriter.uses().is_output(result) && !rewriter.aliases().written(node.operands[0]) &&
           !rewriter.aliases().written(result);
  }
  bool becomes(ValueId value) const { return rewriter.replace(result, value); }
  bool becomes(Op op, std::vector<ValueId> values, Attributes attributes) const {
    return rewriter.replace(result, op, std::move(values), std::move(attributes));
  }
};

bool widens(DataType from, DataType to) {
  return to == DataType::f32 && (from == DataType::bf16 || from == DataType::f16);
}

bool simplify_convert(const Subject& s) {
  if (!s.may_share_storage()) return false;
  if (s.becomes(s.operands[0])) return true;
  // Narrowing what was just widened gives the same bits back.
  const Node* inner = s.producer(0, Op::convert);
  return inner != nullptr &&
         widens(s.built().type(inner->operands[0]).dtype, s.built().type(s.operands[0]).dtype) &&
         s.becomes(inner->operands[0]);
}

bool simplify_reshape(const Subject& s) {
  if (s.becomes(s.operands[0])) return true;
  const Node* inner = s.producer(0, Op::reshape);
  return inner != nullptr && (s.becomes(inner->operands[0]) ||
                              s.becomes(Op::reshape, {inner->operands[0]}, s.node.attributes));
}

bool simplify_expand(const Subject& s) {
  if (s.becomes(s.operands[0])) return true;
  const Node* inner = s.producer(0, Op::expand);
  return inner != nullptr && s.becomes(Op::expand, {inner->operands[0]}, s.node.attributes);
}

bool simplify_permute(const Subject& s) {
  Ints order = s.node.attribute<Ints>("order");
  ValueId operand = s.operands[0];
  if (const Node* inner = s.producer(0, Op::permute)) {
    const auto& first = inner->attribute<Ints>("order");
    for (auto& axis : order) axis = first[static_cast<std::size_t>(axis)];
    operand = inner->operands[0];
  }
  if (std::is_sorted(order.begin(), order.end())) return s.becomes(operand);
  return operand != s.operands[0] && s.becomes(Op::permute, {operand}, {{"order", order}});
}

bool simplify_slice(const Subject& s) {
  if (s.node.attribute_or<std::int64_t>("step", 1) != 1) return false;
  if (s.becomes(s.operands[0])) return true;  // the same shape: all of it
  const Node* inner = s.producer(0, Op::slice);
  const auto axis = s.node.attribute<std::int64_t>("axis");
  if (inner == nullptr || inner->attribute<std::int64_t>("axis") != axis ||
      inner->attribute_or<std::int64_t>("step", 1) != 1) {
    return false;
  }
  const Dim offset = inner->attribute<Shape>("start")[0];
  Attributes attributes = s.node.attributes;
  attributes["start"] = Shape{s.node.attribute<Shape>("start")[0] + offset};
  attributes["end"] = Shape{s.node.attribute<Shape>("end")[0] + offset};
  return s.becomes(Op::slice, {inner->operands[0]}, std::move(attributes));
}

// The number that the other operand's neutral element would be.
bool drop_neutral(const Subject& s, double neutral, bool either_side) {
  if (!s.may_share_storage()) return false;
  for (std::size_t i : {std::size_t{1}, std::size_t{0}}) {
    if ((i == 1 || either_side) && match::literal(s.built(), s.operands[i]) == neutral &&
        !s.rewriter.aliases().written(s.node.operands[1 - i]) && s.becomes(s.operands[1 - i])) {
      return true;
    }
  }
  return false;
}

// A bias may be a constant of the linear's columns that nothing has been added to yet.
bool join_bias(const Subject& s) {
  for (std::size_t i : {std::size_t{0}, std::size_t{1}}) {
    const Node* linear = s.producer(i, Op::linear);
    if (linear == nullptr || linear->operands.size() != 2 ||
        !s.rewriter.uses().single(s.node.operands[i]) ||
        s.rewriter.aliases().written(
            s.rewriter.source().producer(s.node.operands[i])->operands[0]) ||
        s.producer(1 - i, Op::constant) == nullptr ||
        !linear->attribute_or<std::string>("activation", "").empty()) {
      continue;
    }
    const Type& bias = s.built().type(s.operands[1 - i]);
    if (bias.shape != Shape{s.type().shape.back()} || bias.dtype != s.type().dtype) continue;
    std::vector<ValueId> operands = linear->operands;
    operands.push_back(s.operands[1 - i]);
    Attributes attributes = linear->attributes;
    attributes["bias"] = true;
    return s.becomes(Op::linear, std::move(operands), std::move(attributes));
  }
  return false;
}

bool simplify_matmul(const Subject& s) {
  if (s.producer(1, Op::constant) != nullptr && s.built().type(s.operands[1]).shape.size() == 2) {
    return s.becomes(Op::linear, s.operands, {{"transposed", true}});
  }
  const Node* transposed = s.producer(1, Op::permute);
  if (transposed == nullptr || transposed->attribute<Ints>("order") != Ints{1, 0}) return false;
  const Node* weight = s.built().producer(transposed->operands[0]);
  return weight != nullptr && weight->op == Op::constant &&
         s.becomes(Op::linear, {s.operands[0], transposed->operands[0]}, {});
}

// Operands without elements go; one that is left alone is the result. A returned result must be a
// tensor of its own: computed just before, or else this copy of it.
bool simplify_cat(const Subject& s) {
  std::vector<ValueId> kept;
  bool written = s.rewriter.aliases().written(s.result);
  for (std::size_t i = 0; i < s.operands.size(); ++i) {
    if (element_count(s.built().type(s.operands[i]).shape) == Dim(0)) continue;
    kept.push_back(s.operands[i]);
    written = written || s.rewriter.aliases().written(s.node.operands[i]);
  }
  if (kept.empty()) return false;
  if (kept.size() == 1 && !written) {
    const Node* producer = s.built().producer(kept[0]);
    const bool computed = producer != nullptr && op_class(producer->op) != OpClass::view &&
                          op_class(producer->op) != OpClass::source;
    const bool returned = s.rewriter.uses().is_output(s.result);
    if ((!returned || computed) && s.becomes(kept[0])) return true;
  }
  return kept.size() < s.operands.size() && s.becomes(Op::cat, std::move(kept), s.node.attributes);
}

// Whether the value, or a view of it, goes to the front end, which may rely on its strides.
bool leaves_graph(const Rewriter& rewriter, ValueId value) {
  if (rewriter.uses().is_output(value)) return true;
  for (NodeId id : rewriter.uses().users(value)) {
    const Node& user = rewriter.source().nodes[static_cast<std::size_t>(id)];
    if (user.op == Op::external) return true;
    if (op_class(user.op) == OpClass::view && leaves_graph(rewriter, user.results[0])) return true;
  }
  return false;
}

bool simplify_contiguous(const Subject& s) {
  return s.may_share_storage() && !leaves_graph(s.rewriter, s.result) && s.becomes(s.operands[0]);
}

// Elementwise ops broadcast by themselves.
bool drop_expands(const Subject& s) {
  std::vector<ValueId> operands = s.operands;
  for (ValueId& operand : operands) {
    const Node* producer = s.built().producer(operand);
    if (producer != nullptr && producer->op == Op::expand) operand = producer->operands[0];
  }
  return operands != s.operands && s.becomes(s.node.op, std::move(operands), s.node.attributes);
}

bool simplify(const Subject& s) {
  bool done = false;
  switch (s.node.op) {
    case Op::convert:
      done = simplify_convert(s);
      break;
    case Op::reshape:
      return simplify_reshape(s);
    case Op::expand:
      return simplify_expand(s);
    case Op::permute:
      return simplify_permute(s);
    case Op::slice:
      return simplify_slice(s);
    case Op::contiguous:
      return simplify_contiguous(s);
    case Op::cat:
      return simplify_cat(s);
    case Op::matmul:
      return simplify_matmul(s);
    case Op::mul:
      done = drop_neutral(s, 1.0, true);
      break;
    case Op::div:
      done = drop_neutral(s, 1.0, false);
      break;
    case Op::add:
      done = drop_neutral(s, 0.0, true) || join_bias(s);
      break;
    case Op::sub:
      done = drop_neutral(s, 0.0, false);
      break;
    default:
      break;
  }
  return done || (op_class(s.node.op) == OpClass::elementwise && drop_expands(s));
}

// What computes the same value has the same key.
using Known = std::map<std::string, ValueId>;
std::optional<std::string> key(const Subject& s) {
  if (!is_pure(s.node) || s.rewriter.uses().is_output(s.result)) return std::nullopt;
  if (s.rewriter.aliases().written(s.result)) return std::nullopt;
  std::string text(name(s.node.op));
  for (std::size_t i = 0; i < s.operands.size(); ++i) {
    if (s.rewriter.aliases().written(s.node.operands[i])) return std::nullopt;
    text += " " + std::to_string(index(s.operands[i]));
  }
  return text + print(s.node.attributes) + print(s.type());
}

bool reuse(const Subject& s, Known& known) {
  auto text = key(s);
  if (!text) return false;
  auto [found, inserted] = known.emplace(std::move(*text), ValueId::none);
  if (!inserted) return s.becomes(found->second);
  s.rewriter.copy(s.node);
  found->second = s.rewriter.mapped(s.result);
  return true;
}

}  // namespace

Graph canonicalize(Graph graph, const Target&) {
  // One walk sees simplified operands; a second one finds equal values that the first created.
  for (std::size_t nodes = graph.nodes.size() + 1; graph.nodes.size() < nodes;) {
    nodes = graph.nodes.size();
    Known known;
    graph = rewrite(graph, [&](Rewriter& rewriter, const Node& node) {
      if (node.results.size() != 1 || node.op == Op::external) return false;
      Subject subject{rewriter, node, rewriter.mapped(node.operands), node.results[0]};
      return simplify(subject) || reuse(subject, known);
    });
  }
  return graph;
}

}  // namespace tilewright::graph
