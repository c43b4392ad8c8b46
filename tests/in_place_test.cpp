// Tests of programs that read weights where their sources lie (Program::reads_in_place): the bits
// of packed weights in every form, nothing packed, and where that cannot be.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "ops/scalar_type.h"
#include "tests/program_model.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

CompileOptions in_place_options() {
  CompileOptions options;
  options.choices.twelve_bits_from = 0;  // of packed weights: the form that is least like a source
  options.choices.streams_row = 2;       // of a row: reads two panels side by side, if it may
  options.in_place = true;
  return options;
}

void round_constants(Model& model) {
  for (auto& [name, tensor] : model.constants) {
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      tensor.set(i, rounded_to(DataType::bf16, tensor.get(i)));
    }
  }
}

struct Values {
  DataType dtype;
  bool fit_bf16;
};

class InPlace : public testing::TestWithParam<Values> {};

// A prompt of several blocks of rows, steps of each number of rows that has a kernel of its own.
TEST_P(InPlace, HasTheBitsOfPackedWeights) {
  const DataType dtype = GetParam().dtype;
  const LlamaShape shape = shape_for(dtype);
  Model model(llama_graph(shape, true, std::string(graph::name(dtype))), dtype);
  if (GetParam().fit_bf16) round_constants(model);
  std::vector<Tensor> wanted;
  for (const bool in_place : {true, false}) {
    CompileOptions options = in_place_options();
    options.in_place = in_place;
    Program program = model.compile(options);
    EXPECT_EQ(program.reads_in_place(), in_place);
    EXPECT_EQ(program.packed_sources().empty(), in_place);
    EXPECT_EQ(model.weights->bytes() == 0, in_place);
    EXPECT_EQ(fallbacks(program), "");
    std::uint64_t weight_bytes = 0;
    for (const RegionReport& region : program.regions()) {
      const bool says_so = region.kernel.find(" in place") != std::string::npos;
      EXPECT_EQ(says_so, in_place && region.weight_bytes > 0) << region.kernel;
      weight_bytes += region.weight_bytes;
    }
    EXPECT_GT(weight_bytes, 0u);
    const std::vector<Tensor> results =
        logits_of_steps(program, shape, dtype, {270, 1, 2, 3, 4, 6, 11, 24}, in_place ? 3 : 2);
    if (wanted.empty()) wanted = results;
    for (std::size_t i = 0; i < results.size(); ++i) {
      EXPECT_EQ(results[i].bytes, wanted[i].bytes) << "call " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Values, InPlace,
                         testing::Values(Values{DataType::f32, false}, Values{DataType::f32, true},
                                         Values{DataType::bf16, false},
                                         Values{DataType::bf16, true},
                                         Values{DataType::f16, false}),
                         [](const auto& info) {
                           return std::string(graph::name(info.param.dtype)) +
                                  (info.param.fit_bf16 ? "_that_fits" : "");
                         });

// k = 33: the last pair of a 16-bit weight is half; n = 70: the last panel is not full.
TEST(InPlaceWeights, AreTiedAndTransposedOnes) {
  for (const DataType dtype : {DataType::f32, DataType::bf16, DataType::f16}) {
    const std::string text = fmt::format(R"(graph f(%i: i64[s]) -> ({0}[s, 70], {0}[s, 50]) {{
  %w = constant {{source = "w"}} : {0}[70, 33]
  %t = constant {{source = "t"}} : {0}[33, 50]
  %b = constant {{source = "b"}} : {0}[50]
  %rows = embedding(%w, %i)
  %y = linear(%rows, %w)
  %z = linear(%rows, %t, %b) {{bias = true, transposed = true}}
  return %y, %z
}}
)",
                                         graph::name(dtype));
    Model model({text, {{"w", {70, 33}}, {"t", {33, 50}}, {"b", {50}}}}, dtype);
    Program in_place = model.compile(in_place_options());
    EXPECT_TRUE(in_place.reads_in_place());
    EXPECT_EQ(fallbacks(in_place), "");
    Program packed = model.compile();
    for (const std::int64_t rows : {1, 7, 40}) {
      std::vector<Tensor> inputs{integers({rows}, [](std::int64_t i) { return (31 * i) % 70; })};
      const std::vector<Tensor> results = run(in_place, inputs, {}, 2);
      const std::vector<Tensor> wanted = run(packed, inputs, {}, 2);
      for (std::size_t i = 0; i < wanted.size(); ++i) {
        EXPECT_EQ(results[i].bytes, wanted[i].bytes) << graph::name(dtype) << ", " << rows;
      }
    }
  }
}

TEST(InPlaceWeights, AreNotThoseThatArePackedAlready) {
  Model model(llama_graph(LlamaShape(), true), DataType::f32);
  const Program packed = model.compile();
  EXPECT_FALSE(model.compile(in_place_options()).reads_in_place());
  // Nor those whose memory was given back: their values are in the packed ones only.
  for (const std::string& name : packed.packed_sources()) {
    const void* token = model.weights->release(model.views.at(name).data);
    ASSERT_NE(token, nullptr) << name;
    model.views.at(name).data = const_cast<void*>(token);
  }
  const Program of_tokens = model.compile(in_place_options());
  EXPECT_FALSE(of_tokens.reads_in_place());
  EXPECT_EQ(fallbacks(of_tokens), "");
}

TEST(InPlaceWeights, AreNotExperts) {
  const LlamaText text{
      "graph f(%x: f32[s, 40], %i: i64[s, 2]) -> (f32[2*s, 64]) {\n"
      "  %w = const \"w\" : f32[3, 64, 40]\n"
      "  %y = expert_linear(%x, %w, %i)\n"
      "  return %y\n"
      "}\n",
      {{"w", {3, 64, 40}}}};
  Model model(text, DataType::f32);
  const Program program = model.compile(in_place_options());
  EXPECT_FALSE(program.reads_in_place());
  EXPECT_EQ(fallbacks(program), "");
  EXPECT_GT(model.weights->bytes(), 0);
}

// With tiles, fp32 weights that fit bf16 are multiplied by other instructions than others are.
TEST(InPlaceWeights, AreNotThoseWhoseFormDecidesTheBits) {
  const auto reads_in_place = [](DataType dtype, std::int64_t products, bool exact) {
    Model model(llama_graph(shape_for(dtype), true, std::string(graph::name(dtype))), dtype);
    const Target target = *Target::for_rung("amx_bf16");
    CompileOptions options = in_place_options();
    options.choices.fp32_products = products;
    options.exact_weights = exact;
    auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
    auto program = ops::compile(model.optimized, model.views, target, options,
                                std::make_shared<KernelLibrary>(target, store), model.weights);
    EXPECT_TRUE(program.ok()) << program.error().message;
    return program->reads_in_place();
  };
  EXPECT_TRUE(reads_in_place(DataType::bf16, 6, true));
  EXPECT_TRUE(reads_in_place(DataType::f32, 0, true));
  EXPECT_FALSE(reads_in_place(DataType::f32, 3, true));
  EXPECT_FALSE(reads_in_place(DataType::f32, 6, true)) << "three products or six";
  EXPECT_TRUE(reads_in_place(DataType::f32, 3, false)) << "stored as they are in any case";
  EXPECT_FALSE(reads_in_place(DataType::f32, 6, false)) << "tiles must know their range";
}

}  // namespace
}  // namespace tilewright::ops
