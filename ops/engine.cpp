// See engine.h. Tested by tests/torchscript_test.cpp and tests/python/test_explain.py.
#include "ops/engine.h"

#include <fmt/format.h>

#include <atomic>
#include <utility>

#include "graph/pipeline.h"
#include "jit/base/env.h"
#include "jit/base/fork_static.h"
#include "jit/base/log.h"
#include "ops/compile.h"
#include "ops/gemm/arithmetic.h"
#include "ops/machine_profile.h"

namespace tilewright::ops {

constexpr int kPlanFormat = 3;

namespace {

std::vector<ConfiguredPack> open_packs() {
  std::vector<ConfiguredPack> found;
  for (const std::string& name : cache::split_pack_names(environment().cache_pack)) {
    ConfiguredPack& item = found.emplace_back();
    item.name = name;
    Result<cache::Pack> pack = cache::open_pack(name);
    if (!pack) {
      item.problem = pack.error().message;
    } else if (pack->generator() != cache::generator_hash()) {
      item.problem = fmt::format(
          "{}: made by another build; make it again with tilewright prewarm --pack", name);
    } else {
      item.pack = std::make_shared<const cache::Pack>(std::move(*pack));
    }
  }
  return found;
}

}  // namespace

const std::vector<ConfiguredPack>& configured_packs() {
  static constinit ForkStatic<const std::vector<ConfiguredPack>> opened;
  static constinit std::atomic<bool> told{false};
  const std::vector<ConfiguredPack>& packs = opened.get(open_packs);
  if (told.exchange(true)) return packs;
  for (const ConfiguredPack& item : packs) {
    if (!item.pack) log_warning(fmt::format("TILEWRIGHT_CACHE_PACK is not used: {}", item.problem));
  }
  return packs;
}

Result<Engine> Engine::open(const std::string& rung, const std::string& choices) {
  const std::string& cap = environment().max_cpu_isa;
  Result<Target> target = !rung.empty() ? Target::for_rung(rung)
                          : cap.empty() ? Result<Target>(Target::host())
                                        : Target::host().capped(cap);
  if (!target) return target.error();
  Decision decision = rung.empty() && choices.empty()
                          ? decide(*target, environment().machine_profile)
                          : choices_for(target->cpu, target->isa);
  if (!decision.problem.empty()) log_warning(decision.problem);
  if (!choices.empty()) {
    Result<Choices> given = changed(std::move(decision.choices), choices);
    if (!given) return given.error();
    decision = {std::move(given.value()), "given " + choices, ""};
  }
  // A rung that was asked for is what the code is for.
  if (rung.empty()) target = target->capped(decision.choices.highest_isa);
  return Engine(std::move(target.value()), std::move(decision), choices.empty());
}

namespace {

Choices with_settings(Choices choices) {
  const Environment& settings = environment();
  if (settings.weights == WeightMode::compact) {
    choices.twelve_bits_from = 0;
  } else if (settings.weights != WeightMode::automatic) {
    choices.twelve_bits_from = CompileOptions::kNever;
  }
  if (settings.fp32 != Fp32Mode::automatic) {
    choices.fp32_products = settings.fp32 == Fp32Mode::amx ? most_fp32_products : 0;
  }
  return choices;
}

}  // namespace

Engine::Engine(Target target, Decision decision, bool on_disk)
    : target_(target.for_code()), decision_(std::move(decision)) {
  if (!target_.has(Isa::avx2)) {
    problem_ = "this CPU has no AVX2 and FMA";
  } else if (Status memory = jit::CodeMemory::probe(); !memory) {
    problem_ = memory.error().message;
  }
  const Environment& settings = environment();
  const cache::Mode mode = settings.cache == CacheMode::off || !on_disk ? cache::Mode::off
                           : settings.cache == CacheMode::read_only     ? cache::Mode::read_only
                                                                        : cache::Mode::read_write;
  const std::string directory = cache::default_directory(settings.cache_dir);
  store_ =
      std::make_shared<cache::Store>(cache::Store::open(directory, mode, settings.cache_max_bytes));
  for (const ConfiguredPack& item : configured_packs()) {
    if (on_disk && item.pack != nullptr)
      (void)store_->add_pack(item.pack);  // of this build, as was checked
  }
  kernels_ = std::make_shared<KernelLibrary>(target_, store_, settings.cache_check);
  using Policy = KeptWeights::Policy;
  const Policy policy = settings.cache_weights == CacheWeights::off  ? Policy::off
                        : settings.cache_weights == CacheWeights::on ? Policy::on
                                                                     : Policy::automatic;
  kept_weights_ = std::make_shared<KeptWeights>(
      cache::WeightDirectory::open(directory, mode, settings.cache_max_bytes), policy,
      settings.cache_check);
}

Result<std::string> Engine::optimize(const std::string& text) const {
  Result<graph::Graph> graph = after_passes(text);
  if (!graph) return graph.error();
  return graph::print(*graph);
}

Result<Program> Engine::compile(const std::string& text,
                                const std::map<std::string, TensorView>& constants,
                                std::shared_ptr<WeightStore> weights, const PackedCallback& packed,
                                bool optimized, bool keep_weights, bool in_place) const {
  if (!problem_.empty()) return Error{problem_};
  Result<graph::Graph> graph = optimized ? parsed(text) : after_passes(text);
  if (!graph) return graph.error();
  const Environment& settings = environment();
  CompileOptions options;
  options.disabled.insert(settings.disable.names.begin(), settings.disable.names.end());
  options.exact_weights = settings.weights != WeightMode::plain;
  options.kept_weights = kept_weights_;
  options.keep_weights = keep_weights;
  options.in_place = in_place;
  options.profile = settings.profile;
  options.fallback_onednn = settings.fallback == Fallback::onednn;
  // Prewarm for a rung, which has no weights: only the kernels of these programs are wanted.
  for (const Choices& choices : decision_.others) {
    options.choices = with_settings(choices);
    Result<Program> program = ops::compile(*graph, constants, target_, options, kernels_, weights);
    if (!program) return program;
    if (const Status made = program->prepare(); !made) return made.error();
  }
  options.choices = with_settings(decision_.choices);
  return ops::compile(*graph, constants, target_, options, kernels_, std::move(weights), packed);
}

std::string Engine::plan_key(std::string_view model) const {
  return fmt::format("plan {}\npasses {} limit {}\n{}", kPlanFormat, cache::passes_hash(),
                     environment().pass_limit, model);
}

std::optional<std::string> Engine::load_plan(std::string_view key) const {
  std::optional<cache::Entry> entry = store_->load(key, target_.isa);
  if (!entry) return std::nullopt;
  Result<std::string> plan = entry->recipe.text();
  if (plan) return std::move(*plan);
  store_->remove(key);  // else its key would be stuck
  return std::nullopt;
}

void Engine::save_plan(const std::string& key, const std::string& name,
                       const std::string& plan) const {
  store_->save({key, name, 0, {}, cache::Recipe(plan)});
}

Result<graph::Graph> Engine::parsed(const std::string& text) {
  Result<graph::Graph> graph = graph::parse(text);
  if (!graph) return graph;
  if (const Status valid = graph::verify(*graph); !valid) return valid.error();
  return graph;
}

Result<graph::Graph> Engine::after_passes(const std::string& text) const {
  Result<graph::Graph> graph = parsed(text);
  if (!graph) return graph;
  return graph::optimize(std::move(graph.value()), target_, environment().pass_limit);
}

}  // namespace tilewright::ops
