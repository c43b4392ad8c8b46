// The passes: the meaning of a model before and after each, what each must refuse, and the number
// of regions of a Llama layer. What each pass makes of its input is in tests/filetests/passes, run
// by filetests; near misses are its files *_refuses.graph, which come out as they went in.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "graph/interpret.h"
#include "graph/passes.h"
#include "graph/pipeline.h"
#include "graph/rewrite.h"
#include "tests/captured_llama.h"

namespace tilewright::graph {
namespace {

const Target target = [] {
  Target any;
  any.isa = bit(Isa::avx2);
  return any;
}();

// --- files

TEST(Passes, EachHasFilesAndNearMissesStayAsTheyAre) {
  const std::filesystem::path folder =
      std::filesystem::path(TILEWRIGHT_SOURCE_DIR) / "tests/filetests/passes";
  for (const std::string& pass : pass_names()) {
    SCOPED_TRACE(pass);
    EXPECT_TRUE(std::filesystem::exists(folder / (pass + ".graph")));
    if (pass == "form_regions") continue;  // it changes every graph
    std::ifstream stream(folder / (pass + "_refuses.graph"));
    ASSERT_TRUE(stream.good());
    std::string text, line;
    while (std::getline(stream, line) && !line.starts_with("; after")) text += line + "\n";
    auto graph = parse(text);
    ASSERT_TRUE(graph.ok()) << graph.error().message;
    auto after = run_passes(*graph, {&pass, 1}, target);
    ASSERT_TRUE(after.ok()) << after.error().message;
    EXPECT_EQ(print(*after), print(*graph));
  }
}

// --- meaning

const SymbolValues symbols = {{"b", 2}, {"s", 3}, {"past", 5}};

class Values {
 public:
  explicit Values(unsigned seed) : generator_(seed) {}

  Tensor tensor(DataType type, std::vector<std::int64_t> shape, std::int64_t below) {
    Tensor tensor = Tensor::make(type, std::move(shape)).value();
    std::normal_distribution<double> normal;
    std::uniform_int_distribution<std::int64_t> uniform(0, below - 1);
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      if (is_float(type)) {
        tensor.set(i, normal(generator_));
      } else {
        tensor.set_integer(i, uniform(generator_));
      }
    }
    return tensor;
  }

  std::vector<std::int64_t> sizes(const Shape& shape, const SymbolValues& symbols) {
    std::vector<std::int64_t> sizes;
    for (const Dim& dim : shape) sizes.push_back(dim.evaluate(symbols).value());
    return sizes;
  }

 private:
  std::mt19937 generator_;
};

// Random constants by name, parts of merged ones too.
Constants random_constants(const Graph& graph, Values& values) {
  Constants constants;
  for (const Node& node : graph.nodes) {
    if (node.op != Op::constant) continue;
    const Type& type = graph.type(node.results[0]);
    constants[node.attribute<std::string>("source")] =
        values.tensor(type.dtype, values.sizes(type.shape, {}), 2);
  }
  return constants;
}

std::vector<Argument> random_arguments(const Graph& graph, Values& values) {
  std::vector<Argument> arguments;
  for (ValueId parameter : graph.parameters) {
    const Type& type = graph.type(parameter);
    if (!type.is_cache) {
      arguments.emplace_back(values.tensor(type.dtype, values.sizes(type.shape, symbols), 9));
      continue;
    }
    const std::vector<std::int64_t> contents = {2, symbols.at("b"), type.shape[0].constant(), 3,
                                                type.shape[1].constant()};
    arguments.emplace_back(
        Cache::from_contents(values.tensor(type.dtype, contents, 2), type.dtype).value());
  }
  return arguments;
}

// The outputs, then the contents of the caches.
std::vector<Tensor> meaning(const Graph& graph, std::vector<Argument> arguments,
                            const Constants& constants) {
  auto outputs = interpret(graph, arguments, constants, symbols);
  EXPECT_TRUE(outputs.ok()) << (outputs.ok() ? "" : outputs.error().message);
  std::vector<Tensor> all = outputs.ok() ? *outputs : std::vector<Tensor>();
  for (const Argument& argument : arguments) {
    if (const auto* cache = std::get_if<Cache>(&argument)) all.push_back(cache->contents());
  }
  return all;
}

void expect_equal(const std::vector<Tensor>& actual, const std::vector<Tensor>& expected,
                  double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  ASSERT_FALSE(expected.empty());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(actual[i].shape, expected[i].shape);
    ASSERT_EQ(actual[i].dtype, expected[i].dtype);
    for (std::int64_t j = 0; j < expected[i].count(); ++j) {
      const double want = expected[i].get(j);
      ASSERT_LE(std::abs(actual[i].get(j) - want), tolerance * std::max(1.0, std::abs(want)))
          << "output " << i << " element " << j;
    }
  }
}

