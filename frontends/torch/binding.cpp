// tilewright._core: the core for Python. No torch header here: tensors cross as addresses and
// shapes, so that one build serves every torch. Programs run through torch's operators
// (operators.cpp), which reach step() below.
//
// Calls that compile or run release the interpreter lock; a host callback takes it again. An error
// of the core becomes tilewright._core.CoreError. Objects are as thread-safe as what they wrap: the
// Python side holds one lock per program.
//
// Tested by tests/python/test_backend.py.
#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/set.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "frontends/torch/binding_cache.h"
#include "frontends/torch/binding_snapshot.h"
#include "frontends/torch/core_error.h"
#include "frontends/torch/handles.h"
#include "frontends/torch/step_call.h"
#include "graph/graph.h"
#include "jit/base/env.h"
#include "jit/base/log.h"
#include "jit/base/target.h"
#include "jit/code_memory.h"
#include "ops/clean_pages.h"
#include "ops/engine.h"
#include "ops/greedy_search.h"
#include "ops/kernel_library.h"
#include "ops/kv_cache.h"
#include "ops/machine_profile.h"
#include "ops/onednn_fallback.h"
#include "ops/program.h"
#include "ops/prompt_lookup.h"
#include "ops/read_bandwidth.h"
#include "ops/region_check.h"
#include "ops/threads.h"
#include "ops/weights.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewright {
namespace {

using Address = std::uintptr_t;
using Tokens = std::vector<std::int64_t>;
using Shape = std::vector<std::int64_t>;
using Tokens = std::vector<std::int64_t>;
using TypedAddress = std::tuple<Address, std::string, Shape>;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

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

TypedAddress typed(const ops::TensorView& view) {
  return {reinterpret_cast<Address>(view.data), std::string(graph::name(view.dtype)), view.shape};
}

// Samples of some memory, to notice writes that leave no other trace. A sample is one word of every
// 1/16th of a range: reading all of a model would cost a tenth of a second for each prefill.
class Fingerprint {
 public:
  explicit Fingerprint(std::vector<std::pair<Address, std::int64_t>> ranges)
      : ranges_(std::move(ranges)) {}

  std::uint64_t value() const {
    constexpr std::int64_t samples = 16;
    std::uint64_t hash = 14695981039346656037ull;  // FNV-1a, by words
    for (const auto& [address, bytes] : ranges_) {
      const std::int64_t words = bytes / 8;
      for (std::int64_t i = 0; i < std::min(samples, words); ++i) {
        std::uint64_t word;
        const std::int64_t index = words <= samples ? i : i * (words - 1) / (samples - 1);
        std::memcpy(&word, reinterpret_cast<const char*>(address) + 8 * index, 8);
        hash = (hash ^ word) * 1099511628211ull;
      }
    }
    return hash;
  }

 private:
  std::vector<std::pair<Address, std::int64_t>> ranges_;
};

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

using ops::Engine;

// The keys and values of a model's layers, in pages of memory that somebody else owns.
class PagedCaches {
 public:
  // layers: addresses of the first token of keys and values.
  PagedCaches(const std::vector<std::pair<Address, Address>>& layers, std::int64_t page_tokens,
              std::int64_t memory_tokens, std::int64_t kv_heads, std::int64_t head_dim,
              const std::string& dtype)
      : page_tokens_(page_tokens), memory_tokens_(memory_tokens) {
    for (const auto& [keys, values] : layers) {
      const ops::KvCache::Pages pages{static_cast<char*>(pointer(keys)),
                                      static_cast<char*>(pointer(values)), page_tokens};
      layers_.push_back(Cache::make(pages, kv_heads, head_dim, data_type(dtype)));
    }
  }

  // sequences: rows, tokens before, and where the pages begin, in tokens.
  using Sequence = std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>>;
  void begin_step(const std::vector<Sequence>& sequences) {
    std::vector<ops::RaggedRows::Sequence> given;
    for (const auto& [rows, length, pages] : sequences) given.push_back({0, rows, length, pages});
    const auto rows =
        value_or_throw(ops::RaggedRows::make(std::move(given), page_tokens_, memory_tokens_));
    for (const auto& layer : layers_) layer->begin_step(rows);
  }

  const std::vector<std::shared_ptr<Cache>>& layers() const { return layers_; }

