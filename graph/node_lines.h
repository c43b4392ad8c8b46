// The lines that nodes stand on, in the text that print() writes or that parse() read, for errors
// that point at them.
//
// Tested by graph_test, filetests/verify.
#pragma once

#include <string_view>
#include <vector>

#include "graph/graph.h"

namespace tilewright::graph {

struct NodeLines {
  int parameters = 1;      // the header
  std::vector<int> nodes;  // by NodeId
  int outputs = 0;         // the return statement
};

// In print(graph).
NodeLines node_lines(const Graph& graph);

struct ParsedText {
  Graph graph;
  NodeLines lines;
};
// As parse(), and where everything stood.
Result<ParsedText> parse_with_lines(std::string_view text);

// As verify(graph), but the error names these lines.
Status verify(const Graph& graph, const NodeLines& lines);

}  // namespace tilewright::graph
