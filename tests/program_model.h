// A graph with random weights, compiled and run: what tests of whole programs share.
//
// Used by program_test, in_place_test, amx_program_test.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "graph/interpret.h"
#include "graph/pipeline.h"
#include "ops/compile.h"
#include "tests/llama_graph.h"

namespace tilewright::ops {

using graph::Tensor;

inline Tensor random_tensor(graph::DataType dtype, std::vector<std::int64_t> shape, unsigned seed,
                            double scale) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Tensor tensor = *Tensor::make(dtype, std::move(shape));
  for (std::int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, normal(generator));
  return tensor;
}

inline Tensor integers(std::vector<std::int64_t> shape,
                       const std::function<std::int64_t(std::int64_t)>& at) {
  Tensor tensor = *Tensor::make(graph::DataType::i64, std::move(shape));
  for (std::int64_t i = 0; i < tensor.count(); ++i) tensor.set_integer(i, at(i));
  return tensor;
}

inline TensorView view(Tensor& tensor) { return {tensor.bytes.data(), tensor.dtype, tensor.shape}; }

inline double largest_difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape, b.shape);
  double largest = 0;
  for (std::int64_t i = 0; i < a.count(); ++i) {
    const double difference = std::abs(a.get(i) - b.get(i));
    if (!(difference <= largest)) largest = difference;  // NaN is the largest
  }
  return largest;
}

struct Model {
  graph::Graph source, optimized;
  graph::Constants constants;
  std::map<std::string, TensorView> views;
  Target target;
  std::shared_ptr<KernelLibrary> kernels;
  std::shared_ptr<WeightStore> weights = std::make_shared<WeightStore>();

  Model(const LlamaText& llama, graph::DataType dtype, Target made_for = Target::host())
      : target(std::move(made_for)) {
    auto parsed = graph::parse(llama.text);
    if (!parsed) ADD_FAILURE() << parsed.error().message << "\n" << llama.text;
    source = *parsed;
    unsigned seed = 1;
    for (const auto& [name, shape] : llama.constants) {
      const bool frequencies = name == "inv_freq";
      Tensor tensor = random_tensor(frequencies ? graph::DataType::f32 : dtype, shape, seed++,
                                    shape.size() == 1 ? 1.0 : 0.2);
      constants.emplace(name, std::move(tensor));
    }
    for (auto& [name, tensor] : constants) views.emplace(name, view(tensor));
    auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
    kernels = std::make_shared<KernelLibrary>(target, store);
    auto result = graph::optimize(source, target);
    if (!result) ADD_FAILURE() << result.error().message;
    optimized = *result;
  }

  Program compile(const CompileOptions& options = {}) {
    auto program = ops::compile(optimized, views, target, options, kernels, weights);
    if (!program) ADD_FAILURE() << program.error().message << "\n" << graph::print(optimized);
    return std::move(*program);
  }
};

inline std::vector<Tensor> run(Program& program, std::vector<Tensor>& inputs,
                               std::vector<KvCache*> caches, int threads,
                               Phase phase = Phase::decode, const HostFunction* host = nullptr) {
  std::vector<TensorView> views;
  for (Tensor& input : inputs) views.push_back(view(input));
  auto shapes = program.output_shapes(views);
  if (!shapes) {
    ADD_FAILURE() << shapes.error().message;
    return {};
  }
  std::vector<Tensor> outputs;
  for (std::size_t i = 0; i < shapes->size(); ++i) {
    outputs.push_back(
        *Tensor::make(program.graph().type(program.graph().outputs[i]).dtype, (*shapes)[i]));
  }
  std::vector<TensorView> output_views;
  for (Tensor& output : outputs) output_views.push_back(view(output));
  const Status done = program.run({views, caches, output_views, host, phase, threads});
  EXPECT_TRUE(done.ok()) << (done.ok() ? "" : done.error().message);
  return outputs;
}

struct TokenStep {
  std::int64_t batch, tokens, past;
  Tensor ids() const {
    return integers({batch, tokens},
                    [this](std::int64_t i) { return (7 * i + 3 * past + 5) % 61; });
  }
  Tensor positions() const {
    return integers({batch, tokens}, [this](std::int64_t i) { return past + i % tokens; });
  }
};

