// Many rows of x are packed by all threads together: what one of them reads, another wrote, and the
// next layer packs over it. Layers of several chunks must have the same bits with any team.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ops/engine.h"
#include "ops/scalar_type.h"
#include "ops/weights.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

constexpr std::int64_t kWidth = 320;  // ten panels, two and a half stretches of k
constexpr int kLayers = 4, kTimes = 5;

std::vector<char> drawn(DataType type, std::int64_t count, double scale) {
  static std::mt19937 random(7);
  std::normal_distribution<double> normal;
  std::vector<char> values(static_cast<std::size_t>(count * size_in_bytes(type)));
  for (std::int64_t i = 0; i < count; ++i) {
    write_scalar(type, values.data() + i * size_in_bytes(type), scale * normal(random));
  }
  return values;
}

// %x -> linear -> linear ..., of one type.
std::string chain(DataType type) {
  const auto name = graph::name(type);
  std::string text = fmt::format("graph g(%x: {0}[s, {1}]) -> ({0}[s, {1}]) {{\n", name, kWidth);
  for (int i = 0; i < kLayers; ++i) {
    text += fmt::format("  %w{0} = const \"w{0}\" : {1}[{2}, {2}]\n", i, name, kWidth);
    text +=
        fmt::format("  %y{} = linear(%{}, %w{})\n", i, i == 0 ? "x" : fmt::format("y{}", i - 1), i);
  }
  return text + fmt::format("  return %y{}\n}}\n", kLayers - 1);
}

class SharedPacking : public ::testing::TestWithParam<DataType> {};

TEST_P(SharedPacking, AnyTeamGivesTheSameBits) {
  const DataType type = GetParam();
  // Chunks of a few blocks, so that there are several.
  Result<Engine> engine = Engine::open("", R"({"most_chunk_rows": 60, "fewest_chunk_rows": 24})");
  ASSERT_TRUE(engine.ok()) << engine.error().message;
  std::vector<std::vector<char>> weights;
  std::map<std::string, TensorView> constants;
  for (int i = 0; i < kLayers; ++i) {
    weights.push_back(drawn(type, kWidth * kWidth, 0.05));
    constants[fmt::format("w{}", i)] = {weights.back().data(), type, {kWidth, kWidth}};
  }
  Result<Program> program =
      engine->compile(chain(type), constants, std::make_shared<WeightStore>());
  ASSERT_TRUE(program.ok()) << program.error().message;
  for (std::int64_t rows : {47, 48, 53, 130, 181}) {
    std::vector<char> x = drawn(type, rows * kWidth, 1), y(x.size());
    const auto run = [&](int threads) {
      std::fill(y.begin(), y.end(), 0);
      const std::vector<TensorView> inputs{{x.data(), type, {rows, kWidth}}};
      const std::vector<TensorView> outputs{{y.data(), type, {rows, kWidth}}};
      RunArguments arguments;
      arguments.inputs = inputs;
      arguments.outputs = outputs;
      arguments.threads = threads;
      const Status done = program->run(arguments);
      EXPECT_TRUE(done.ok()) << done.error().message;
      return y;
    };
    const std::vector<char> wanted = run(1);
    for (int threads : {2, 3, 11}) {  // 11: one has no panel, but packs
      for (int i = 0; i < kTimes; ++i) {
        ASSERT_EQ(run(threads), wanted) << rows << " rows, " << threads << " threads";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, SharedPacking,
                         ::testing::Values(DataType::f32, DataType::bf16, DataType::f16),
                         [](const auto& test) { return std::string(graph::name(test.param)); });

}  // namespace
}  // namespace tilewright::ops
