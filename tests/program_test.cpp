// Programs against the reference interpreter: whole decoders in both capture kinds, prefill and
// decode, any number of threads, fallbacks, counters, and inputs that do not fit.
#include "ops/program.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>

#include "graph/interpret.h"
#include "ops/compile.h"
#include "ops/scalar_type.h"
#include "tests/program_model.h"

namespace tilewright::ops {
namespace {

using graph::Tensor;

// The kernels that a decoder gets for a CPU that this one need not be; nothing is executed.
// exact: fp32 weights have the values of bf16 ones. All values are multiplied by `scale`.
std::vector<std::string> kernels_for(const char* rung, graph::DataType dtype, bool exact = false,
                                     const CompileOptions& options = {}, double scale = 1,
                                     std::optional<AssumedValues> assumed = {}) {
  LlamaShape shape;
  shape.head_dim = 32;
  Model model(llama_graph(shape, true, std::string(graph::name(dtype))), dtype);
  for (auto& [name, tensor] : model.constants) {
    for (std::int64_t i = 0; i < tensor.count(); ++i) {
      std::uint16_t bits;
      write_scalar(graph::DataType::bf16, &bits, tensor.get(i));
      tensor.set(i, scale * (exact ? read_scalar(graph::DataType::bf16, &bits) : tensor.get(i)));
    }
  }
  const Target target = *Target::for_rung(rung);
  auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
  auto kernels = std::make_shared<KernelLibrary>(target, store);
  auto program = ops::compile(model.optimized, model.views, target, options, kernels,
                              assumed ? std::make_shared<WeightStore>(*assumed) : model.weights);
  if (!program) ADD_FAILURE() << program.error().message;
  const Status prepared = program->prepare();
  EXPECT_TRUE(prepared.ok()) << prepared.error().message;
  std::vector<std::string> names;
  for (const Kernel& kernel : kernels->kernels()) {
    names.push_back(kernel.name);
    if (kernel.name.find("_amx_") != std::string::npos) {
      EXPECT_NE(kernel.required_isa & bit(Isa::amx_bf16), 0u) << kernel.key;
    }
  }
  return names;
}

TEST(Rungs, HaveTheirMatrixKernels) {
  const auto has = [](const std::vector<std::string>& names, const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  const auto bf16 = graph::DataType::bf16, f32 = graph::DataType::f32;
  const auto dots = kernels_for("avx512_bf16", bf16);
  EXPECT_TRUE(has(dots, "tilewright_linear_avx512_bf16"));
  EXPECT_TRUE(has(dots, "tilewright_prefill_avx512_bf16_attention"));
  EXPECT_FALSE(has(dots, "tilewright_linear")) << "all linear layers";
  EXPECT_TRUE(has(kernels_for("avx512_bf16", f32), "tilewright_linear"));
  EXPECT_TRUE(has(kernels_for("amx_bf16", f32), "tilewright_prefill_attention"));
  const auto tiles = kernels_for("amx_bf16", bf16);
  EXPECT_TRUE(has(tiles, "tilewright_linear_amx_bf16"));
  EXPECT_TRUE(has(tiles, "tilewright_tile_pack"));
  EXPECT_TRUE(has(tiles, "tilewright_prefill_amx_bf16_attention"));
  EXPECT_TRUE(has(tiles, "tilewright_linear")) << "for few rows";
  EXPECT_FALSE(has(kernels_for("avx512_fp16", bf16), "tilewright_linear_amx_bf16"));
  const auto splits = [&](std::int64_t products, double scale, bool exact) {
    CompileOptions options;
    options.choices.fp32_products = products;
    return has(kernels_for("amx_bf16", f32, exact, options, scale), "tilewright_linear_amx_fp32");
  };
  EXPECT_FALSE(splits(0, 1, true));
  EXPECT_TRUE(splits(3, 1, true));
  EXPECT_FALSE(splits(3, 1, false)) << "weights that are not exact in bf16";
  EXPECT_TRUE(splits(6, 1, false));
  for (double scale : {1e-30, 1e39, std::nan("")}) {
    EXPECT_FALSE(splits(6, scale, false)) << "weights out of range";
  }
}

// Prewarm has no values: with the same assumptions it makes the kernels that a start will ask for,
// those of tiles included.
TEST(Rungs, PrewarmMakesTheFp32TilesOfAStart) {
  const auto f32 = graph::DataType::f32;
  for (bool exact : {true, false}) {
    const AssumedValues assumed{exact ? graph::DataType::bf16 : f32, false};
    for (std::int64_t products : {0, 3, 6}) {
      CompileOptions options;
      options.choices.fp32_products = products;
      const auto prewarmed = kernels_for("amx_bf16", f32, exact, options, 1, assumed);
      EXPECT_EQ(prewarmed, kernels_for("amx_bf16", f32, exact, options)) << products;
      const bool splits = std::ranges::count(prewarmed, "tilewright_linear_amx_fp32") > 0;
      EXPECT_EQ(splits, products >= (exact ? 3 : 6));
    }
  }
}

class Decoder : public testing::TestWithParam<graph::DataType> {};

void expect_decoder_matches(const DecoderCase& decoder) {
  const std::string dtype(graph::name(decoder.dtype)), stored(graph::name(decoder.stored));
  Model model(llama_graph(decoder.shape, true, dtype, false, stored), decoder.dtype);
  Program program = model.compile();
  expect_matches(model, program, decoder);
}

TEST_P(Decoder, WithCachesMatchesTheInterpreter) {
  expect_decoder_matches({shape_for(GetParam()), GetParam(), GetParam(), tolerance(GetParam())});
}

// Where fp32 rounding decides about one of the integers, it is another one.
TEST_P(Decoder, WithCachesOfEightBitsMatchesTheInterpreter) {
  LlamaShape shape;
  shape.head_dim = 16;
  expect_decoder_matches({shape, GetParam(), graph::DataType::i8, tolerance(GetParam()) + 1e-2});
}

TEST_P(Decoder, WithGrowingTensorsMatchesTheInterpreter) {
  const LlamaShape shape = shape_for(GetParam());
  Model model(llama_graph(shape, false, std::string(graph::name(GetParam()))), GetParam());
  Program program = model.compile();
  ASSERT_EQ(fallbacks(program), "");
  std::vector<Tensor> state;
  for (int i = 0; i < 2 * shape.layers; ++i) {
    state.push_back(random_tensor(GetParam(), {1, shape.kv_heads, 19, shape.head_dim},
                                  50u + static_cast<unsigned>(i), 1.0));
  }
  for (std::int64_t past : {19, 20, 21}) {
    const TokenStep step{1, 1, past};
    std::vector<Tensor> inputs{step.ids(), step.positions()};
    inputs.insert(inputs.end(), state.begin(), state.end());
    std::vector<graph::Argument> arguments(inputs.begin(), inputs.end());
    auto expected = graph::interpret(model.source, arguments, model.constants);
    ASSERT_TRUE(expected.ok()) << expected.error().message;
    std::vector<Tensor> outputs = run(program, inputs, {}, 2);
    ASSERT_EQ(outputs.size(), expected->size());
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      EXPECT_LT(largest_difference(outputs[i], (*expected)[i]), tolerance(GetParam())) << i;
    }
    state.assign(outputs.begin(), outputs.end() - 1);
  }
  const PhaseCounters& decode = program.counters(Phase::decode);
  EXPECT_EQ(decode.fallback_calls, 0u);
  EXPECT_EQ(decode.layer_steps, 5 * decode.layers) << graph::print(model.optimized);
}

INSTANTIATE_TEST_SUITE_P(DataTypes, Decoder,
                         testing::Values(graph::DataType::f32, graph::DataType::bf16,
                                         graph::DataType::f16),
                         [](const auto& info) { return std::string(graph::name(info.param)); });

TEST(Program, BitsAreTheSameForAnyNumberOfThreads) {
  const LlamaShape shape;
  Model model(llama_graph(shape, true), graph::DataType::f32);
  Program program = model.compile();
  std::vector<std::byte> first;
  for (int threads : {1, 2, 3, 5}) {
    const std::vector<Tensor> outputs =
        logits_of_steps(program, shape, graph::DataType::f32, {33}, threads);
    if (first.empty()) first = outputs[0].bytes;
    EXPECT_EQ(outputs[0].bytes, first) << threads << " threads";
  }
}

// What follows from sizes is kept while they stay: not what depends on the lengths of caches (keys
// come to be of two parts here), and not beyond a run of other sizes, though it was refused.
TEST(Program, StepsOfTheSameSizesAreThoseOfANewProgram) {
  const LlamaShape shape;
  Model model(llama_graph(shape, true), graph::DataType::f32);
  Program program = model.compile();
  Caches caches(shape, graph::DataType::f32), others(shape, graph::DataType::f32);
  std::int64_t past = 0;
  for (const std::int64_t tokens : {250, 1, 1, 5, 1, 1}) {
    const TokenStep step{1, tokens, past};
    std::vector<Tensor> inputs{step.ids(), step.positions()};
    Program fresh = model.compile();
    const std::vector<Tensor> wanted = run(fresh, inputs, others.pointers, 2);
    EXPECT_EQ(run(program, inputs, caches.pointers, 2)[0].bytes, wanted[0].bytes) << past;
    for (std::size_t i = 0; i < fresh.regions().size(); ++i) {
      EXPECT_EQ(program.regions()[i].flops, fresh.regions()[i].flops) << past << " region " << i;
    }
    past += tokens;
    if (tokens != 1) continue;
    Tensor ids = TokenStep{1, 3, past}.ids(), positions = TokenStep{1, 4, past}.positions();
    const std::vector<TensorView> bad{view(ids), view(positions)};
    EXPECT_FALSE(program.run({bad, caches.pointers, {}, nullptr, Phase::decode, 2}).ok());
  }
}

TEST(Program, ARunThatFindsNoRoomLeavesTheNextOneUnharmed) {
  Model model({"graph f(%x: f32[s, 4]) -> (f32[s, 4]) {\n"
               "  %w = const \"w\" : f32[4, 4]\n"
               "  %y = linear(%x, %w)\n"
               "  %z = linear(%y, %w)\n"
               "  return %z\n"
               "}\n",
               {{"w", {4, 4}}}},
              graph::DataType::f32);
  Program program = model.compile();
  std::vector<Tensor> inputs{random_tensor(graph::DataType::f32, {3, 4}, 5, 1.0)};
  const std::vector<std::byte> wanted = run(program, inputs, {}, 2)[0].bytes;
  TensorView huge = view(inputs[0]);
  huge.shape[0] = std::int64_t{1} << 46;  // more than addresses reach
  const std::vector<TensorView> views{huge};
  const Status refused = program.run({views, {}, views, nullptr, Phase::decode, 2});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().message.find("out of memory for an arena"), std::string::npos)
      << refused.error().message;
  EXPECT_EQ(run(program, inputs, {}, 2)[0].bytes, wanted);
}

TEST(Program, KernelsThatCouldNotBePreparedAreAskedForAgain) {
  const LlamaText linear{
      "graph f(%x: f32[s, 4]) -> (f32[s, 4]) {\n"
      "  %w = const \"w\" : f32[4, 4]\n"
      "  %y = linear(%x, %w)\n"
      "  return %y\n"
      "}\n",
      {{"w", {4, 4}}}};
  Model model(linear, graph::DataType::f32), sound(linear, graph::DataType::f32);
  Program program = model.compile(), prepared = sound.compile();
  ASSERT_TRUE(prepared.prepare().ok());
  const auto unemittable = [] {
    jit::vir::Function function;
    function.code.emplace_back().src[0].id = 77;  // a register that was never written
    return function;
  };
  const std::size_t asked = model.kernels->kernels().size();
  for (const Kernel& kernel : sound.kernels->kernels()) {
    if (kernel.name != "tilewright_linear") continue;
    model.kernels->request(kernel.key.substr(0, kernel.key.rfind("\nisa ")), unemittable);
  }
  ASSERT_GT(model.kernels->kernels().size(), asked);
  EXPECT_FALSE(program.prepare().ok());
  std::vector<Tensor> inputs{random_tensor(graph::DataType::f32, {3, 4}, 5, 1.0)};
  EXPECT_EQ(run(program, inputs, {}, 2)[0].bytes, run(prepared, inputs, {}, 2)[0].bytes);
}

struct EightBitRun {
  std::vector<std::byte> logits;  // of the last token
  std::vector<float> contents;    // of the caches
  friend bool operator==(const EightBitRun&, const EightBitRun&) = default;
};

EightBitRun run_in_pieces(Program& program, const LlamaShape& shape,
                          const std::vector<std::int64_t>& pieces, int threads) {
  Caches caches(shape, graph::DataType::i8);
  EightBitRun result;
  std::int64_t past = 0;
  for (std::int64_t tokens : pieces) {
    const auto id = [&](std::int64_t i) { return 7 * (past + i) % 61; };
    std::vector<Tensor> inputs{integers({1, tokens}, id), TokenStep{1, tokens, past}.positions()};
    result.logits = run(program, inputs, caches.pointers, threads)[0].bytes;
    past += tokens;
  }
  for (const KvCache& cache : caches.each) {
    const auto half = static_cast<std::size_t>(shape.kv_heads * past * shape.head_dim);
    std::vector<float> values(2 * half);
    cache.read(past, graph::DataType::f32, values.data(), values.data() + half);
    result.contents.insert(result.contents.end(), values.begin(), values.end());
  }
  return result;
}

TEST(Program, EightBitsAreTheSameForAnyThreadsAndPiecesOfAPrompt) {
  LlamaShape shape;
  shape.head_dim = 16;
  Model model(llama_graph(shape, true, "f32", false, "i8"), graph::DataType::f32);
  Program program = model.compile();
  ASSERT_EQ(fallbacks(program), "");
  const EightBitRun wanted = run_in_pieces(program, shape, {90, 1}, 1);
  for (int threads : {1, 2, 3, 5}) {
    EXPECT_EQ(run_in_pieces(program, shape, {90, 1}, threads), wanted) << threads << " threads";
    EXPECT_EQ(run_in_pieces(program, shape, {30, 60, 1}, threads), wanted) << threads;
  }
}

TEST(Program, CachesOfAnotherTypeAreRefused) {
  LlamaShape shape;
  shape.head_dim = 16;
  Model model(llama_graph(shape, true, "f32", false, "i8"), graph::DataType::f32);
  Program program = model.compile();
  const TokenStep step{1, 2, 0};
  Tensor ids = step.ids(), positions = step.positions();
  Tensor logits = *Tensor::make(graph::DataType::f32, {1, 1, shape.vocabulary});
  std::vector<TensorView> inputs{view(ids), view(positions)}, outputs{view(logits)};
  KvCache other(1, shape.kv_heads, shape.head_dim, graph::DataType::f32);
  KvCache* caches[] = {&other, &other};
  const Status refused = program.run({inputs, caches, outputs, nullptr, Phase::decode, 1});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().message.find("of f32, expected 2 x 16 of i8"), std::string::npos)
      << refused.error().message;
}

