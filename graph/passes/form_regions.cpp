// form_regions: numbers the regions and orders the nodes so that each region is consecutive. A
// region becomes one program step, and a barrier follows each step, so fewer is faster.
//
//   contraction, attention, embedding, fallback ...   a region each
//   elementwise, reductions, norms, softmax           chains over the same rows join
//   rope, kv_append, cat around one attention         join: independent pieces of work
//   views, constants, scalars                         none (-1): no work; a view between two nodes
//                                                     of a region belongs to it
//
// A Llama layer has eight: norm, qkv, rope + append, attention, output + residual, norm, gated up,
// down + residual.
//
// Two sets of nodes may join if no path leaves the union and comes back. Paths are those of values
// and of storage: whatever reads or writes storage keeps its place relative to its writers.
//
// Tested by passes_test, filetests/passes/form_regions.graph.
#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <queue>
#include <set>
#include <utility>
#include <vector>

#include "graph/passes.h"
#include "graph/rewrite.h"

namespace tilewright::graph {

namespace {

using Nodes = std::vector<int>;

// For each node, the nodes that must run after it.
std::vector<Nodes> successors(const Graph& graph) {
  std::vector<Nodes> after(graph.nodes.size());
  auto edge = [&](int from, int to) { after[static_cast<std::size_t>(from)].push_back(to); };
  const Aliases aliases(graph);
  std::vector<std::pair<ValueId, Nodes>> storages;  // of what is written: readers since, and writer
  auto since = [&](ValueId value) -> Nodes& {
    for (auto& [representative, nodes] : storages) {
      if (aliases.same(representative, value)) return nodes;
    }
    return storages.emplace_back(value, Nodes{}).second;
  };
  for (int i = 0; i < static_cast<int>(graph.nodes.size()); ++i) {
    const Node& node = graph.nodes[static_cast<std::size_t>(i)];
    for (ValueId operand : node.operands) {
      const NodeId producer = graph.value(operand).producer;
      if (producer != NodeId::none) edge(index(producer), i);
      if (!aliases.written(operand)) continue;
      // The front of the list is the last writer (or the first reader: an edge too many, which
      // keeps their order).
      Nodes& nodes = since(operand);
      if (!nodes.empty() && nodes.front() != i) edge(nodes.front(), i);
      nodes.push_back(i);
    }
    for (ValueId written : written_operands(node)) {
      Nodes& nodes = since(written);
      for (int earlier : nodes) {
        if (earlier != i) edge(earlier, i);
      }
      nodes = {i};
    }
  }
  return after;
}

// A partition of the nodes into groups, whose graph stays free of cycles.
class Groups {
 public:
  explicit Groups(const Graph& graph) : after_(successors(graph)) {
    const std::size_t count = graph.nodes.size();
    group_.resize(count);
    std::iota(group_.begin(), group_.end(), 0);
    for (int i = 0; i < static_cast<int>(count); ++i) members_.push_back({i});
  }

  int group(int node) const { return group_[static_cast<std::size_t>(node)]; }
  const Nodes& members(int group) const { return members_[static_cast<std::size_t>(group)]; }
  int count() const { return static_cast<int>(members_.size()); }

  std::set<int> followers(int group) const {
    std::set<int> result;
    for (int node : members(group)) {
      for (int next : after_[static_cast<std::size_t>(node)]) result.insert(this->group(next));
    }
    result.erase(group);
    return result;
  }

  // Joins the nodes' groups unless a path leaves the union and comes back.
  bool join(const Nodes& nodes) {
    std::set<int> together;
    for (int node : nodes) together.insert(group(node));
    if (comes_back(together)) return false;
    const int first = *together.begin();
    Nodes& all = members_[static_cast<std::size_t>(first)];
    for (int other : together) {
      if (other == first) continue;
      Nodes& moved = members_[static_cast<std::size_t>(other)];
      for (int node : moved) group_[static_cast<std::size_t>(node)] = first;
      all.insert(all.end(), moved.begin(), moved.end());
      moved.clear();
    }
    std::sort(all.begin(), all.end());
    return true;
  }

