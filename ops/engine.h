// Engine: what every program of a process shares: the machine, the kernel cache on disk, the
// kernels in memory, and the way from graph text to a Program with the settings of the environment
// (jit/base/env.h). The front ends (Python, LibTorch) each hold one.
//
// Thread-safe but for assignment. Tested by tests/torchscript_test.cpp and
// tests/python/test_explain.py.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache/store.h"
#include "graph/graph.h"
#include "jit/base/result.h"
#include "jit/base/target.h"
#include "ops/choices.h"
#include "ops/kept_weights.h"
#include "ops/kernel_library.h"
#include "ops/program.h"
#include "ops/tensor_view.h"
#include "ops/weights.h"

namespace tilewright::ops {

// One of TILEWRIGHT_CACHE_PACK.
struct ConfiguredPack {
  std::string name;
  std::shared_ptr<const cache::Pack> pack;  // null if it was refused
  std::string problem;                      // why it was
};
// Read at the first call, once per process; each refusal is one warning.
const std::vector<ConfiguredPack>& configured_packs();

class Engine {
 public:
  // An empty rung: this host, capped by TILEWRIGHT_MAX_CPU_ISA. Otherwise exactly that rung, to
  // fill the cache for another machine, with the choices for unknown CPUs. choices: a JSON object
  // of those to change from the shipped ones, to measure them; such an engine has no cache on disk.
  // Error: no such rung or choice.
  static Result<Engine> open(const std::string& rung, const std::string& choices = "");

  // Why nothing can be compiled here, "" if it can: a CPU below AVX2, or a system that refuses
  // executable memory. The front ends then run everything by their fallback.
  const std::string& problem() const { return problem_; }
  const Target& target() const { return target_; }
  const Decision& decision() const { return decision_; }
  const cache::Store& store() const { return *store_; }
  cache::Store& store() { return *store_; }
  const std::shared_ptr<KernelLibrary>& kernels() const { return kernels_; }
  const std::shared_ptr<KeptWeights>& kept_weights() const { return kept_weights_; }

  // Text to text: parse, check, run the passes.
  Result<std::string> optimize(const std::string& text) const;

  // constants, packed: see compile() in compile.h. optimized: the passes have run already.
  // keep_weights: on disk, as far as the environment allows. in_place: it will run once. Error:
  // also problem(), before anything is packed.
  Result<Program> compile(const std::string& text,
                          const std::map<std::string, TensorView>& constants,
                          std::shared_ptr<WeightStore> weights, const PackedCallback& packed = {},
                          bool optimized = false, bool keep_weights = false,
                          bool in_place = false) const;

  // Plans: what a front end made of a model, kept for later processes (cache/README.md). The key
  // says what the passes depend on, which is no Target so far, and what the front end says of the
  // model.
  std::string plan_key(std::string_view model) const;
  std::optional<std::string> load_plan(std::string_view key) const;
  void save_plan(const std::string& key, const std::string& name, const std::string& plan) const;

 private:
  Engine(Target target, Decision decision, bool on_disk);
  static Result<graph::Graph> parsed(const std::string& text);
  Result<graph::Graph> after_passes(const std::string& text) const;

  Target target_;
  Decision decision_;
  std::string problem_;
  std::shared_ptr<cache::Store> store_;
  std::shared_ptr<KernelLibrary> kernels_;
  std::shared_ptr<KeptWeights> kept_weights_;
};

}  // namespace tilewright::ops
