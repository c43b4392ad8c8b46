// fold_constants: a concatenation of constants becomes one constant whose source names them all
// ("a;b", joined along axis 0), looking through elementwise ops that nothing else reads.
//
// The reason is the rotary table, which models write as cos(cat(f, f)), f = position * frequency:
//
//   cat(p * w, p * w) = p * cat(w, w)      p is the same for every column
//
// so the whole table is one elementwise chain, one step, at twice the multiplications of a few
// dozen columns. The bits are the same: each element is computed from the same operands.
//
// Tested by passes_test, filetests/passes/fold_constants.graph.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "graph/passes.h"
#include "graph/rewrite.h"

namespace tilewright::graph {

namespace {

// The size of an axis counted from the last (1 = last); shapes broadcast from there.
std::optional<Dim> size_from_end(const Type& type, std::size_t axis) {
  if (axis > type.shape.size()) return std::nullopt;
  return type.shape[type.shape.size() - axis];
}

// Builds cat(pieces) without a cat.
class Joiner {
 public:
  Joiner(Rewriter& rewriter, std::size_t axis_from_end)
      : rewriter_(rewriter), graph_(rewriter.source()), axis_(axis_from_end) {}

  // First a dry run, so that nothing is appended in vain. The depth bounds the work: a value that
  // is read twice on each level would be visited 2^depth times.
  bool possible(const std::vector<ValueId>& pieces, int depth = 4) const {
    if (constants(pieces)) return true;
    const Node* first = graph_.producer(pieces[0]);
    if (depth == 0 || first == nullptr || op_class(first->op) != OpClass::elementwise) return false;
    for (ValueId piece : pieces) {
      const Node* node = graph_.producer(piece);
      if (node == nullptr || node->op != first->op || node->attributes != first->attributes ||
          size_from_end(graph_.type(piece), axis_) == std::nullopt) {
        return false;
      }
    }
    for (std::size_t i = 0; i < first->operands.size(); ++i) {
      if (!same_for_all(pieces, i) &&
          !(spans_axis(pieces, i) && possible(operands(pieces, i), depth - 1))) {
        return false;
      }
    }
    return true;
  }

  std::optional<ValueId> join(const std::vector<ValueId>& pieces) {
    if (constants(pieces)) return merge(pieces);
    const Node& node = *graph_.producer(pieces[0]);
    std::vector<ValueId> joined;
    for (std::size_t i = 0; i < node.operands.size(); ++i) {
      std::optional<ValueId> operand =
          same_for_all(pieces, i) ? rewriter_.mapped(node.operands[i]) : join(operands(pieces, i));
      if (!operand) return std::nullopt;
      joined.push_back(*operand);
    }
    return rewriter_.append(node.op, std::move(joined), node.attributes);
  }

 private:
  std::vector<ValueId> operands(const std::vector<ValueId>& pieces, std::size_t i) const {
    std::vector<ValueId> values;
    for (ValueId piece : pieces) values.push_back(graph_.producer(piece)->operands[i]);
    return values;
  }

  bool constants(const std::vector<ValueId>& pieces) const {
    return std::all_of(pieces.begin(), pieces.end(), [&](ValueId piece) {
      const Node* node = graph_.producer(piece);
      const Type& type = graph_.type(piece);
      const Type& first = graph_.type(pieces[0]);
      return node != nullptr && node->op == Op::constant && !node->attributes.contains("axis") &&
             !node->attributes.contains("value") && !type.shape.empty() &&
             type.shape.size() == axis_ && first.shape.size() == axis_ &&
             std::equal(type.shape.begin() + 1, type.shape.end(), first.shape.begin() + 1) &&
             type.dtype == first.dtype && type.encoding.empty() && type.layout.empty();
    });
  }

  // The operand is one value, read in the same way at each place of the axis, and later than before
  // without harm.
  bool same_for_all(const std::vector<ValueId>& pieces, std::size_t i) const {
    auto values = operands(pieces, i);
    const bool equal = std::equal(values.begin() + 1, values.end(), values.begin());
    return equal && !rewriter_.aliases().written(values[0]) &&
           size_from_end(graph_.type(values[0]), axis_).value_or(Dim(1)) == Dim(1);
  }

  bool spans_axis(const std::vector<ValueId>& pieces, std::size_t i) const {
    auto values = operands(pieces, i);
    for (std::size_t p = 0; p < pieces.size(); ++p) {
      if (size_from_end(graph_.type(values[p]), axis_) !=
          size_from_end(graph_.type(pieces[p]), axis_)) {
        return false;
      }
    }
    return true;
  }

  ValueId merge(const std::vector<ValueId>& pieces) {
    std::string source;
    Dim size = 0;
    for (ValueId piece : pieces) {
      if (!source.empty()) source += ';';
      source += graph_.producer(piece)->attribute<std::string>("source");
      size = size + graph_.type(piece).shape[0];
    }
    Type type = graph_.type(pieces[0]);
    type.shape[0] = size;
    return rewriter_.append_constant(std::move(source), std::move(type));
  }

  Rewriter& rewriter_;
  const Graph& graph_;
  std::size_t axis_;
};

// Elementwise work that something else needs too would be done twice.
bool read_by_this_cat_only(const Rewriter& rewriter, const Node& cat) {
  const NodeId self = rewriter.source().value(cat.results[0]).producer;
  return std::all_of(cat.operands.begin(), cat.operands.end(), [&](ValueId operand) {
    auto users = rewriter.uses().users(operand);
    const Node* producer = rewriter.source().producer(operand);
    return (producer != nullptr && producer->op == Op::constant) ||
           (!rewriter.uses().is_output(operand) &&
            std::all_of(users.begin(), users.end(), [&](NodeId user) { return user == self; }));
  });
}

}  // namespace

Graph fold_constants(Graph graph, const Target&) {
  return rewrite(graph, [](Rewriter& rewriter, const Node& node) {
    if (node.op != Op::cat || !read_by_this_cat_only(rewriter, node)) return false;
    const std::size_t rank = rewriter.source().type(node.results[0]).shape.size();
    std::int64_t axis = node.attribute<std::int64_t>("axis");
    if (axis < 0) axis += static_cast<std::int64_t>(rank);
    Joiner joiner(rewriter, rank - static_cast<std::size_t>(axis));
    if (!joiner.possible(node.operands)) return false;
    auto joined = joiner.join(node.operands);
    return joined && rewriter.replace(node.results[0], *joined);
  });
}

}  // namespace tilewright::graph
