// The order of the passes (see pipeline.h).
// Tested by passes_test.
#include "graph/pipeline.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "graph/passes.h"

namespace tilewright::graph {

namespace {

struct Pass {
  const char* name;
  Graph (*run)(Graph, const Target&);
};

constexpr Pass pipeline[] = {
    {"canonicalize", canonicalize},           {"fold_constants", fold_constants},
    {"match_rms_norm", match_rms_norm},       {"match_rope", match_rope},
    {"match_attention", match_attention},     {"match_gated_mlp", match_gated_mlp},
    {"merge_projections", merge_projections}, {"fuse_residual", fuse_residual},
    {"form_regions", form_regions},
};

Result<Graph> run(const Pass& pass, Graph graph, const Target& target) {
  graph = pass.run(std::move(graph), target);
#ifndef NDEBUG
  if (Status status = verify(graph); !status.ok()) {
    return Error{std::string("after ") + pass.name + ": " + status.error().message};
  }
#endif
  return graph;
}

}  // namespace

std::vector<std::string> pass_names() {
  std::vector<std::string> names;
  for (const Pass& pass : pipeline) names.emplace_back(pass.name);
  return names;
}

Result<Graph> run_passes(Graph graph, std::span<const std::string> names, const Target& target) {
  for (const std::string& name : names) {
    const Pass* pass = std::find_if(std::begin(pipeline), std::end(pipeline),
                                    [&](const Pass& candidate) { return candidate.name == name; });
    if (pass == std::end(pipeline)) return Error{"no pass is named \"" + name + "\""};
    auto result = run(*pass, std::move(graph), target);
    if (!result.ok()) return result;
    graph = std::move(*result);
  }
  return graph;
}

Result<Graph> optimize(Graph graph, const Target& target, int pass_limit,
                       std::function<void(std::string_view pass, const Graph&)> dump) {
  auto names = pass_names();
  if (pass_limit >= 0 && static_cast<std::size_t>(pass_limit) < names.size()) {
    names.resize(static_cast<std::size_t>(pass_limit));
  }
  for (const std::string& name : names) {
    auto result = run_passes(std::move(graph), {&name, 1}, target);
    if (!result.ok()) return result;
    graph = std::move(*result);
    if (dump) dump(name, graph);
  }
  return graph;
}

}  // namespace tilewright::graph