 private:
  bool comes_back(const std::set<int>& together) const {
    std::set<int> seen;
    std::vector<int> open;
    for (int group : together) {
      for (int next : followers(group)) {
        if (!together.contains(next) && seen.insert(next).second) open.push_back(next);
      }
    }
    while (!open.empty()) {
      const int group = open.back();
      open.pop_back();
      for (int next : followers(group)) {
        if (together.contains(next)) return true;
        if (seen.insert(next).second) open.push_back(next);
      }
    }
    return false;
  }

  std::vector<Nodes> after_;
  std::vector<int> group_;
  std::vector<Nodes> members_;
};

// --- rows

// Types that a row of a fused region may hold; 64-bit integers only one per row.
bool fits_row(const Type& type) {
  switch (type.dtype) {
    case DataType::f32:
    case DataType::bf16:
    case DataType::f16:
    case DataType::boolean:
    case DataType::i32:
      return !type.is_cache;
    case DataType::i64:
      return type.shape.empty() || type.shape.back() == Dim(1);
    default:
      return false;
  }
}

bool works_on_rows(const Graph& graph, const Node& node) {
  const OpClass kind = op_class(node.op);
  if (kind != OpClass::elementwise && kind != OpClass::reduction &&
      kind != OpClass::normalisation) {
    return false;
  }
  const Type& result = graph.type(node.results[0]);
  return result.dtype != DataType::i64 && fits_row(result) &&
         std::all_of(node.operands.begin(), node.operands.end(),
                     [&](ValueId operand) { return fits_row(graph.type(operand)); });
}

// The rows that a node computes: all axes but the last, and the length of a row. A reduction reads
// longer rows than it gives.
struct Rows {
  Shape outer;
  Dim columns = 1;
};

Rows rows(const Graph& graph, const Node& node) {
  const bool reduces = op_class(node.op) == OpClass::reduction;
  Rows result{graph.type(reduces ? node.operands[0] : node.results[0]).shape, 1};
  if (!result.outer.empty()) {
    result.columns = result.outer.back();
    result.outer.pop_back();
  }
  return result;
}

// The operands and results that a group of nodes would have in memory.
std::size_t operand_count(const Graph& graph, const Uses& uses, const std::set<int>& nodes) {
  std::set<ValueId> inputs;
  std::size_t outputs = 0;
  for (int i : nodes) {
    const Node& node = graph.nodes[static_cast<std::size_t>(i)];
    for (ValueId operand : node.operands) {
      const NodeId producer = graph.value(operand).producer;
      const bool is_scalar = producer != NodeId::none && graph.producer(operand)->op == Op::scalar;
      const bool inside = producer != NodeId::none && nodes.contains(index(producer));
      if (!inside && !is_scalar) inputs.insert(operand);
    }
    auto users = uses.users(node.results[0]);
    outputs += uses.is_output(node.results[0]) ||
               std::any_of(users.begin(), users.end(),
                           [&](NodeId user) { return !nodes.contains(index(user)); });
  }
  return inputs.size() + outputs;
}

// Each operand in memory takes a pointer register of the fused kernel; more than this would spill.
constexpr std::size_t most_operands = 10;

void join_rows(const Graph& graph, const Uses& uses, Groups& groups) {
  std::vector<Rows> of_group(graph.nodes.size());
  auto rows_of = [&](int node) -> Rows& {
    return of_group[static_cast<std::size_t>(groups.group(node))];
  };
  std::vector<bool> candidate(graph.nodes.size());
  for (int i = 0; i < static_cast<int>(graph.nodes.size()); ++i) {
    const Node& node = graph.nodes[static_cast<std::size_t>(i)];
    if (!works_on_rows(graph, node)) continue;
    candidate[static_cast<std::size_t>(i)] = true;
    rows_of(i) = rows(graph, node);
    for (ValueId operand : node.operands) {
      const NodeId producer = graph.value(operand).producer;
      if (producer == NodeId::none || !candidate[static_cast<std::size_t>(producer)]) continue;
      const int other = index(producer);
      const Rows mine = rows_of(i), theirs = rows_of(other);
      const bool same_length =
          mine.columns == theirs.columns || mine.columns == Dim(1) || theirs.columns == Dim(1);
      if (mine.outer != theirs.outer || !same_length) continue;
      std::set<int> both(groups.members(groups.group(i)).begin(),
                         groups.members(groups.group(i)).end());
      both.insert(groups.members(groups.group(other)).begin(),
                  groups.members(groups.group(other)).end());
      if (operand_count(graph, uses, both) > most_operands || !groups.join({i, other})) continue;
      rows_of(i) = {mine.outer, mine.columns == Dim(1) ? theirs.columns : mine.columns};
    }
  }
}

// --- what prepares an attention

bool places_data(const Node& node) {
  return node.op == Op::rope || node.op == Op::cat || node.op == Op::kv_append;
}

// Walks up from a value through views to the node that places its data; found nodes are the path,
// that node included. Empty if another kind of node computes the value.
Nodes path_to_placement(const Graph& graph, ValueId value) {
  Nodes path;
  for (NodeId id = graph.value(value).producer; id != NodeId::none;) {
    const Node& node = graph.nodes[static_cast<std::size_t>(id)];
    path.push_back(index(id));
    if (places_data(node)) return path;
    if (op_class(node.op) != OpClass::view) return {};
    id = graph.value(node.operands[0]).producer;
  }
  return {};
}

// rope of q, and the appends or cats with the rope that feeds them. Views before the first of
// these nodes stay outside, views between two of them come along.
void join_placements(const Graph& graph, const Node& attention, Groups& groups) {
  Nodes region;
  auto add = [&](Nodes nodes) {
    nodes.insert(nodes.end(), region.begin(), region.end());
    if (!groups.join(nodes)) return false;
    region = std::move(nodes);
    return true;
  };
  for (std::size_t i = attention.operands.size(); i-- > 0;) {
    const Nodes above = path_to_placement(graph, attention.operands[i]);
    if (above.empty() || !add({above.back()})) continue;
    const Node& placement = graph.nodes[static_cast<std::size_t>(above.back())];
    if (placement.op == Op::rope) continue;
    for (ValueId operand : placement.operands) {
      const Nodes further = path_to_placement(graph, operand);
      if (further.empty()) continue;
      const Node& source = graph.nodes[static_cast<std::size_t>(further.back())];
      if (source.op == Op::rope) add(further);
    }
  }
}

// --- the result

bool does_work(const Node& node) {
  return op_class(node.op) != OpClass::view && node.op != Op::constant && node.op != Op::scalar;
}

// The groups in an order that every path follows, otherwise as the nodes were.
std::vector<int> order(const Groups& groups) {
  std::vector<int> waiting_for(static_cast<std::size_t>(groups.count()));
  for (int group = 0; group < groups.count(); ++group) {
    for (int next : groups.followers(group)) ++waiting_for[static_cast<std::size_t>(next)];
  }
  std::priority_queue<int, std::vector<int>, std::greater<>> ready;  // by the first node
  for (int group = 0; group < groups.count(); ++group) {
    if (waiting_for[static_cast<std::size_t>(group)] == 0) ready.push(group);
  }
  std::vector<int> result;
  while (!ready.empty()) {
    const int group = ready.top();
    ready.pop();
    if (!groups.members(group).empty()) result.push_back(group);
    for (int next : groups.followers(group)) {
      if (--waiting_for[static_cast<std::size_t>(next)] == 0) ready.push(next);
    }
  }
  return result;
}

Graph reordered(Graph graph, const Groups& groups) {
  std::vector<Node> nodes;
  int regions = 0;
  for (int group : order(groups)) {
    const Nodes& members = groups.members(group);
    const bool is_region = std::any_of(members.begin(), members.end(), [&](int node) {
      return does_work(graph.nodes[static_cast<std::size_t>(node)]);
    });
    for (int member : members) {
      Node node = std::move(graph.nodes[static_cast<std::size_t>(member)]);
      node.region = is_region ? regions : -1;
      for (ValueId result : node.results) {
        graph.value(result).producer = static_cast<NodeId>(nodes.size());
      }
      nodes.push_back(std::move(node));
    }
    regions += is_region;
  }
  graph.nodes = std::move(nodes);
  return graph;
}

}  // namespace

Graph form_regions(Graph graph, const Target&) {
  Groups groups(graph);
  for (const Node& node : graph.nodes) {
    if (node.op == Op::attention) join_placements(graph, node, groups);
  }
  join_rows(graph, Uses(graph), groups);
  return reordered(std::move(graph), groups);
}

}  // namespace tilewright::graph