 private:
  std::int64_t page_tokens_, memory_tokens_;
  std::vector<std::shared_ptr<Cache>> layers_;
};

// packed: called with the name of a constant whose own memory is not needed any more, or None.
std::shared_ptr<Program> compile(const Engine& engine, const std::string& text,
                                 const std::map<std::string, TypedAddress>& constants,
                                 std::shared_ptr<ops::WeightStore> weights,
                                 const nb::object& packed, bool optimized, bool keep_weights) {
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
                     optimized, keep_weights)));
}

// sources: addresses and bytes.
void hash_ahead(ops::WeightStore& store, const Engine& engine,
                const std::vector<std::pair<Address, std::size_t>>& sources) {
  std::vector<ops::SourceHashes::Block> blocks;
  for (const auto& [address, bytes] : sources) {
    blocks.emplace_back(static_cast<const std::byte*>(pointer(address)), bytes);
  }
  store.hash_ahead(std::move(blocks), *engine.kept_weights());
}

// Drops pages beside Python; the owners of the memory live until that is done.
class PageDropper {
 public:
  // memory: addresses, bytes, and whether it is freed next.
  void drop(const std::vector<std::tuple<Address, std::size_t, bool>>& memory, nb::object owners) {
    wait();
    std::vector<ops::UnneededMemory> unneeded;
    for (const auto& [address, bytes, is_free] : memory) {
      unneeded.push_back({{static_cast<const std::byte*>(pointer(address)), bytes}, is_free});
    }
    owners_ = std::move(owners);
    dropper_.drop(std::move(unneeded));
  }
  void wait() {
    {
      const nb::gil_scoped_release unlocked;
      dropper_.wait();
    }
    owners_.reset();
  }

 private:
  nb::object owners_;
  ops::PageDropper dropper_;  // goes first
};