// Sequences of a ragged step, in pages that lie in disorder.
struct Conversation {
  std::vector<std::int64_t> chunks;  // new tokens, step by step; 0: it waits
  std::int64_t prompt;               // so many first tokens go at once when it is alone
  std::int64_t length = 0;
  std::vector<std::int64_t> pages = {};
  std::vector<KvCache> alone = {};
  std::deque<double> logits = {};  // that it got alone, of the tokens to come
};

Tensor tokens_of(std::int64_t seed, std::int64_t from, std::int64_t count) {
  return integers({1, count}, [=](std::int64_t i) { return (seed * 17 + (from + i) * 7) % 61; });
}

Tensor joined(const std::vector<Tensor>& parts) {
  std::vector<std::int64_t> numbers;
  for (const Tensor& part : parts) {
    for (std::int64_t i = 0; i < part.count(); ++i) {
      numbers.push_back(static_cast<std::int64_t>(part.get(i)));
    }
  }
  return integers({1, static_cast<std::int64_t>(numbers.size())},
                  [&](std::int64_t i) { return numbers[static_cast<std::size_t>(i)]; });
}

class Ragged : public testing::TestWithParam<graph::DataType> {};

TEST_P(Ragged, EachSequenceGetsTheBitsThatItGetsAlone) {
  LlamaShape shape;
  if (GetParam() != graph::DataType::f32) shape.head_dim = 16;
  Model model(llama_graph(shape, true, std::string(graph::name(GetParam())), true), GetParam());
  Program program = model.compile();
  for (const std::int64_t page_tokens : {64, 7}) {
    // Prompts of all lengths, some in pieces, and decode beside them.
    std::vector<Conversation> conversations(5);
    conversations[0] = {{1, 1, 1, 1}, 1};
    conversations[1] = {{40, 1, 1, 1}, 40};
    conversations[2] = {{0, 75, 40, 1}, 115};
    conversations[3] = {{20, 0, 16, 2}, 38};
    conversations[4] = {{5, 7, 0, 1}, 12};
    constexpr std::int64_t kPages = 64;
    const std::int64_t token_bytes =
        shape.kv_heads * shape.head_dim * graph::size_in_bytes(GetParam());
    std::vector<std::vector<char>> memory(
        static_cast<std::size_t>(2 * shape.layers),
        std::vector<char>(static_cast<std::size_t>(kPages * page_tokens * token_bytes)));
    std::vector<KvCache> paged;
    std::vector<KvCache*> pointers;
    for (int i = 0; i < shape.layers; ++i) {
      char* keys = memory[static_cast<std::size_t>(2 * i)].data();
      char* values = memory[static_cast<std::size_t>(2 * i + 1)].data();
      paged.emplace_back(KvCache::Pages{keys, values, page_tokens}, shape.kv_heads, shape.head_dim,
                         GetParam());
      for (Conversation& each : conversations) {
        each.alone.emplace_back(1, shape.kv_heads, shape.head_dim, GetParam());
      }
    }
    for (KvCache& cache : paged) pointers.push_back(&cache);
    std::int64_t next_page = 0;
    for (std::size_t at = 0; at < 4; ++at) {
      std::vector<RaggedRows::Sequence> sequences;
      std::vector<Tensor> ids, positions;
      for (std::size_t i = 0; i < conversations.size(); ++i) {
        Conversation& each = conversations[i];
        const std::int64_t count = each.chunks[at];
        if (count == 0) continue;
        while (static_cast<std::int64_t>(each.pages.size()) * page_tokens < each.length + count) {
          each.pages.push_back((next_page++ * 37 + 11) % kPages * page_tokens);
        }
        sequences.push_back({0, count, each.length, each.pages});
        ids.push_back(tokens_of(static_cast<std::int64_t>(i), each.length, count));
        positions.push_back(
            integers({1, count}, [&](std::int64_t row) { return each.length + row; }));
        if (each.length == 0 || each.length >= each.prompt) {
          const std::int64_t at_once = each.length == 0 ? each.prompt : count;
          std::vector<Tensor> inputs{
              tokens_of(static_cast<std::int64_t>(i), each.length, at_once),
              integers({1, at_once}, [&](std::int64_t row) { return each.length + row; })};
          std::vector<KvCache*> own;
          for (KvCache& cache : each.alone) own.push_back(&cache);
          const Tensor logits = run(program, inputs, own, 1)[0];
          for (std::int64_t k = 0; k < logits.count(); ++k) each.logits.push_back(logits.get(k));
        }
        each.length += count;
      }
      auto rows = RaggedRows::make(sequences, page_tokens, kPages * page_tokens);
      ASSERT_TRUE(rows.ok()) << rows.error().message;
      for (KvCache& cache : paged) cache.begin_step(*rows);
      std::vector<Tensor> inputs{joined(ids), joined(positions)};
      const Tensor all = run(program, inputs, pointers, 3)[0];
      const std::int64_t vocabulary = all.shape.back();
      std::int64_t value = 0;
      for (std::size_t i = 0; i < conversations.size(); ++i) {
        std::deque<double>& logits = conversations[i].logits;
        for (std::int64_t k = 0; k < conversations[i].chunks[at] * vocabulary; ++k, ++value) {
          ASSERT_EQ(all.get(value), logits.front())
              << "step " << at << ", sequence " << i << ", pages of " << page_tokens;
          logits.pop_front();
        }
      }
    }
    EXPECT_FALSE(paged[0].takes(1, 21)) << "a step that nobody began";
  }
}