class Meaning : public testing::TestWithParam<Capture> {};

// The interpreter rounds once per node, so f32 results differ by fp32 rounding only.
TEST_P(Meaning, IsTheSameAfterEachPass) {
  Llama shape;
  shape.capture = GetParam();
  const Graph before = CapturedLlama(shape).build();
  ASSERT_TRUE(verify(before).ok()) << verify(before).error().message;
  Values values(7);
  const Constants constants = random_constants(before, values);
  const auto arguments = random_arguments(before, values);
  const auto expected = meaning(before, arguments, constants);
  std::set<std::string> changed;
  std::string text = print(before);
  auto after = optimize(before, target, -1, [&](std::string_view pass, const Graph& graph) {
    SCOPED_TRACE(std::string(pass));
    ASSERT_TRUE(verify(graph).ok()) << verify(graph).error().message << print(graph);
    if (print(graph) != text) changed.insert(std::string(pass));
    text = print(graph);
    expect_equal(meaning(graph, arguments, constants), expected, 1e-4);
  });
  ASSERT_TRUE(after.ok());
  EXPECT_TRUE(parse(text).ok());
  // These have nothing to do for Llama as sdpa writes it.
  const std::set<std::string> idle = {"match_attention", "match_alibi", "match_cached_attention"};
  for (const std::string& pass : pass_names()) {
    EXPECT_NE(changed.contains(pass), idle.contains(pass)) << pass;
  }
}

Tensor widened(const Tensor& tensor) {
  if (!is_float(tensor.dtype)) return tensor;
  Tensor wide = Tensor::make(DataType::f32, tensor.shape).value();
  for (std::int64_t i = 0; i < tensor.count(); ++i) wide.set(i, tensor.get(i));
  return wide;
}

double squared_error(const std::vector<Tensor>& actual, const std::vector<Tensor>& truth) {
  EXPECT_EQ(actual.size(), truth.size());
  double sum = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    EXPECT_EQ(actual[i].shape, truth[i].shape);
    for (std::int64_t j = 0; j < truth[i].count(); ++j) {
      sum += std::pow(actual[i].get(j) - truth[i].get(j), 2);
    }
  }
  return sum;
}

// Fused ops round to 16 bits less often. The truth is the f32 model of the same values.
TEST_P(Meaning, In16BitsIsNoLessAccurate) {
  Llama shape;
  shape.capture = GetParam();
  const Graph model = CapturedLlama(shape).build();
  shape.dtype = DataType::bf16;
  const Graph before = CapturedLlama(shape).build();
  const auto after = optimize(before, target);
  ASSERT_TRUE(after.ok());
  // The mean over many inputs of how much worse: single ones go either way.
  constexpr unsigned inputs = 32;
  double logarithms = 0;
  for (unsigned seed = 0; seed < inputs; ++seed) {
    Values values(seed);
    const Constants constants = random_constants(before, values);
    const auto arguments = random_arguments(before, values);
    Constants wide_constants;
    for (const auto& [name, tensor] : constants) wide_constants[name] = widened(tensor);
    std::vector<Argument> wide_arguments;
    for (const Argument& argument : arguments) {
      const auto* cache = std::get_if<Cache>(&argument);
      if (cache == nullptr) {
        wide_arguments.emplace_back(widened(std::get<Tensor>(argument)));
      } else {
        const Tensor contents = widened(cache->contents());
        wide_arguments.emplace_back(Cache::from_contents(contents, contents.dtype).value());
      }
    }
    const auto truth = meaning(model, wide_arguments, wide_constants);
    const double error_before = squared_error(meaning(before, arguments, constants), truth);
    const double error_after = squared_error(meaning(*after, arguments, constants), truth);
    ASSERT_GT(error_before, 0);
    logarithms += std::log(error_after / error_before);
  }
  EXPECT_LE(logarithms / inputs, 0);
}

