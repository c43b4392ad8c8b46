// The linear kernel: every number of rows x lanes x type x shape x epilogue against bounds from
// unpacked weights in double, in guarded memory; and the promise that y's bits depend on nothing
// but x, w and the epilogue.
#include "ops/gemm/linear_kernel.h"

#include <gtest/gtest.h>

#include "linear_problem.h"
#include "ops/gemm/arithmetic.h"

namespace tilewright {
namespace {

class Linear : public ::testing::TestWithParam<Case> {
 protected:
  LinearKernel kernel(int rows, std::int64_t n, std::int64_t k) const {
    LinearKernel spec;
    spec.arithmetic = GetParam().arithmetic;
    spec.lanes = GetParam().lanes;
    spec.weight = GetParam().weight;
    spec.twelve_bits = GetParam().twelve_bits;
    spec.rows = rows;
    spec.n = n;
    spec.k = k;
    if (reads_several_panels(spec)) spec.streams = ops::kMostStreams;
    return spec;
  }

  // All rows' first stretch, all rows' second ...; with pieces, those of a block's rows in turns.
  static std::vector<char> packed_x(const Problem& problem, bool pieces) {
    const DataType type = problem.x_type;
    const std::int64_t size = size_in_bytes(type), k = problem.spec.k, rows = problem.spec.rows;
    const std::int64_t run = ops::partial_sum_length() * size;
    const std::int64_t piece = ops::piece_bytes(problem.spec.lanes);
    std::vector<char> packed(
        static_cast<std::size_t>((k / ops::partial_sum_length() + 1) * run * problem.m));
    for (std::int64_t row = 0; row < problem.m; ++row) {
      for (std::int64_t i = 0; i < k; ++i) {
        const std::int64_t stretch = i / ops::partial_sum_length() * problem.m * run;
        const std::int64_t byte = i % ops::partial_sum_length() * size;
        const std::int64_t in_pieces = row / rows * rows * run + byte / piece * rows * piece +
                                       row % rows * piece + byte % piece;
        const std::int64_t to = stretch + (pieces ? in_pieces : row * run + byte);
        ops::write_scalar(type, packed.data() + to, value_at(*problem.x, type, row, i));
      }
    }
    return packed;
  }
};

TEST_P(Linear, MatchesTheBoundsForEveryShape) {
  // Epilogues and types take turns, so that each meets many shapes.
  const std::vector<ops::Epilogue> all = epilogues();
  std::size_t turn = 0;
  for (int rows = 1; rows <= ops::max_rows(GetParam().lanes); ++rows) {
    for (std::int64_t n : {1, 31, 32, 33, 100}) {
      for (std::int64_t k : {1, 2, 3, 7, 31, 32, 65, 128, 129, 259}) {
        LinearKernel spec = kernel(rows, n, k);
        spec.epilogue = all[turn % all.size()];
        if (spec.epilogue.gated) spec.n *= 2;
        spec.output = kFloats[turn % 3];
        check(spec, std::max<std::int64_t>(turn % 3, 1), static_cast<unsigned>(turn));
        if (HasFatalFailure()) return;
        turn += 1 + (turn % 7 == 0 ? 1 : 0);  // out of step with the loops
      }
    }
  }
}

TEST_P(Linear, MatchesTheBoundsForEveryEpilogueAndType) {
  for (const ops::Epilogue& each : epilogues()) {
    for (DataType output : kFloats) {
      for (int rows : {1, 3, ops::max_rows(GetParam().lanes)}) {
        LinearKernel spec = kernel(rows, each.gated ? 42 : 45, 19);
        spec.epilogue = each;
        spec.output = output;
        check(spec, 2, 7);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Linear, SumsALongRow) {
  for (int rows : {1, ops::max_rows(GetParam().lanes)}) check(kernel(rows, 64, 576), 1, 3);
}

TEST_P(Linear, IsExactOnSmallIntegers) {
  for (int rows : {1, 2, ops::max_rows(GetParam().lanes)}) {
    LinearKernel spec = kernel(rows, 64, 100);
    spec.epilogue = epilogue(true, "relu", false, true);
    const Problem problem(spec, 2, Fill::integers, 5, GuardedRows::Flush::end);
    reference(spec, problem.args().data());
    const std::vector<double> wanted = problem.results();
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      EXPECT_EQ(problem.results(), wanted) << name(engine) << " " << print(spec);
    }
  }
}

TEST_P(Linear, ReferenceAgreesWithUnpackedWeights) {
  for (const ops::Epilogue& each : epilogues()) {
    LinearKernel spec = kernel(2, each.gated ? 42 : 45, 33);
    spec.epilogue = each;
    const Problem problem(spec, 2, Fill::normal, 9, GuardedRows::Flush::end);
    reference(spec, problem.args().data());
    expect_within_bounds(problem, "reference");
  }
}

// Panels, blocks and numbers of rows are how work is cut; they must not show in the result.
TEST_P(Linear, BitsDoNotDependOnHowWorkIsCut) {
  LinearKernel whole = kernel(1, 100, 331);
  whole.epilogue = epilogue(true, "", false, true);
  const Problem rows_one(whole, 12, Fill::normal, 11, GuardedRows::Flush::end);
  rows_one.run(Engine::interpreter);
  const std::vector<double> wanted = rows_one.results();
  for (int rows : {1, 2, 3, 4, 6, 12}) {
    if (rows > ops::max_rows(whole.lanes)) continue;
    LinearKernel spec = whole;
    spec.rows = rows;
    spec.streams = 1;
    const Problem problem(spec, 12 / rows, Fill::normal, 11, GuardedRows::Flush::end);
    for (Engine engine : engines(spec)) {
      for (std::int64_t panel = ops::panel_count(spec.n) - 1; panel >= 0; --panel) {
        std::vector<std::int64_t> args = problem.args();
        args[LinearArgs::panel_begin] = panel;
        args[LinearArgs::panel_count] = 1;
        run_kernel(engine, build(spec), args);
      }
      EXPECT_EQ(problem.results(), wanted) << name(engine) << " rows=" << rows;
    }
  }
  for (const auto& [rows, rest] : {std::pair{5, 2}, {8, 4}, {7, 5}}) {
    if (rows > ops::max_rows(whole.lanes)) continue;
    LinearKernel spec = whole;
    spec.rows = rows;
    spec.rest = rest;
    spec.streams = 1;
    const Problem problem(spec, 12 / rows, Fill::normal, 11, GuardedRows::Flush::end);
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      EXPECT_EQ(problem.results(), wanted) << name(engine) << " " << rows << " + " << rest;
    }
  }
}

// A smaller block behind the others, or behind none.
TEST_P(Linear, MatchesTheBoundsWithASmallerLastBlock) {
  const std::vector<ops::Epilogue> all = epilogues();
  std::size_t turn = 0;
  for (int rows = 2; rows <= ops::max_rows(GetParam().lanes); ++rows) {
    for (int rest = 1; rest < rows; ++rest) {
      LinearKernel spec = kernel(rows, 33, std::array{3, 128, 259}[turn / 3 % 3]);
      spec.epilogue = all[turn % all.size()];
      if (spec.epilogue.gated) spec.n *= 2;
      spec.output = kFloats[turn % 3];
      spec.streams = 1;
      spec.rest = rest;
      check(spec, std::max<std::int64_t>(turn % 3, 1), static_cast<unsigned>(turn));
      if (HasFatalFailure()) return;
      ++turn;
    }
  }
}

// Panels side by side and one after the other, an odd one alone.
TEST_P(Linear, BitsDoNotDependOnStreams) {
  std::size_t turn = 0;
  const std::vector<ops::Epilogue> all = epilogues();
  for (int rows : {1, 2, 3, 4}) {
    for (std::int64_t n : {32, 64, 70, 130}) {
      for (std::int64_t k : {1, 2, 31, 128, 259}) {
        LinearKernel spec = kernel(rows, n, k);
        if (spec.streams == 1) continue;
        spec.epilogue = all[turn++ % all.size()];
        for (std::int64_t blocks : {1, 2}) {
          spec.streams = 1;
          const Problem one(spec, blocks, Fill::normal, 11, GuardedRows::Flush::end);
          one.run(Engine::interpreter);
          spec.streams = ops::kMostStreams;
          const Problem several(spec, blocks, Fill::normal, 11, GuardedRows::Flush::end);
          for (Engine engine : engines(spec)) {
            several.run(engine);
            EXPECT_EQ(several.results(), one.results()) << name(engine) << " " << print(spec);
          }
        }
      }
    }
  }
}

// Stretches of x one below the other, as the caller packs them, and for large blocks in pieces:
// only addresses differ.
TEST_P(Linear, PackedXGivesTheSameBits) {
  for (const auto& [rows, blocks] : {std::pair{ops::max_rows(GetParam().lanes), 3}, {1, 2}}) {
    for (std::int64_t k : {96, 128, 331}) {
      LinearKernel spec = kernel(rows, 50, k);
      const Problem problem(spec, blocks, Fill::normal, 13, GuardedRows::Flush::end);
      problem.run(Engine::interpreter);
      const std::vector<double> wanted = problem.results();
      for (bool pieces : {false, true}) {
        const std::vector<char> packed = packed_x(problem, pieces);
        const std::int64_t run = ops::partial_sum_length() * size_in_bytes(problem.x_type);
        std::vector<std::int64_t> args = problem.args();
        args[LinearArgs::x] = reinterpret_cast<std::int64_t>(packed.data());
        args[LinearArgs::x_row_stride] = pieces ? 0 : run;
        args[LinearArgs::x_block_stride] = rows * run;
        args[LinearArgs::x_stretch_stride] = problem.m * run;
        spec.many_blocks = pieces;
        if (pieces) spec.streams = 1;
        for (Engine engine : engines(spec)) {
          run_kernel(engine, build(spec), args);
          EXPECT_EQ(problem.results(), wanted) << name(engine) << " " << print(spec);
        }
        reference(spec, args.data());
        expect_within_bounds(problem, "reference");
      }
    }
  }
}

TEST_P(Linear, NoPanelsOrBlocksWriteNothing) {
  const LinearKernel spec = kernel(2, 64, 8);
  const Problem problem(spec, 1, Fill::normal, 1, GuardedRows::Flush::end);
  const double before = value_at(*problem.y, spec.output, 0, 0);
  for (Engine engine : engines(spec)) {
    for (int slot : {LinearArgs::panel_count, LinearArgs::block_count}) {
      std::vector<std::int64_t> args = problem.args();
      args[static_cast<std::size_t>(slot)] = 0;
      run_kernel(engine, build(spec), args);
      EXPECT_TRUE(std::isnan(before) && std::isnan(value_at(*problem.y, spec.output, 0, 0)));
    }
  }
}

TEST_P(Linear, NaNAndInfinityReachTheirOutputsOnly) {
  for (int rows : {1, ops::max_rows(GetParam().lanes)}) {
    const LinearKernel spec = kernel(rows, 64, 33);
    const Problem problem(spec, 1, Fill::integers, 2, GuardedRows::Flush::end);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    ops::write_scalar(problem.x_type, problem.x->row(0) + 32 * size_in_bytes(problem.x_type), nan);
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      for (std::int64_t column = 0; column < spec.n; ++column) {
        EXPECT_TRUE(std::isnan(value_at(*problem.y, spec.output, 0, column))) << name(engine);
        for (std::int64_t row = 1; row < rows; ++row) {
          EXPECT_FALSE(std::isnan(value_at(*problem.y, spec.output, row, column)));
        }
      }
    }
  }
}

TEST_P(Linear, InnerLoopsDoNotSpill) {
  for (int rows = 1; rows <= ops::max_rows(GetParam().lanes); ++rows) {
    for (const ops::Epilogue& each : epilogues()) {
      for (DataType output : kFloats) {
        for (std::int64_t n : {576, 610}) {
          LinearKernel spec = kernel(rows, n, 576);
          if (n == 610) {
            spec.many_blocks = true;
            spec.streams = 1;
          }
          spec.epilogue = each;
          spec.output = output;
          for (int rest : {0, 1, rows - 1}) {
            if (rest > 0 && (rest >= rows || spec.many_blocks)) continue;
            spec.rest = rest;
            if (rest > 0) spec.streams = 1;
            const auto code = jit::emit(build(spec), target_with_lanes(spec.lanes));
            ASSERT_TRUE(code.ok()) << print(spec) << ": " << code.error().message;
            EXPECT_EQ(code->spills, 0) << print(spec);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Linear,
                         ::testing::Values(Case{16, DataType::bf16, false, Arithmetic::dot},
                                           Case{16, DataType::bf16, true, Arithmetic::dot},
                                           Case{8, DataType::f32}, Case{8, DataType::bf16},
                                           Case{8, DataType::f16}, Case{16, DataType::f32},
                                           Case{16, DataType::bf16}, Case{16, DataType::f16},
                                           Case{8, DataType::bf16, true},
                                           Case{16, DataType::bf16, true}),
                         [](const auto& test) {
                           const bool dot = test.param.arithmetic == Arithmetic::dot;
                           return std::string(dot ? "dot_" : "") +
                                  std::string(graph::name(test.param.weight)) +
                                  (test.param.twelve_bits ? "_twelve_bits" : "") + "_lanes" +
                                  std::to_string(test.param.lanes);
                         });

// --- which kernels

TEST(ArithmeticChoice, FollowsTheTargetAndTheTypes) {
  const ops::PackedForm bf16{DataType::bf16}, f32{DataType::f32}, f16{DataType::f16};
  const auto few = [&](const char* rung, DataType x, ops::PackedForm weight) {
    return choose_arithmetic(*Target::for_rung(rung), 6, x, weight).few_rows;
  };
  EXPECT_EQ(few("avx512_bf16", DataType::bf16, bf16), Arithmetic::dot);
  EXPECT_EQ(few("avx512_bf16", DataType::f32, bf16), Arithmetic::fma);
  EXPECT_EQ(few("avx512_bf16", DataType::bf16, f32), Arithmetic::fma);
  EXPECT_EQ(few("avx512", DataType::bf16, bf16), Arithmetic::fma);
  EXPECT_EQ(few("amx_bf16", DataType::bf16, bf16), Arithmetic::fma);
  Target intel = *Target::for_rung("avx512_bf16");
  intel.cpu.vendor = "GenuineIntel";
  const auto of = [&](const Target& target) {
    return choose_arithmetic(target, 0, DataType::bf16, bf16).few_rows;
  };
  EXPECT_EQ(of(intel), Arithmetic::fma) << "half the rate of the FMA on Granite Rapids";
  Target amd = intel;
  amd.cpu.vendor = "AuthenticAMD";
  amd.cpu.family = 0x1a;
  EXPECT_EQ(of(amd), Arithmetic::dot);

  ops::AttentionKernel attention;
  attention.lanes = 16;
  attention.input = attention.cache = DataType::bf16;
  EXPECT_TRUE(attention_by_dots(*Target::for_rung("avx512_bf16"), attention));
  EXPECT_FALSE(attention_by_dots(*Target::for_rung("avx512"), attention));
  EXPECT_FALSE(attention_by_dots(intel, attention));
  attention.cache = DataType::i8;
  EXPECT_FALSE(attention_by_dots(*Target::for_rung("avx512_bf16"), attention));
  EXPECT_TRUE(attention_in_integers(intel, attention));
  EXPECT_FALSE(attention_in_integers(*Target::for_rung("avx512"), attention));
  attention.input = DataType::f32;
  EXPECT_FALSE(attention_in_integers(intel, attention)) << "fp32 keeps fp32's accuracy";

  const auto many = [&](const char* rung, DataType x, ops::PackedForm weight, int fp32_products) {
    return choose_arithmetic(*Target::for_rung(rung), fp32_products, x, weight).many_rows;
  };
  EXPECT_EQ(many("amx_bf16", DataType::bf16, bf16, 0), Arithmetic::tiles);
  EXPECT_EQ(many("amx_bf16", DataType::f16, f16, 6), std::nullopt);
  EXPECT_EQ(many("avx512_fp16", DataType::bf16, bf16, 6), std::nullopt);
  EXPECT_EQ(many("avx512_fp16", DataType::f32, bf16, 6), std::nullopt);
  for (int products : {0, 3, 6}) {
    const auto splits = [&](ops::PackedForm weight) {
      return many("amx_bf16", DataType::f32, weight, products) == Arithmetic::split_tiles;
    };
    EXPECT_EQ(splits(bf16), products >= 3);
    EXPECT_EQ(splits(f32), products >= 6);
    EXPECT_EQ(splits(f16), products >= 6);
  }
}

// A weight kept exactly in 16 bits, and other lanes, give the same bits.
TEST(LinearBits, AreThoseOfEveryLanesAndWeightType) {
  for (DataType narrow : {DataType::bf16, DataType::f16}) {
    std::vector<double> wanted;
    for (int lanes : {8, 16}) {
      LinearKernel spec;
      spec.lanes = lanes;
      spec.n = 50;
      spec.k = 277;
      spec.weight = narrow;
      const Problem problem(spec, 3, Fill::normal, 4, GuardedRows::Flush::end);
      problem.run(Engine::interpreter);
      if (wanted.empty()) wanted = problem.results();
      EXPECT_EQ(problem.results(), wanted) << print(spec);

      std::vector<float> wide;
      for (std::int64_t i = 0; i < spec.n * spec.k; ++i) {
        wide.push_back(static_cast<float>(value_at(*problem.w, narrow, i / spec.k, i % spec.k)));
      }
      const ops::WeightBlock block{wide.data(), spec.n, spec.k * 4};
      spec.weight = DataType::f32;
      std::vector<float> packed(
          static_cast<std::size_t>(ops::packed_bytes(spec.n, spec.k, spec.weight)) / 4);
      ops::pack_panels({&block, 1}, spec.k, spec.weight, spec.weight, false, 0,
                       ops::panel_count(spec.n), packed.data());
      std::vector<std::int64_t> args = problem.args();
      args[LinearArgs::weight] = reinterpret_cast<std::int64_t>(packed.data());
      run_kernel(Engine::interpreter, build(spec), args);
      EXPECT_EQ(problem.results(), wanted) << print(spec) << " from " << graph::name(narrow);
    }
  }
}

// 12 bits are the same weights, in the same order of k.
TEST(LinearBits, AreThoseOfWeightsInTwelveBits) {
  for (int lanes : {8, 16}) {
    for (int rows : {1, 2, 4, ops::max_rows(lanes)}) {
      for (std::int64_t k : {8, 45, 128, 277, 576}) {
        LinearKernel spec;
        spec.lanes = lanes;
        spec.rows = rows;
        spec.n = 50;
        spec.k = k;
        spec.weight = DataType::bf16;
        spec.twelve_bits = true;
        const Problem problem(spec, 2, Fill::normal, 4, GuardedRows::Flush::end);
        problem.run(Engine::interpreter);
        const std::vector<double> wanted = problem.results();
        const ops::WeightBlock block{problem.w->row(0), spec.n, problem.w->stride()};
        std::vector<char> packed(
            static_cast<std::size_t>(ops::packed_bytes(spec.n, spec.k, spec.weight)));
        ops::pack_panels({&block, 1}, spec.k, spec.weight, spec.weight, false, 0,
                         ops::panel_count(spec.n), packed.data());
        spec.twelve_bits = false;
        std::vector<std::int64_t> args = problem.args();
        args[LinearArgs::weight] = reinterpret_cast<std::int64_t>(packed.data());
        run_kernel(Engine::interpreter, build(spec), args);
        EXPECT_EQ(problem.results(), wanted) << print(spec);
      }
    }
  }
}

TEST(LinearSupported, SaysWhyNot) {
  LinearKernel good;
  good.n = good.k = 32;
  EXPECT_TRUE(supported(good).ok());
  LinearKernel bad = good;
  bad.rows = 7;
  EXPECT_FALSE(supported(bad).ok());
  bad = good;
  bad.epilogue.activation = "swish";
  EXPECT_EQ(supported(bad).error().message, "activation 'swish'");
  bad = good;
  bad.weight = DataType::i64;
  EXPECT_EQ(supported(bad).error().message, "linear in i64");
  bad = good;
  bad.prefetch_near = -1;
  EXPECT_EQ(supported(bad).error().message, "weights asked for -1 bytes ahead");
  bad = good;
  bad.streams = ops::kMostStreams;
  EXPECT_TRUE(supported(bad).ok());
  bad.rows = 2;
  EXPECT_EQ(supported(bad).error().message, "2 panels side by side");
  bad.streams = 1;
  bad.rest = 1;
  EXPECT_TRUE(supported(bad).ok());
  bad.many_blocks = true;
  EXPECT_EQ(supported(bad).error().message, "a block of 1 rows behind others");
  bad.many_blocks = false;
  bad.rest = 2;
  EXPECT_EQ(supported(bad).error().message, "a block of 2 rows behind others");
}

// One chain of additions over all of k would round about twice as much.
TEST(LinearError, IsThatOfShortChains) {
  LinearKernel spec;
  spec.n = 64;
  spec.k = 1536;
  const Problem problem(spec, 8, Fill::normal, 9, GuardedRows::Flush::end);
  problem.run(Engine::interpreter);
  const std::vector<double> results = problem.results();
  double ours = 0, chains = 0;
  for (std::int64_t row = 0; row < problem.m; ++row) {
    for (std::int64_t column = 0; column < spec.n; ++column) {
      double exact = 0;
      float chain = 0;
      for (std::int64_t k = 0; k < spec.k; ++k) {
        const double x = value_at(*problem.x, DataType::f32, row, k);
        const double w = value_at(*problem.w, spec.weight, column, k);
        exact += x * w;
        chain = static_cast<float>(chain + x * w);
      }
      const double result = results[static_cast<std::size_t>(row * spec.n + column)];
      ours += (result - exact) * (result - exact);
      chains += (chain - exact) * (chain - exact);
    }
  }
  EXPECT_LT(std::sqrt(ours), 0.6 * std::sqrt(chains));
}

TEST(LinearPrint, TellsEveryFieldApart) {
  LinearKernel spec;
  spec.n = 960;
  spec.k = 576;
  EXPECT_EQ(print(spec), "linear lanes=8 rows=1 n=960 k=576 weight=f32 output=f32 prefetch=1024");
  spec.epilogue = epilogue(true, "silu", true, true);
  EXPECT_EQ(print(spec),
            "linear lanes=8 rows=1 n=960 k=576 weight=f32 output=f32 bias "
            "activation=silu gated residual prefetch=1024");
  spec.streams = 2;
  spec.prefetch_near = 256;
  EXPECT_TRUE(print(spec).ends_with(" prefetch=1024 near=256 streams=2"));
}

}  // namespace
}  // namespace tilewright
