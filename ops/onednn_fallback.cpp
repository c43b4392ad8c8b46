// oneDNN as fallback: the library's one instance, and plans by function, attributes and shapes.
//
// Tested by onednn_test.
#include "ops/onednn_fallback.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "jit/base/fork_mutex.h"
#include "jit/base/fork_static.h"
#include "ops/onednn_library.h"
#include "ops/onednn_plan.h"

namespace tilewright::ops {
namespace {

// Plans of shapes that do not come back (growing sequences) must not pile up.
constexpr std::size_t kMostPlans = 512;

struct Session {
  ForkMutex mutex;  // held while oneDNN runs: its primitives share scratch memory
  std::optional<Result<onednn::Library>> library;
  std::map<std::string, std::unique_ptr<onednn::Plan>, std::less<>> plans;
};

// Leaks on purpose: the library's own statics may be gone before ours at exit.
Session& session() {
  static constinit ForkStatic<Session> instance;
  return instance.get();
}

Status status_of(const Session& current) {
  if (!current.library) return Error{"oneDNN has not been loaded"};
  return *current.library ? Status() : Status(current.library->error());
}

// Small operands that stand for any shape.
std::vector<std::vector<std::int64_t>> example_shapes(std::string_view function,
                                                      std::string_view attributes) {
  const auto json = nlohmann::json::parse(attributes, nullptr, /*allow_exceptions=*/false);
  const auto flag = [&](const char* key) { return json.is_object() && json.value(key, false); };
  std::vector<std::vector<std::int64_t>> shapes{{2, 8}};
  if (function == "linear") {
    shapes.push_back({8, 8});
    if (flag("bias")) shapes.push_back({8});
    if (flag("residual")) shapes.push_back({2, 8});
  }
  if (function == "matmul") shapes.push_back({8, 8});
  if (function == "layer_norm" || function == "rms_norm") shapes.push_back({8});
  return shapes;
}

}  // namespace

Status load_onednn(std::string_view path) {
  Session& current = session();
  const std::lock_guard lock(current.mutex);
  if (!current.library) {
    current.library = onednn::open_library(path);
    if (!*current.library && !path.empty()) {
      if (auto found = onednn::open_library(""); found) current.library = std::move(found);
    }
  }
  return status_of(current);
}

Status onednn_status() {
  Session& current = session();
  const std::lock_guard lock(current.mutex);
  return status_of(current);
}

bool onednn_supports(std::string_view function, std::string_view attributes,
                     graph::DataType dtype) {
  Session& current = session();
  const std::lock_guard lock(current.mutex);
  if (!status_of(current)) return false;
  const onednn::Call call{function, attributes, dtype, example_shapes(function, attributes)};
  return onednn::Plan::make(current.library->value(), call).ok();
}

Status run_onednn(const HostCall& call) {
  Session& current = session();
  const std::lock_guard lock(current.mutex);
  if (Status status = status_of(current); !status) return status;
  if (call.inputs.empty() || call.outputs.size() != 1) {
    return Error{fmt::format("oneDNN: {} with {} outputs", call.function, call.outputs.size())};
  }
  if (element_count(call.outputs[0]) == 0) return {};
  onednn::Call planned{call.function, call.attributes, call.inputs[0].dtype, {}};
  for (const TensorView& input : call.inputs) planned.inputs.push_back(input.shape);
  const std::string key = fmt::format("{} {} {} {}", call.function, call.attributes,
                                      name(planned.dtype), planned.inputs);
  auto found = current.plans.find(key);
  if (found == current.plans.end()) {
    auto plan = onednn::Plan::make(current.library->value(), planned);
    if (!plan) return plan.error();
    if (current.plans.size() >= kMostPlans) current.plans.clear();
    found = current.plans.emplace(key, std::move(plan).value()).first;
  }
  return found->second->execute(call.inputs, call.outputs[0]);
}

}  // namespace tilewright::ops