INSTANTIATE_TEST_SUITE_P(Captures, Meaning,
                         testing::Values(Capture::prefill, Capture::decode, Capture::in_cache));

// --- regions

std::vector<std::vector<Op>> regions(const Graph& graph) {
  std::vector<std::vector<Op>> result;
  for (const Node& node : graph.nodes) {
    if (node.region < 0) continue;
    if (static_cast<int>(result.size()) <= node.region) {
      result.resize(static_cast<std::size_t>(node.region) + 1);
    }
    if (op_class(node.op) != OpClass::view) {
      result[static_cast<std::size_t>(node.region)].push_back(node.op);
    }
  }
  return result;
}

class Regions : public testing::TestWithParam<Capture> {};

// The real shape: SmolLM2-135M.
TEST_P(Regions, EightForEachLlamaLayer) {
  for (DataType type : {DataType::f32, DataType::bf16}) {
    for (int layers : {2, 30}) {
      Llama shape{GetParam(), layers, 576, 9, 3, 64, 1536, 49152, type};
      auto graph = optimize(CapturedLlama(shape).build(), target);
      ASSERT_TRUE(graph.ok()) << graph.error().message;
      const auto all = regions(*graph);
      // embedding, rotary table, layers, norm, head
      ASSERT_EQ(all.size(), static_cast<std::size_t>(8 * layers + 4)) << print(*graph);
      const std::size_t first = 2 + 8 * static_cast<std::size_t>(layers - 1);
      EXPECT_EQ(all[first], std::vector{Op::rms_norm});
      EXPECT_EQ(all[first + 1], std::vector{Op::linear});
      EXPECT_EQ(std::count(all[first + 2].begin(), all[first + 2].end(), Op::rope), 2);
      EXPECT_EQ(all[first + 3], std::vector{Op::attention});
      EXPECT_EQ(all[first + 4], std::vector{Op::linear});
      EXPECT_EQ(all[first + 5], std::vector{Op::rms_norm});
      EXPECT_EQ(all[first + 6], std::vector{Op::gated_mlp_up});
      EXPECT_EQ(all[first + 7], std::vector{Op::linear});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Captures, Regions,
                         testing::Values(Capture::prefill, Capture::decode, Capture::in_cache));

// --- the pipeline itself

TEST(Pipeline, LimitRunsTheFirstPasses) {
  std::vector<std::string> ran;
  auto graph = optimize(CapturedLlama({}).build(), target, 3,
                        [&](std::string_view pass, const Graph&) { ran.emplace_back(pass); });
  ASSERT_TRUE(graph.ok());
  const auto names = pass_names();
  EXPECT_EQ(ran, std::vector<std::string>(names.begin(), names.begin() + 3));
}

TEST(Pipeline, RefusesUnknownPass) {
  const std::vector<std::string> names = {"canonicalize", "make_it_fast"};
  auto graph = run_passes(Graph(), names, target);
  ASSERT_FALSE(graph.ok());
  EXPECT_NE(graph.error().message.find("make_it_fast"), std::string::npos);
}

TEST(Pipeline, RunsTwiceToTheSameResult) {
  for (Capture capture : {Capture::prefill, Capture::decode, Capture::in_cache}) {
    Llama shape;
    shape.capture = capture;
    auto once = optimize(CapturedLlama(shape).build(), target);
    ASSERT_TRUE(once.ok());
    auto twice = optimize(*once, target);
    ASSERT_TRUE(twice.ok());
    EXPECT_EQ(print(*once), print(*twice));
  }
}

}  // namespace
}  // namespace tilewright::graph
