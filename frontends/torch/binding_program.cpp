// Programs for Python: their runs by handles (step_call.h), their search, checks and reports.
//
// Runs release the interpreter lock; a host callback takes it again. Tested by
// tests/python/test_backend.py, test_operators.py, test_compare.py.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "frontends/torch/bindings.h"
#include "frontends/torch/core_objects.h"
#include "frontends/torch/step_call.h"
#include "ops/prompt_lookup.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

using Tokens = std::vector<std::int64_t>;

TypedAddress typed(const ops::TensorView& view) {
  return {reinterpret_cast<Address>(view.data), std::string(graph::name(view.dtype)), view.shape};
}

// host(function, attributes, inputs, outputs) with (address, dtype, shape) each; what it raises
// ends the run with that message.
ops::HostFunction host_function(const nb::object& host) {
  // The last user of a program may be a thread without the interpreter lock.
  const auto release = [](nb::object* callable) {
    nb::gil_scoped_acquire locked;
    delete callable;
  };
  const std::shared_ptr<nb::object> callable(new nb::object(host), release);
  return [callable](const ops::HostCall& call) -> Status {
    nb::gil_scoped_acquire locked;
    try {
      std::vector<TypedAddress> inputs, outputs;
      for (const ops::TensorView& view : call.inputs) inputs.push_back(typed(view));
      for (const ops::TensorView& view : call.outputs) outputs.push_back(typed(view));
      (*callable)(call.function, call.attributes, inputs, outputs);
      return {};
    } catch (nb::python_error& error) {
      return Error{fmt::format("{}: {}", call.function, error.what())};
    }
  };
}

Status run(Program& program, const StepCall& call) {
  const std::vector<graph::DataType> types = input_types(program);
  if (types.size() != static_cast<std::size_t>(call.input_count)) {
    return Error{fmt::format("{} tensors given, {} expected", call.input_count, types.size())};
  }
  std::vector<ops::TensorView> inputs, outputs;
  for (std::size_t i = 0; i < types.size(); ++i) {
    const StepTensor& tensor = call.inputs[i];
    inputs.push_back({tensor.data, types[i], Shape(tensor.sizes, tensor.sizes + tensor.rank)});
  }
  const Result<HeldCaches> held =
      hold(std::span(call.caches, static_cast<std::size_t>(call.cache_count)));
  if (!held) return held.error();
  const Result<std::vector<Shape>> shapes = program.output_shapes(inputs);
  if (!shapes) return shapes.error();
  const graph::Graph& graph = program.graph();
  for (std::size_t i = 0; i < shapes->size(); ++i) {
    const graph::DataType type = graph.type(graph.outputs[i]).dtype;
    const Shape& shape = (*shapes)[i];
    // The names are literals, so they end in a zero.
    void* data = call.allocate(call.context, static_cast<std::int64_t>(i), graph::name(type).data(),
                               shape.data(), static_cast<std::int64_t>(shape.size()));
    outputs.push_back({data, type, shape});
  }
  ops::RunArguments arguments;
  arguments.inputs = inputs;
  arguments.caches = held->caches;
  arguments.outputs = outputs;
  arguments.phase = call.decode ? ops::Phase::decode : ops::Phase::prefill;
  arguments.threads = static_cast<int>(call.threads);
  std::lock_guard lock(program.running);
  return run_locked(program, arguments);
}

// Steps of decode after tokens [sequences] at positions: see ops/greedy_search.h. By handles, as
// step(). Raises where a step alone would say why.
Tokens greedy_search(Program& program, const Tokens& tokens, const Tokens& positions,
                     const std::vector<std::int64_t>& caches, const Tokens& end_tokens,
                     const std::vector<bool>& finished, std::int64_t pad, std::int64_t least_tokens,
                     std::int64_t most_tokens, double seconds, int threads,
                     ops::PromptLookup* lookup) {
  nb::gil_scoped_release unlocked;
  const Result<HeldCaches> held = hold(caches);
  if (!held) throw CoreError(held.error().message);
  const std::unique_ptr<bool[]> flags(new bool[finished.size()]);
  std::ranges::copy(finished, flags.get());
  std::lock_guard lock(program.running);
  if (program.checked) throw CoreError("each step is being checked");
  if (!program.search) program.search = value_or_throw(ops::GreedySearch::make(program));
  return value_or_throw(program.search->run(
      {.tokens = tokens,
       .positions = positions,
       .caches = held->caches,
       .end_tokens = end_tokens,
       .finished = std::span(flags.get(), finished.size()),
       .pad = pad,
       .least_tokens = least_tokens,
       .most_tokens = most_tokens,
       .budget = std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9)),
       .host = program.host ? &program.host : nullptr,
       .threads = threads,
       .lookup = lookup}));
}

// What operators.cpp calls: see step_call.h.
bool step(const StepCall* call, char* error, std::size_t error_bytes) {
  const std::shared_ptr<Program> program = Program::handles.find(call->program);
  const Status status = program ? run(*program, *call) : Status(Error{"this program is gone"});
  if (!status) fmt::format_to_n(error, error_bytes - 1, "{}", status.error().message);
  return status.ok();
}