INSTANTIATE_TEST_SUITE_P(DataTypes, Ragged,
                         testing::Values(graph::DataType::f32, graph::DataType::bf16),
                         [](const auto& info) { return std::string(graph::name(info.param)); });

// Many rows are cut into chunks whose x is packed; a row alone is neither.
TEST(Program, ARowOfManyHasTheBitsOfTheRowAlone) {
  const LlamaText text{
      "graph many(%x: f32[s, 300]) -> (f32[s, 275]) {\n"
      "  %w = const \"w\" : f32[275, 300]\n"
      "  %b = const \"b\" : f32[275]\n"
      "  %y = linear(%x, %w, %b) {bias = true}\n"
      "  %z = gelu(%y)\n"
      "  return %z\n"
      "}\n",
      {{"w", {275, 300}}, {"b", {275}}}};
  Model model(text, graph::DataType::f32);
  Program program = model.compile();
  for (std::int64_t rows : {23, 24, 193, 500}) {
    std::vector<Tensor> inputs{random_tensor(graph::DataType::f32, {rows, 300}, 5, 1.0)};
    for (int threads : {1, 3}) {
      const Tensor all = run(program, inputs, {}, threads)[0];
      for (std::int64_t row = 0; row < rows; row += row < 30 ? 1 : 29) {
        std::vector<Tensor> one{*Tensor::make(graph::DataType::f32, {1, 300})};
        for (std::int64_t i = 0; i < 300; ++i) one[0].set(i, inputs[0].get(row * 300 + i));
        const Tensor alone = run(program, one, {}, 1)[0];
        for (std::int64_t i = 0; i < 275; ++i) {
          ASSERT_EQ(all.get(row * 275 + i), alone.get(i)) << rows << " rows, row " << row;
        }
      }
    }
  }
}

