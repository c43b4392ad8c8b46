// The engine for Python: compilation, plans, kernels, and what it counts and decided.
//
// Compiling releases the interpreter lock; callbacks take it again. Tested by
// tests/python/test_backend.py, test_plans.py, test_prewarm.py.
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "frontends/torch/binding_cache.h"
#include "frontends/torch/bindings.h"
#include "frontends/torch/core_objects.h"
#include "jit/base/target.h"
#include "ops/engine.h"
#include "ops/kernel_library.h"
#include "ops/machine_profile.h"
#include "ops/weights.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

using ops::Engine;

// packed: called with the name of a constant whose own memory is not needed any more, or None.
std::shared_ptr<Program> compile(const Engine& engine, const std::string& text,
                                 const std::map<std::string, TypedAddress>& constants,
                                 std::shared_ptr<ops::WeightStore> weights,
                                 const nb::object& packed, bool optimized, bool keep_weights,
                                 bool in_place) {
  nb::gil_scoped_release unlocked;
  const auto call = [&packed](const std::string& name) {
    nb::gil_scoped_acquire locked;
    try {
      packed(name);
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("a weight that was packed");  // it keeps its memory
    }
  };
  return Program::make(value_or_throw(
      engine.compile(text, views_of(constants), std::move(weights),
                     packed.is_none() ? ops::PackedCallback() : ops::PackedCallback(call),
                     optimized, keep_weights, in_place)));
}

// admission(key, name) -> whether to emit a kernel that the cache lacks. If it raises, the kernel
// is left out.
void admit(Engine& engine, const nb::object& admission) {
  engine.kernels()->admit([admission](const ops::Kernel& kernel) {
    nb::gil_scoped_acquire locked;
    try {
      return nb::cast<bool>(admission(kernel.key, kernel.name));
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("the admission of a kernel");
      return false;
    }
  });
}

nb::dict kernel_counters(const Engine& engine) {
  const ops::KernelCounters kernels = engine.kernels()->counters();
  nb::dict result;
  result["emitted"] = kernels.emitted;
  result["loaded"] = kernels.loaded;
  result["code_bytes"] = kernels.code_bytes;
  result["emit_seconds"] = kernels.emit_seconds;
  result["load_seconds"] = kernels.load_seconds;
  result["check_failures"] = kernels.check_failures;
  return result;
}

nb::dict weight_counters(const Engine& engine) {
  const ops::WeightCounters weights = engine.kept_weights()->counters();
  const cache::WeightCounters files = engine.kept_weights()->directory().counters();
  nb::dict result;
  result["packed"] = weights.packed;
  result["mapped"] = weights.mapped;
  result["written"] = files.writes;
  result["write_failures"] = files.write_failures;
  result["write_problem"] = files.write_problem;
  result["rejects"] = files.rejects;
  result["hash_seconds"] = weights.hash_seconds;
  result["map_seconds"] = weights.map_seconds;
  result["pack_seconds"] = weights.pack_seconds;
  result["write_seconds"] = weights.write_seconds;
  return result;
}

nb::list weight_files(const Engine& engine, bool checked) {
  nb::list result;
  for (const cache::WeightListing& weight : engine.kept_weights()->directory().list(checked)) {
    nb::dict row;
    row["file"] = weight.file;
    row["key"] = weight.key_text;
    row["form"] = weight.form;
    row["bytes"] = weight.bytes;
    row["modified"] = weight.modified;
    row["current"] = weight.current;
    row["problem"] = weight.problem;
    result.append(row);
  }
  return result;
}

nb::dict target_fields(const Target& target) {
  nb::dict result;
  result["isa"] = isa_mask_name(target.isa);
  result["vendor"] = target.cpu.vendor;
  result["model_name"] = target.model_name;
  result["family"] = target.cpu.family;
  result["model"] = target.cpu.model;
  result["stepping"] = target.cpu.stepping;
  result["cores"] = target.cores;
  result["lanes"] = target.lanes();
  result["l1d_bytes"] = target.l1d_bytes;
  result["l2_bytes"] = target.l2_bytes;
  return result;
}

// Values as JSON text.
nb::dict choice_fields(const Engine& engine) {
  const ops::Decision& decision = engine.decision();
  nb::list values;
  for (const ops::ChoiceRow& choice : ops::rows(decision.choices)) {
    nb::dict row;
    row["name"] = std::string(choice.name);
    row["value"] = choice.value;
    row["documentation"] = std::string(choice.documentation);
    values.append(row);
  }
  nb::dict result;
  result["source"] = decision.source;
  result["problem"] = decision.problem;
  result["cpu"] = print(engine.target().cpu);
  result["values"] = values;
  return result;
}

}  // namespace

void bind_engine(nb::module_& module) {
  nb::class_<Engine>(module, "Engine", "Target, cache on disk and kernels of one process.")
      .def(nb::new_([](const std::string& rung, const std::string& choices) {
             return value_or_throw(Engine::open(rung, choices));
           }),
           "rung"_a = "", "choices"_a = "")
      .def(
          "optimize",
          [](const Engine& self, const std::string& text) {
            return value_or_throw(self.optimize(text));
          },
          "text"_a)
      .def("compile", &compile, "text"_a, "constants"_a, "weights"_a, "packed"_a = nb::none(),
           "optimized"_a = false, "keep_weights"_a = false, "in_place"_a = false)
      .def("keeps_plans", [](const Engine& self) { return self.store().can_load(); })
      .def("plan_key", &Engine::plan_key, "model"_a)
      .def("load_plan", &Engine::load_plan, "key"_a)
      .def("save_plan", &Engine::save_plan, "key"_a, "name"_a, "plan"_a)
      .def(
          "remove_plan", [](Engine& self, const std::string& key) { self.store().remove(key); },
          "key"_a)
      .def("kernel_counters", &kernel_counters)
      .def("admit", &admit)
      .def("kernel_keys",
           [](const Engine& self) {
             std::vector<std::string> keys;
             for (const ops::Kernel& kernel : self.kernels()->kernels()) keys.push_back(kernel.key);
             return keys;
           })
      .def("weight_counters", &weight_counters)
      .def("weight_files", &weight_files, "checked"_a)
      .def("keeps_weights", [](const Engine& self) { return self.kept_weights()->any(); })
      .def_prop_ro("problem", [](const Engine& self) { return self.problem(); })
      .def("cache_state", &cache_state)
      .def("choices", &choice_fields)
      .def("target", [](const Engine& self) { return target_fields(self.target()); });
}

}  // namespace tilewright
