// The order of the passes (see pipeline.h). Tested by passes_test.
#include "graph/pipeline.h"

#include <utility>

#include "graph/passes.h"

namespace tilewright::graph {

constexpr std::pair<const char*, Graph (*)(Graph, const Target&)> pipeline[] = {
    {"canonicalize", canonicalize},
    {"fold_constants", fold_constants},
    {"match_rms_norm", match_rms_norm},
    {"match_rope", match_rope},
    {"match_attention", match_attention},
    {"match_alibi", match_alibi},
    {"match_cached_attention", match_cached_attention},
    {"match_gated_mlp", match_gated_mlp},
    {"merge_projections", merge_projections},
    {"fuse_residual", fuse_residual},
    {"form_regions", form_regions},
};

std::vector<std::string> pass_names() {
  std::vector<std::string> names;
  for (const auto& [name, pass] : pipeline) names.emplace_back(name);
  return names;
}

Result<Graph> run_passes(Graph graph, std::span<const std::string> names, const Target& target) {
  for (const std::string& wanted : names) {
    bool found = false;
    for (const auto& [name, pass] : pipeline) {
      if (name != wanted) continue;
      found = true;
      graph = pass(std::move(graph), target);
    }
    if (!found) return Error{"no pass is named \"" + wanted + "\""};
#ifndef NDEBUG
    if (Status status = verify(graph); !status.ok()) {
      return Error{"after " + wanted + ": " + status.error().message};
    }
#endif
  }
  return graph;
}

Result<Graph> optimize(Graph graph, const Target& target, int pass_limit,
                       std::function<void(std::string_view pass, const Graph&)> dump) {
  for (const std::string& name : pass_names()) {
    if (pass_limit-- == 0) break;
    auto result = run_passes(std::move(graph), {&name, 1}, target);
    if (!result.ok()) return result;
    graph = std::move(*result);
    if (dump) dump(name, graph);
  }
  return graph;
}

}  // namespace tilewright::graph