// Weights in 16 bits or 12, of a model saved in bf16: prompts, steps and rows of every block.
TEST(Program, TwelveBitsChangeNoBit) {
  using graph::DataType;
  for (const DataType dtype : {DataType::bf16, DataType::f32}) {
    LlamaShape shape = shape_for(dtype);
    Model model(llama_graph(shape, true, std::string(graph::name(dtype))), dtype);
    for (auto& [name, tensor] : model.constants) {
      for (std::int64_t i = 0; i < tensor.count(); ++i) {
        tensor.set(i, rounded_to(DataType::bf16, tensor.get(i)));
      }
    }
    std::vector<Tensor> wanted;
    for (const std::int64_t from : {CompileOptions::kNever, std::int64_t{0}}) {
      model.weights = std::make_shared<WeightStore>();
      CompileOptions options;
      options.choices.twelve_bits_from = from;
      Program program = model.compile(options);
      int linears = 0, in_twelve_bits = 0;
      for (const RegionReport& region : program.regions()) {
        linears += region.weight_bytes > 0;
        in_twelve_bits += region.kernel.find("twelve_bits") != std::string::npos;
      }
      EXPECT_EQ(in_twelve_bits, from == 0 ? linears : 0);
      const std::vector<Tensor> results =
          logits_of_steps(program, shape, dtype, {70, 1, 2, 3, 4, 6, 11, 24}, 2);
      if (wanted.empty()) wanted = results;
      for (std::size_t i = 0; i < results.size(); ++i) {
        EXPECT_EQ(results[i].bytes, wanted[i].bytes) << graph::name(dtype) << ", call " << i;
      }
    }
  }
}

