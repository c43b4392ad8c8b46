// tilewright._core: the core for Python. No torch header here: tensors cross as addresses and
// shapes, so that one build serves every torch. Programs run through torch's operators
// (operators.cpp), which reach step() below.
//
// Calls that compile or run release the interpreter lock; a host callback takes it again. An error
// of the core becomes tilewright._core.CoreError. Objects are as thread-safe as what they wrap: the
// Python side holds one lock per program.
//
// Tested by tests/python/test_backend.py.
#include <cstdlib>
#include <string>
#include <utility>

#include "frontends/torch/bindings.h"
#include "frontends/torch/core_error.h"
#include "jit/base/env.h"
#include "jit/base/log.h"
#include "jit/base/target.h"
#include "jit/code_memory.h"
#include "ops/machine_profile.h"
#include "ops/onednn_fallback.h"
#include "ops/read_bandwidth.h"
#include "ops/threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

nb::list variable_rows() {
  nb::list result;
  for (const Variable& variable : variables()) {
    const std::string name = std::string(kVariablePrefix) + std::string(variable.name);
    const char* value = secure_getenv(name.c_str());
    nb::dict row;
    row["name"] = name;
    row["value"] = value == nullptr ? nb::object(nb::none()) : nb::object(nb::str(value));
    row["default"] = std::string(variable.default_value);
    row["values"] = variable.values;
    row["documentation"] = std::string(variable.documentation);
    result.append(row);
  }
  return result;
}

nb::dict thread_limits(int asked) {
  const ops::ThreadLimits limits = ops::thread_limits(asked);
  nb::dict result;
  result["count"] = limits.threads();
  result["decided_by"] = std::string(limits.decided_by());
  result["torch"] = limits.asked;
  result["affinity"] = limits.affinity;
  result["quota"] = limits.quota;
  return result;
}

nb::dict settings() {
  const Environment& set = environment();
  nb::dict result;
  result["disable_all"] = set.disable.all;
  result["disabled"] = set.disable.names;
  result["strict"] = set.strict;
  result["verbose"] = set.verbose;
  result["profile"] = set.profile;
  result["cache_check"] = set.cache_check;
  result["packs_first"] = set.packing == Packing::first;
  result["run_dtype"] = set.run_dtype;
  result["kv_cache"] = set.kv_cache == KvCacheMode::int8 ? "int8" : "auto";
  result["onednn"] = set.fallback == Fallback::onednn;
  result["machine_profile"] = set.machine_profile;
  result["problems"] = set.problems;
  return result;
}

// Messages go to Python's logging. The sink outlives the interpreter's modules, so it is removed
// at exit by the package (atexit), before Python is.
void forward_log(nb::object sink) {
  if (sink.is_none()) {
    set_log_sink({});
    return;
  }
  set_log_sink([sink](LogLevel level, std::string_view message) {
    nb::gil_scoped_acquire locked;
    try {
      sink(static_cast<int>(level), std::string(message));
    } catch (nb::python_error&) {
      // A logger that fails must not end a computation.
    }
  });
}

}  // namespace
}  // namespace tilewright

NB_MODULE(_core, module) {
  using namespace tilewright;
  module.doc() = "Tilewright's core: graphs in, programs out.";
  nb::exception<CoreError>(module, "CoreError", PyExc_RuntimeError);
  bind_kv_cache(module);
  bind_weights(module);
  bind_program(module);
  bind_ready_step(module);
  bind_engine(module);
  bind_cache_files(module);
  bind_snapshot(module);
  module.def("variables", &variable_rows, "The table of environment variables.");
  module.def("settings", &settings, "What the environment variables say.");
  module.def("log_problems", &log_environment_problems);
  module.def("forward_log", &forward_log, "sink"_a.none());
  module.def("thread_count", [](int asked) { return ops::thread_limits(asked).threads(); });
  module.def("thread_limits", &thread_limits);
  module.def("read_bandwidth", [](int threads) {
    nb::gil_scoped_release unlocked;
    return ops::read_bandwidth(threads);
  });
  module.def("executable_memory_problem", [] {
    const Status memory = jit::CodeMemory::probe();
    return memory ? std::string() : memory.error().message;
  });
  module.def("profile_path", &ops::default_profile_path);
  module.def(
      "profile_text",
      [](const std::string& choices, const std::string& measured) {
        return value_or_throw(ops::print_profile(Target::host().cpu, choices, measured));
      },
      "choices"_a, "measured"_a);
  module.def("load_onednn", [](const std::string& path) { check(ops::load_onednn(path)); });
}