nb::dict counters(const ops::PhaseCounters& phase) {
  nb::dict result;
  result["runs"] = phase.runs;
  result["steps"] = phase.steps;
  result["fallback_calls"] = phase.fallback_calls;
  result["onednn_calls"] = phase.onednn_calls;
  result["layers"] = phase.layers;
  result["threads"] = phase.threads;
  result["layer_steps"] = phase.layer_steps;
  result["own_flops"] = phase.own_flops;
  result["fallback_flops"] = phase.fallback_flops;
  result["own_seconds"] = phase.own_seconds;
  result["fallback_seconds"] = phase.fallback_seconds;
  result["between_seconds"] = phase.between_seconds;
  result["around_seconds"] = phase.around_seconds;
  return result;
}

nb::dict report(const Program& program) {
  nb::list regions;
  for (const ops::RegionReport& region : program.regions()) {
    nb::dict row;
    row["name"] = region.name;
    row["kernel"] = region.kernel;
    row["fallback"] = region.fallback;
    row["reason"] = region.reason;
    row["isa"] = region.isa;
    row["flops"] = region.flops;
    row["weight_bytes"] = region.weight_bytes;
    const auto time = [&](ops::Phase phase) {
      const ops::RegionTime& spent = region.time[static_cast<std::size_t>(phase)];
      return nb::make_tuple(spent.seconds, spent.bytes);
    };
    row["prefill"] = time(ops::Phase::prefill);
    row["decode"] = time(ops::Phase::decode);
    regions.append(row);
  }
  nb::dict result;
  result["regions"] = regions;
  result["prefill"] = counters(program.counters(ops::Phase::prefill));
  result["decode"] = counters(program.counters(ops::Phase::decode));
  result["layers"] = program.layer_count();
  result["arena_bytes"] = program.arena_bytes();
  return result;
}

// Every later run is checked region by region against these constants, until end_check.
void begin_check(Program& program, const std::map<std::string, TypedAddress>& constants) {
  nb::gil_scoped_release unlocked;  // a running step may wait for the lock
  std::lock_guard lock(program.running);
  program.checked = true;
  program.constants = views_of(constants);
  program.check_results.clear();
}

nb::list end_check(Program& program) {
  std::vector<ops::RegionResult> results;
  {
    nb::gil_scoped_release unlocked;
    std::lock_guard lock(program.running);
    program.checked = false;
    program.constants.clear();
    results.swap(program.check_results);
  }
  nb::list rows;
  for (const ops::RegionResult& result : results) {
    nb::dict row;
    row["name"] = result.name;
    row["kernel"] = result.kernel;
    row["reason"] = result.reason;
    row["error"] = result.error;
    row["bound"] = result.bound;
    row["graph"] = result.text;
    rows.append(row);
  }
  return rows;
}

std::vector<std::pair<std::string, std::string>> parameters(const Program& program) {
  std::vector<std::pair<std::string, std::string>> result;
  const graph::Graph& graph = program.graph();
  for (graph::ValueId id : graph.parameters) {
    result.emplace_back(graph.value(id).name, graph::print(graph.type(id)));
  }
  return result;
}

}  // namespace

void bind_program(nb::module_& module) {
  nb::class_<ops::PromptLookup>(module, "PromptLookup", "Guesses from a text's own past.")
      .def(nb::init<std::int64_t, std::int64_t>(), "most_guesses"_a, "most_matched"_a)
      .def("set_text", &ops::PromptLookup::set_text, "tokens"_a);
  nb::class_<Program>(module, "Program", "What runs: steps of kernels and host calls.")
      .def_ro("handle", &Program::handle)
      .def_prop_ro("parameters", &parameters)
      .def_prop_ro("packed_sources", [](const Program& self) { return self.packed_sources(); })
      .def_prop_ro("reads_in_place", [](const Program& self) { return self.reads_in_place(); })
      .def_prop_ro("text", [](const Program& self) { return graph::print(self.graph()); })
      .def("set_host",
           [](Program& self, const nb::object& host) { self.host = host_function(host); })
      .def("greedy_search", &greedy_search, "tokens"_a, "positions"_a, "caches"_a, "end_tokens"_a,
           "finished"_a, "pad"_a, "least_tokens"_a, "most_tokens"_a, "seconds"_a, "threads"_a,
           "lookup"_a = nb::none())
      .def_prop_ro("alike_tokens", [](const Program& self) { return self.alike_tokens(); })
      .def("prepare",
           [](Program& self) {
             nb::gil_scoped_release unlocked;
             check(self.prepare());
           })
      .def("begin_check", &begin_check, "constants"_a)
      .def("end_check", &end_check)
      .def("report", &report);
  module.def("step_function", [] { return reinterpret_cast<Address>(&step); });
}

}  // namespace tilewright