// What masks and positions are made of: 64-bit arithmetic has no vector form, and PyTorch is not
// called for it.
TEST(Program, IntegersAreComputedByTheRuntime) {
  const LlamaText text{
      "graph integers(%m: i64[b, s], %p: i64[s, 1]) -> (f32[b, s], i64[s, s], bool[s, s], i64[b, "
      "s], bf16[b, s], i64[b, s]) {\n"
      "  %n = cumsum(%m)\n"
      "  %one = scalar {value = 1.0, dtype = i64}\n"
      "  %q = sub(%n, %one)\n"
      "  %r = mul(%q, %m)\n"
      "  %f = convert(%r) {dtype = f32}\n"
      "  %t = reshape(%p) {shape = [1, s]}\n"
      "  %d = sub(%p, %t)\n"
      "  %a = abs(%d)\n"
      "  %w = scalar {value = 2.0, dtype = i64}\n"
      "  %l = le(%a, %w)\n"
      "  %h = convert(%r) {dtype = bf16}\n"
      "  %g = gather(%m, %r)\n"
      "  return %f, %a, %l, %r, %h, %g\n"
      "}\n",
      {}};
  Model model(text, graph::DataType::f32);
  Program program = model.compile();
  for (std::int64_t s : {1, 5, 90}) {
    std::vector<Tensor> inputs{
        integers({3, s}, [&](std::int64_t i) { return std::int64_t{i % s >= i / s}; }),
        integers({s, 1}, [](std::int64_t i) { return 5 * i; })};
    std::vector<graph::Argument> arguments(inputs.begin(), inputs.end());
    const auto wanted = graph::interpret(model.source, arguments, model.constants);
    ASSERT_TRUE(wanted.ok()) << wanted.error().message;
    const std::vector<Tensor> got = run(program, inputs, {}, 2);
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(largest_difference(got[i], wanted->at(i)), 0) << i << " of " << s;
    }
  }
  EXPECT_EQ(program.counters(Phase::decode).fallback_calls, 0u);
}

