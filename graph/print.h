// The line of print(graph) that each node stands on, for errors that point at it.
//
// Tested by filetests/verify.
#pragma once

#include <vector>

#include "graph/graph.h"

namespace tilewright::graph {

struct NodeLines {
  static constexpr int parameters = 1;
  std::vector<int> nodes;  // by NodeId
  int outputs = 0;         // the return statement
};
NodeLines node_lines(const Graph& graph);

}  // namespace tilewright::graph
