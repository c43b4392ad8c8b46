// What the parts of tilewright._core share: programs and caches as Python holds them, with their
// handles, and tensors as addresses, names of types and shapes.
//
// Tested by tests/python/test_backend.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "frontends/torch/core_error.h"
#include "frontends/torch/handles.h"
#include "graph/graph.h"
#include "ops/greedy_search.h"
#include "ops/kv_cache.h"
#include "ops/program.h"
#include "ops/region_check.h"
#include "ops/tensor_view.h"

namespace tilewright {

using Address = std::uintptr_t;
using Shape = std::vector<std::int64_t>;
using TypedAddress = std::tuple<Address, std::string, Shape>;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

graph::DataType data_type(const std::string& name);  // throws CoreError
std::map<std::string, ops::TensorView> views_of(
    const std::map<std::string, TypedAddress>& constants);

struct HostedProgram : ops::Program {
  explicit HostedProgram(ops::Program program) : ops::Program(std::move(program)) {}

  ops::HostFunction host;
  std::mutex running;                       // one step at a time uses it
  std::optional<ops::GreedySearch> search;  // once it was asked for

  // Of compare(): guarded by `running`.
  bool checked = false;
  std::map<std::string, ops::TensorView> constants;
  std::vector<ops::RegionResult> check_results;  // of all runs since begin_check
};
using Program = Handled<HostedProgram>;
using Cache = Handled<ops::KvCache>;

// Caches that live while this does.
struct HeldCaches {
  std::vector<std::shared_ptr<Cache>> holders;
  std::vector<ops::KvCache*> caches;
};
Result<HeldCaches> hold(std::span<const std::int64_t> handles);

// The types of a program's tensors, in order.
std::vector<graph::DataType> input_types(const ops::Program& program);
// One step; with the program's own host function, and checked while `checked`.
// REQUIRES: the caller holds `running`
Status run_locked(HostedProgram& program, ops::RunArguments arguments);

}  // namespace tilewright