TEST(Program, LeftPaddingHidesKeys) {
  // A padded sequence gives the same logits as the same sequence alone, at the same positions.
  const LlamaShape shape;
  Model model(llama_graph(shape, true), graph::DataType::f32);
  Program program = model.compile();
  const std::int64_t padding = 5, tokens = 9;
  std::vector<std::vector<Tensor>> results;
  for (const std::int64_t pad : {std::int64_t{0}, padding}) {
    std::vector<KvCache> caches;
    for (int i = 0; i < shape.layers; ++i) {
      caches.emplace_back(1, shape.kv_heads, shape.head_dim, graph::DataType::f32);
      const std::int64_t first[] = {pad};
      ASSERT_TRUE(caches.back().set_first_keys(first).ok());
    }
    std::vector<KvCache*> pointers;
    for (KvCache& cache : caches) pointers.push_back(&cache);
    std::vector<Tensor> inputs{
        integers({1, pad + tokens}, [&](std::int64_t i) { return i < pad ? 0 : i - pad + 1; }),
        integers({1, pad + tokens}, [&](std::int64_t i) { return i < pad ? 0 : i - pad; })};
    results.push_back(run(program, inputs, pointers, 2));
  }
  EXPECT_LT(largest_difference(results[0][0], results[1][0]), 1e-5);
}