std::vector<graph::DataType> input_types(const ops::Program& program) {
  std::vector<graph::DataType> types;
  const graph::Graph& graph = program.graph();
  for (graph::ValueId id : graph.parameters) {
    if (!graph.type(id).is_cache) types.push_back(graph.type(id).dtype);
  }
  return types;
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

// Caches that live while this does.
struct HeldCaches {
  std::vector<std::shared_ptr<Cache>> holders;
  std::vector<ops::KvCache*> caches;
};

Result<HeldCaches> hold(std::span<const std::int64_t> handles) {
  HeldCaches held;
  for (std::int64_t handle : handles) {
    held.holders.push_back(Cache::handles.find(handle));
    if (!held.holders.back()) return Error{"a cache of this step is gone"};
    held.caches.push_back(held.holders.back().get());
  }
  return held;
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
  arguments.host = program.host ? &program.host : nullptr;
  arguments.phase = call.decode ? ops::Phase::decode : ops::Phase::prefill;
  arguments.threads = static_cast<int>(call.threads);
  std::lock_guard lock(program.running);
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

// Steps of decode after tokens [sequences] at positions: see ops/greedy_search.h. By handles, as
// step(). Raises where a step alone would say why.
Tokens greedy_search(Program& program, const Tokens& tokens, const Tokens& positions,
                     const std::vector<std::int64_t>& caches, const Tokens& end_tokens,
                     const std::vector<bool>& finished, std::int64_t pad, std::int64_t most_tokens,
                     double seconds, int threads, ops::PromptLookup* lookup) {
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

void bind_cache(nb::module_& module) {
  nb::class_<Cache>(module, "KvCache", "Keys and values of one layer, in blocks.")
      .def(nb::new_([](std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim,
                       const std::string& dtype) {
        return Cache::make(batch, kv_heads, head_dim, data_type(dtype));
      }))
      .def_ro("handle", &Cache::handle)
      .def_prop_ro("batch", [](const Cache& self) { return self.batch(); })
      .def_prop_ro("kv_heads", [](const Cache& self) { return self.kv_heads(); })
      .def_prop_ro("head_dim", [](const Cache& self) { return self.head_dim(); })
      .def_prop_ro("length", [](const Cache& self) { return self.length(); })
      .def_prop_ro("bytes", [](const Cache& self) { return self.bytes(); })
      .def("set_first_keys",
           [](Cache& self, const std::vector<std::int64_t>& keys) {
             check(self.set_first_keys(keys));
           })
      .def("truncate", [](Cache& self, std::int64_t length) { self.truncate(length); })
      .def_prop_ro("dtype", [](const Cache& self) { return std::string(name(self.dtype())); })
      .def("read",
           [](const Cache& self, const std::string& dtype, Address keys, Address values) {
             self.read(self.length(), data_type(dtype), pointer(keys), pointer(values));
           })
      .def("append",
           [](Cache& self, std::int64_t tokens, const std::string& dtype, Address keys,
              Address values) {
             check(self.append(tokens, data_type(dtype), pointer(keys), pointer(values)));
           })
      .def("write",
           [](Cache& self, std::int64_t tokens, const std::string& dtype, Address keys,
              Address values) {
             check(self.write(tokens, data_type(dtype), pointer(keys), pointer(values)));
           })
      .def("reorder", [](Cache& self, const std::vector<std::int64_t>& indices) {
        check(self.reorder(indices));
      });
  nb::class_<PagedCaches>(module, "PagedCaches", "Of a model's layers, in pages of another's.")
      .def(nb::init<const std::vector<std::pair<Address, Address>>&, std::int64_t, std::int64_t,
                    std::int64_t, std::int64_t, const std::string&>(),
           "layers"_a, "page_tokens"_a, "memory_tokens"_a, "kv_heads"_a, "head_dim"_a, "dtype"_a)
      .def_prop_ro("layers", &PagedCaches::layers)
      .def("begin_step", &PagedCaches::begin_step);
}

void bind_program(nb::module_& module) {
  nb::class_<Fingerprint>(module, "Fingerprint", "A hash of samples of memory.")
      .def(nb::init<std::vector<std::pair<Address, std::int64_t>>>())
      .def("value", &Fingerprint::value);
  nb::class_<ops::PromptLookup>(module, "PromptLookup", "Guesses from a text's own past.")
      .def(nb::init<std::int64_t, std::int64_t>(), "most_guesses"_a, "most_matched"_a)
      .def("set_text", &ops::PromptLookup::set_text, "tokens"_a);
  nb::class_<ops::WeightStore>(module, "WeightStore", nb::is_weak_referenceable(),
                               "Packed weights that programs share.")
      .def(nb::init<>())
      .def(
          "__init__",
          [](ops::WeightStore* self, const std::string& fits, bool twelve_bits) {
            new (self) ops::WeightStore(ops::AssumedValues{data_type(fits), twelve_bits});
          },
          "fits"_a, "twelve_bits"_a)
      .def("forget", [](ops::WeightStore& self, Address source) { self.forget(pointer(source)); })
      .def("release",
           [](ops::WeightStore& self, Address source) {
             return reinterpret_cast<Address>(self.release(pointer(source)));
           })
      .def("unpack",
           [](const ops::WeightStore& self, Address token, Address to) {
             nb::gil_scoped_release unlocked;
             check(self.unpack(pointer(token), pointer(to)));
           })
      .def("reserve", &ops::WeightStore::reserve)
      .def("hash_ahead", &hash_ahead)
      .def("settle", &ops::WeightStore::settle, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("bytes", &ops::WeightStore::bytes);
  nb::class_<Program>(module, "Program", "What runs: steps of kernels and host calls.")
      .def_ro("handle", &Program::handle)
      .def_prop_ro("parameters", &parameters)
      .def_prop_ro("packed_sources", [](const Program& self) { return self.packed_sources(); })
      .def_prop_ro("text", [](const Program& self) { return graph::print(self.graph()); })
      .def("set_host",
           [](Program& self, const nb::object& host) { self.host = host_function(host); })
      .def("greedy_search", &greedy_search, "tokens"_a, "positions"_a, "caches"_a, "end_tokens"_a,
           "finished"_a, "pad"_a, "most_tokens"_a, "seconds"_a, "threads"_a,
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
           "optimized"_a = false, "keep_weights"_a = false)
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

}  // namespace
}  // namespace tilewright

NB_MODULE(_core, module) {
  using namespace tilewright;
  module.doc() = "Tilewright's core: graphs in, programs out.";
  nb::exception<CoreError>(module, "CoreError", PyExc_RuntimeError);
  bind_cache(module);
  bind_program(module);
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
  nb::class_<PageDropper>(module, "PageDropper")
      .def(nb::init<>())
      .def("drop", &PageDropper::drop, "memory"_a, "owners"_a)
      .def("wait", &PageDropper::wait);
  module.def("load_onednn", [](const std::string& path) { check(ops::load_onednn(path)); });
}