// One for each layer, empty.
struct Caches {
  Caches(const LlamaShape& shape, graph::DataType stored) {
    for (int i = 0; i < shape.layers; ++i) {
      each.emplace_back(1, shape.kv_heads, shape.head_dim, stored);
    }
    for (KvCache& cache : each) pointers.push_back(&cache);
  }
  Caches(const Caches&) = delete;
  Caches& operator=(const Caches&) = delete;

  std::vector<KvCache> each;
  std::vector<KvCache*> pointers;
};

// Steps of so many tokens, one behind the other in caches of their own: their logits.
inline std::vector<Tensor> logits_of_steps(Program& program, const LlamaShape& shape,
                                           graph::DataType stored,
                                           const std::vector<std::int64_t>& steps, int threads) {
  Caches caches(shape, stored);
  std::vector<Tensor> logits;
  std::int64_t past = 0;
  for (const std::int64_t tokens : steps) {
    const TokenStep step{1, tokens, past};
    std::vector<Tensor> inputs{step.ids(), step.positions()};
    logits.push_back(run(program, inputs, caches.pointers, threads)[0]);
    past += tokens;
  }
  return logits;
}

inline double tolerance(graph::DataType dtype) {
  return dtype == graph::DataType::f32 ? 2e-4 : 0.15;
}

// 16-bit caches need whole vectors per head; fp32 takes any head_dim.
inline LlamaShape shape_for(graph::DataType dtype) {
  LlamaShape shape;
  if (dtype != graph::DataType::f32) shape.head_dim = 16;
  return shape;
}

inline std::string fallbacks(const Program& program) {
  std::string text;
  for (const RegionReport& region : program.regions()) {
    if (region.fallback) text += region.name + ": " + region.kernel + ": " + region.reason + "\n";
  }
  return text;
}

// Prefill and decode of two sequences, against the reference interpreter.
struct DecoderCase {
  LlamaShape shape;
  graph::DataType dtype, stored;  // of the model; of the caches' elements
  double allowed;                 // difference of a logit
};

inline void expect_matches(Model& model, Program& program, const DecoderCase& decoder) {
  const LlamaShape& shape = decoder.shape;
  ASSERT_EQ(fallbacks(program), "");
  const std::int64_t batch = 2;
  std::vector<KvCache> caches;
  std::vector<graph::Argument> reference_caches;
  for (int i = 0; i < shape.layers; ++i) {
    caches.emplace_back(batch, shape.kv_heads, shape.head_dim, decoder.stored);
    graph::Cache cache{decoder.stored, batch, shape.kv_heads, shape.head_dim, 0, {}, {}};
    reference_caches.emplace_back(cache);
  }
  std::vector<KvCache*> pointers;
  for (KvCache& cache : caches) pointers.push_back(&cache);
  std::int64_t past = 0;
  for (std::int64_t tokens : {70, 1, 1, 3}) {
    const TokenStep step{batch, tokens, past};
    std::vector<graph::Argument> arguments{step.ids(), step.positions()};
    for (const auto& cache : reference_caches) arguments.push_back(cache);
    auto expected = graph::interpret(model.source, arguments, model.constants);
    ASSERT_TRUE(expected.ok()) << expected.error().message;
    for (std::size_t i = 0; i < reference_caches.size(); ++i)
      reference_caches[i] = arguments[2 + i];
    std::vector<Tensor> inputs{step.ids(), step.positions()};
    std::vector<Tensor> outputs =
        run(program, inputs, pointers, 2, tokens > 1 ? Phase::prefill : Phase::decode);
    ASSERT_EQ(outputs.size(), 1u);
    EXPECT_LT(largest_difference(outputs[0], (*expected)[0]), decoder.allowed);
    past += tokens;
    EXPECT_EQ(caches[0].length(), past);
  }
  const PhaseCounters& decode = program.counters(Phase::decode);
  EXPECT_EQ(decode.runs, 2u);
  EXPECT_EQ(decode.fallback_calls, 0u);
  EXPECT_EQ(decode.layer_steps, 5 * decode.layers) << graph::print(model.optimized);
}

}  // namespace tilewright::ops