TEST(Program, DisabledOpsBecomeHostCallsWithAReason) {
  const LlamaShape shape;
  Model model(llama_graph(shape, true), graph::DataType::f32);
  CompileOptions options;
  options.disabled = {"norm"};
  Program program = model.compile(options);
  int norms = 0;
  const HostFunction host = [&](const HostCall& call) -> Status {
    if (call.function != "rms_norm") return Error{"unexpected " + call.function};
    norms += 1;
    const std::int64_t columns = call.inputs[0].shape.back();
    const auto* x = static_cast<const float*>(call.inputs[0].data);
    const auto* w = static_cast<const float*>(call.inputs[1].data);
    auto* y = static_cast<float*>(call.outputs[0].data);
    for (std::int64_t row = 0; row < element_count(call.inputs[0]) / columns; ++row) {
      double sum = 0;
      for (std::int64_t i = 0; i < columns; ++i)
        sum += double(x[row * columns + i]) * x[row * columns + i];
      const double scale = 1 / std::sqrt(sum / static_cast<double>(columns) + 1e-5);
      for (std::int64_t i = 0; i < columns; ++i)
        y[row * columns + i] = static_cast<float>(x[row * columns + i] * scale * w[i]);
    }
    return {};
  };
  Program own = model.compile();
  std::vector<std::vector<Tensor>> results;
  for (Program* each : {&program, &own}) {
    Caches caches(shape, graph::DataType::f32);
    const TokenStep step{1, 6, 0};
    std::vector<Tensor> inputs{step.ids(), step.positions()};
    results.push_back(run(*each, inputs, caches.pointers, 2, Phase::decode, &host));
  }
  EXPECT_EQ(norms, 2 * shape.layers + 1);
  EXPECT_EQ(own.alike_tokens(), 16) << "so many go through attention one by one";
  EXPECT_EQ(program.alike_tokens(), 1) << "nobody knows how others round several rows";
  EXPECT_EQ(program.counters(Phase::decode).fallback_calls, static_cast<std::uint64_t>(norms));
  EXPECT_LT(largest_difference(results[0][0], results[1][0]), 1e-4);
  int reasons = 0;
  for (const RegionReport& region : program.regions()) {
    if (region.fallback) reasons += region.reason == "norm is disabled" ? 1 : -100;
  }
  EXPECT_EQ(reasons, norms);
}

TEST(Program, InputsThatDoNotFitAreErrors) {
  const LlamaShape shape;
  Model model(llama_graph(shape, true), graph::DataType::f32);
  Program program = model.compile();
  const TokenStep step{1, 2, 0};
  Tensor ids = step.ids(), positions = step.positions();
  Tensor wrong = integers({1, 3}, [](std::int64_t) { return 0; });
  Tensor floats = *Tensor::make(graph::DataType::f32, {1, 2});
  std::vector<TensorView> shapes_differ{view(ids), view(wrong)},
      types_differ{view(ids), view(floats)}, one{view(ids)};
  for (const auto* inputs : {&shapes_differ, &types_differ, &one}) {
    const auto result = program.output_shapes(*inputs);
    EXPECT_FALSE(result.ok());
  }
  KvCache small(1, shape.kv_heads, shape.head_dim + 1, graph::DataType::f32);
  KvCache* caches[] = {&small, &small};
  std::vector<TensorView> good{view(ids), view(positions)};
  Tensor logits = *Tensor::make(graph::DataType::f32, {1, 1, shape.vocabulary});
  std::vector<TensorView> outputs{view(logits)};
  const Status refused = program.run({good, caches, outputs, nullptr, Phase::decode, 1});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().message.find("cache %kv0"), std::string::npos)
      << refused.error().message;
}

