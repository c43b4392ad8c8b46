// Programs of the AMX rung, run as they are: by the CPU's own AMX, or instruction by instruction
// by amx_emulator. Kernels alone are checked in tile_kernel_test and test_matrix_kernels.py; here
// the runtime around them is too: packed x, chunks of rows, rows out of range, scratch and tiles of
// several threads, and what lies between them in a model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/scalar_type.h"
#include "tests/amx_emulator.h"
#include "tests/program_model.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

class AmxPrograms : public testing::Test {
 protected:
  void SetUp() override {
    target_ = Target::host();
    if (!target_.has(Isa::avx512_bf16)) GTEST_SKIP() << "needs AVX-512 with bf16";
    has_amx_ = target_.has(Isa::amx_bf16);
    target_.isa |= bit(Isa::amx_bf16);
    EXPECT_FALSE(AmxEmulator::has_tiles());
  }
  void TearDown() override { EXPECT_FALSE(AmxEmulator::has_tiles()); }

  // A kernel of this name exists, and since the last time there were AMX instructions.
  void expect_tiles(const Model& model, const char* kernel) {
    const std::vector<Kernel> kernels = model.kernels->kernels();
    EXPECT_TRUE(std::ranges::any_of(kernels, [&](const Kernel& k) { return k.name == kernel; }))
        << kernel;
    if (!has_amx_) {
      EXPECT_GT(AmxEmulator::instructions(), begin_);
    }
    begin_ = AmxEmulator::instructions();
  }

  Target target_;
  bool has_amx_ = false;
  AmxEmulator emulator_;
  std::uint64_t begin_ = AmxEmulator::instructions();
};

// Longer than a piece of k, and with no dimension that fills tiles.
LlamaShape large_shape() {
  LlamaShape shape;
  shape.hidden = 520;
  shape.head_dim = 64;
  shape.intermediate = 100;
  return shape;
}

// Weights of a size that keeps activations of such a shape near 1, and, for three products, of
// values that bf16 has.
void scale_weights(Model& model, bool to_bf16) {
  for (auto& [name, tensor] : model.constants) {
    if (tensor.shape.size() == 1) continue;
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      const double value = tensor.get(i) / 4;
      std::uint16_t bits;
      write_scalar(DataType::bf16, &bits, value);
      tensor.set(i, to_bf16 ? read_scalar(DataType::bf16, &bits) : value);
    }
  }
}

TEST_F(AmxPrograms, OfBf16MatchTheInterpreter) {
  const LlamaShape shape = large_shape();
  Model model(llama_graph(shape, true, "bf16"), DataType::bf16, target_);
  scale_weights(model, true);
  Program program = model.compile();
  expect_matches(model, program, {shape, DataType::bf16, DataType::bf16, 0.3});
  expect_tiles(model, "tilewright_linear_amx_bf16");
}

TEST_F(AmxPrograms, OfFp32InThreeAndSixProductsMatchTheInterpreter) {
  const LlamaShape shape = large_shape();
  for (const std::int64_t products : {3, 6}) {
    SCOPED_TRACE(products);
    Model model(llama_graph(shape, true), DataType::f32, target_);
    scale_weights(model, products == 3);
    CompileOptions options;
    options.choices.fp32_products = products;
    Program program = model.compile(options);
    expect_matches(model, program, {shape, DataType::f32, DataType::f32, tolerance(DataType::f32)});
    expect_tiles(model, "tilewright_linear_amx_fp32");
  }
}

TEST_F(AmxPrograms, HaveTheSameBitsForAnyNumberOfThreads) {
  const LlamaShape shape = large_shape();
  for (const DataType dtype : {DataType::bf16, DataType::f32}) {
    Model model(llama_graph(shape, true, std::string(graph::name(dtype))), dtype, target_);
    CompileOptions options;
    options.choices.fp32_products = 6;
    Program program = model.compile(options);
    std::vector<std::byte> first;
    for (int threads : {1, 3}) {
      const Tensor logits = logits_of_steps(program, shape, dtype, {37, 16}, threads).back();
      if (first.empty()) first = logits.bytes;
      EXPECT_EQ(logits.bytes, first) << threads << " threads, " << graph::name(dtype);
      expect_tiles(model, dtype == DataType::bf16 ? "tilewright_prefill_amx_bf16_attention"
                                                  : "tilewright_linear_amx_fp32");
    }
  }
}

// The parts of an infinity are no numbers: its row is for fused multiply-adds.
TEST_F(AmxPrograms, OfFp32MultiplyRowsOutOfRangeWithoutTiles) {
  const LlamaText linear{
      "graph f(%x: f32[s, 520]) -> (f32[s, 33]) {\n"
      "  %w = const \"w\" : f32[33, 520]\n"
      "  %y = linear(%x, %w)\n"
      "  return %y\n"
      "}\n",
      {{"w", {33, 520}}}};
  Model model(linear, DataType::f32, target_);
  CompileOptions options;
  options.choices.fp32_products = 6;
  Program program = model.compile(options);
  for (const double largest : {1.0, 3e38, std::numeric_limits<double>::infinity()}) {
    SCOPED_TRACE(largest);
    std::vector<Tensor> inputs{random_tensor(DataType::f32, {40, 520}, 5, 1.0)};
    inputs[0].set(17 * 520 + 3, largest);
    std::vector<graph::Argument> arguments{inputs[0]};
    auto expected = graph::interpret(model.source, arguments, model.constants);
    ASSERT_TRUE(expected.ok()) << expected.error().message;
    const Tensor found = run(program, inputs, {}, 2)[0];
    for (std::int64_t i = 0; i < found.count(); ++i) {
      const double wanted = (*expected)[0].get(i);
      if (std::isinf(wanted)) {
        EXPECT_EQ(found.get(i), wanted) << i;
      } else {
        EXPECT_NEAR(found.get(i), wanted, 1e-4 + 1e-6 * std::abs(wanted)) << i;
      }
    }
    if (largest == 1.0) expect_tiles(model, "tilewright_linear_amx_fp32");
  }
  EXPECT_EQ(AmxEmulator::instructions(), begin_);  // since the rows in range
}

}  // namespace
}  // namespace tilewright::ops
