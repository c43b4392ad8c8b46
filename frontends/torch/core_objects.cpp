// See core_objects.h. Tested by tests/python/test_backend.py.
#include "frontends/torch/core_objects.h"

#include <fmt/format.h>

namespace tilewright {

graph::DataType data_type(const std::string& name) {
  auto found = graph::data_type(name);
  if (!found) throw CoreError(fmt::format("unknown element type '{}'", name));
  return *found;
}

std::map<std::string, ops::TensorView> views_of(
    const std::map<std::string, TypedAddress>& constants) {
  std::map<std::string, ops::TensorView> views;
  for (const auto& [name, constant] : constants) {
    const auto& [address, dtype, shape] = constant;
    views[name] = {pointer(address), data_type(dtype), shape};
  }
  return views;
}

std::vector<graph::DataType> input_types(const ops::Program& program) {
  std::vector<graph::DataType> types;
  const graph::Graph& graph = program.graph();
  for (graph::ValueId id : graph.parameters) {
    if (!graph.type(id).is_cache) types.push_back(graph.type(id).dtype);
  }
  return types;
}

Status run_locked(HostedProgram& program, ops::RunArguments arguments) {
  arguments.host = program.host ? &program.host : nullptr;
  if (!program.checked) return program.run(arguments);
  ops::RegionCheck region_check(program, program.constants);
  const ops::StepObserver observer = [&](std::size_t at, const ops::Frame& frame) {
    region_check.observe(at, frame);
  };
  arguments.observer = &observer;
  const Status done = program.run(arguments);
  const auto& results = region_check.results();
  program.check_results.insert(program.check_results.end(), results.begin(), results.end());
  return done;
}

Result<HeldCaches> hold(std::span<const std::int64_t> handles) {
  HeldCaches held;
  for (std::int64_t handle : handles) {
    held.holders.push_back(Cache::handles.find(handle));
    if (!held.holders.back()) return Error{"a cache of this step is gone"};
    held.caches.push_back(held.holders.back().get());
  }
  return held;
}

}  // namespace tilewright