// k = 33: the last pair of a 16-bit weight is half. fp32 values that fit bf16 are packed in it.
TEST(Program, ATiedHeadIsAlsoTheTable) {
  using graph::DataType;
  for (const auto& [dtype, rounded] : {std::pair{DataType::f32, false},
                                       {DataType::f32, true},
                                       {DataType::bf16, false},
                                       {DataType::f16, false}}) {
    SCOPED_TRACE(fmt::format("{} {}", graph::name(dtype), rounded));
    const std::string name(graph::name(dtype));
    const std::string text = fmt::format(R"(graph f(%i: i64[s]) -> ({0}[s, 70], {0}[s, 33]) {{
  %w = constant {{source = "w"}} : {0}[70, 33]
  %rows = embedding(%w, %i)
  %y = linear(%rows, %w)
  return %y, %rows
}}
)",
                                         name);
    Model model({text, {{"w", {70, 33}}}}, dtype);
    Tensor& table = model.constants.at("w");
    for (std::int64_t i = 0; rounded && i < table.count(); ++i) {
      table.set(i, rounded_to(DataType::bf16, table.get(i)));
    }
    std::vector<std::string> packed;
    const PackedCallback record = [&](const std::string& source) { packed.push_back(source); };
    CompileOptions compact;
    compact.choices.twelve_bits_from = 0;
    auto program = ops::compile(model.optimized, model.views, Target::host(), compact,
                                model.kernels, model.weights, record);
    ASSERT_TRUE(program.ok()) << program.error().message;
    EXPECT_EQ(packed, std::vector<std::string>{"w"});
    EXPECT_EQ(fallbacks(*program), "");
    std::vector<Tensor> inputs{integers({7}, [](std::int64_t i) { return (31 * i + 69) % 70; })};
    std::vector<graph::Argument> arguments{inputs[0]};
    const auto expected = graph::interpret(model.source, arguments, model.constants);
    ASSERT_TRUE(expected.ok()) << expected.error().message;
    std::fill(table.bytes.begin(), table.bytes.end(), std::byte{});  // nobody reads it any more
    for (int threads : {1, 2}) {
      const std::vector<Tensor> outputs = run(*program, inputs, {}, threads);
      EXPECT_EQ(outputs[1].bytes, expected->at(1).bytes);
      EXPECT_LE(largest_difference(outputs[0], expected->at(0)), tolerance(dtype));
    }
    // One that is looked up in place keeps its memory.
    packed.clear();
    CompileOptions options;
    options.disabled = {"embedding"};
    auto in_place = ops::compile(model.optimized, model.views, Target::host(), options,
                                 model.kernels, std::make_shared<WeightStore>(), record);
    ASSERT_TRUE(in_place.ok()) << in_place.error().message;
    EXPECT_EQ(packed, std::vector<std::string>{});
    std::vector<Tensor> bad{integers({1}, [](std::int64_t) { return 70; })};
    std::vector<TensorView> views{view(bad[0])};
    Tensor y = *Tensor::make(dtype, {1, 70}), rows = *Tensor::make(dtype, {1, 33});
    std::vector<TensorView> outputs{view(y), view(rows)};
    EXPECT_FALSE(program->run({views, {}, outputs, nullptr, Phase::decode, 1}).ok());
  }
}

TEST(Program, TheLargestOfTooFewIsAnError) {
  Model model({"graph f(%x: f32[2, n]) -> (f32[2, 3]) {\n"
               "  %y = top_values(%x) {count = 3}\n  return %y\n}\n",
               {}},
              graph::DataType::f32);
  Program program = model.compile();
  EXPECT_EQ(fallbacks(program), "");
  for (std::int64_t columns : {2, 3}) {
    Tensor x = *Tensor::make(graph::DataType::f32, {2, columns});
    Tensor y = *Tensor::make(graph::DataType::f32, {2, 3});
    std::vector<TensorView> inputs{view(x)}, outputs{view(y)};
    const Status done = program.run({inputs, {}, outputs, nullptr, Phase::decode, 1});
    EXPECT_EQ(done.ok(), columns == 3);
  }
}

TEST(Program, AnIndexOutsideTheTableIsAnErrorAndTheCacheIsUnchanged) {
  const LlamaShape shape;
  Model model(llama_graph(shape, true), graph::DataType::f32);
  Program program = model.compile();
  KvCache a(1, shape.kv_heads, shape.head_dim, graph::DataType::f32),
      b(1, shape.kv_heads, shape.head_dim, graph::DataType::f32);
  KvCache* caches[] = {&a, &b};
  for (std::int64_t bad : {std::int64_t{61}, std::int64_t{-1}}) {
    Tensor ids = integers({1, 2}, [&](std::int64_t i) { return i == 0 ? 1 : bad; });
    Tensor positions = integers({1, 2}, [](std::int64_t i) { return i; });
    std::vector<TensorView> inputs{view(ids), view(positions)};
    Tensor logits = *Tensor::make(graph::DataType::f32, {1, 1, shape.vocabulary});
    std::vector<TensorView> outputs{view(logits)};
    EXPECT_FALSE(program.run({inputs, caches, outputs, nullptr, Phase::decode, 2}).ok());
    EXPECT_EQ(a.length(), 0);
  }
}

}  // namespace
}  // namespace tilewright::ops
