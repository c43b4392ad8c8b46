// The pipeline: the order of the passes, written once, and ways to run all or some of them.
//
// Thread-safe. Tested by passes_test.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/graph.h"
#include "jit/base/result.h"
#include "jit/base/target.h"

namespace tilewright::graph {

// In pipeline order; a pass is named as its file.
std::vector<std::string> pass_names();

// Runs passes by name, in the given order. Error: an unknown name.
Result<Graph> run_passes(Graph graph, std::span<const std::string> names, const Target& target);

// Runs the pipeline, or its first pass_limit passes if that is >= 0 (to find the pass that breaks
// a model). dump sees the graph after each pass. Debug builds verify after each pass.
Result<Graph> optimize(Graph graph, const Target& target, int pass_limit = -1,
                       std::function<void(std::string_view pass, const Graph&)> dump = {});

}  // namespace tilewright::graph
