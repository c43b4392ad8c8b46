// The linear kernel for many rows with AMX, by the interpreter and, where the host has it, as
// machine code: shapes, epilogues, weights in 32, 16 and 12 bits, x in bf16 and in fp32. The error
// of fp32 has tests/python/test_matrix_kernels.py, beside PyTorch's.
#include "ops/gemm/tile_kernel.h"

#include <gtest/gtest.h>

#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "linear_problem.h"

namespace tilewright {
namespace {

class Tiled : public ::testing::TestWithParam<Case> {
 protected:
  LinearKernel kernel(int rows, std::int64_t n, std::int64_t k) const {
    LinearKernel spec;
    spec.arithmetic = GetParam().arithmetic;
    spec.lanes = 16;
    spec.weight = GetParam().weight;
    spec.twelve_bits = GetParam().twelve_bits;
    spec.rows = rows;
    spec.n = n;
    spec.k = k;
    return spec;
  }
};

TEST_P(Tiled, MatchesTheBoundsForEveryShape) {
  const std::vector<ops::Epilogue> all = epilogues();
  std::size_t turn = 0;
  for (int rows : {16, 32}) {
    for (std::int64_t n : {1, 33, 64}) {
      for (std::int64_t k : {1, 31, 32, 65, 200, 512, 513, 1100}) {
        LinearKernel spec = kernel(rows, n, k);
        spec.epilogue = all[turn % all.size()];
        if (spec.epilogue.gated) spec.n *= 2;
        spec.output = kFloats[turn % 3];
        check(spec, static_cast<std::int64_t>(1 + turn % 2), static_cast<unsigned>(turn));
        if (HasFatalFailure()) return;
        turn += 1 + (turn % 7 == 0 ? 1 : 0);
      }
    }
  }
}

TEST_P(Tiled, MatchesTheBoundsForEveryEpilogueAndType) {
  for (const ops::Epilogue& each : epilogues()) {
    for (DataType output : kFloats) {
      LinearKernel spec = kernel(16, each.gated ? 42 : 45, 19);
      spec.epilogue = each;
      spec.output = output;
      check(spec, 2, 7);
      if (HasFatalFailure()) return;
    }
  }
}

// A row's bits are the same in blocks of 16 and of 32, and whatever panels a call computes.
TEST_P(Tiled, BitsDoNotDependOnHowWorkIsCut) {
  const Problem whole(kernel(32, 70, 700), 2, Fill::normal, 11, GuardedRows::Flush::end);
  whole.run(Engine::interpreter);
  const std::vector<double> wanted = whole.results();
  const Problem cut(kernel(16, 70, 700), 4, Fill::normal, 11, GuardedRows::Flush::end);
  ASSERT_EQ(cut.m, whole.m);
  for (Engine engine : engines(cut.spec)) {
    for (std::int64_t panel = ops::panel_count(70) - 1; panel >= 0; --panel) {
      std::vector<std::int64_t> args = cut.args();
      args[LinearArgs::panel_begin] = panel;
      args[LinearArgs::panel_count] = 1;
      run_kernel(engine, build(cut.spec), args);
    }
    EXPECT_EQ(cut.results(), wanted) << name(engine);
  }
}

TEST_P(Tiled, GivesTheThreadsTilesBack) {
  const Problem problem(kernel(16, 32, 40), 1, Fill::integers, 3, GuardedRows::Flush::end);
  problem.run(Engine::interpreter);
  for (std::int64_t i = 0; i < ops::kTileStateBytes; ++i) {
    EXPECT_EQ(problem.tile_state->row(0)[i], std::byte{0}) << "nothing was configured before";
  }
}

TEST_P(Tiled, InnerLoopsDoNotSpill) {
  for (int rows : {16, 32}) {
    for (std::int64_t k : {500, 576, 4096}) {
      LinearKernel spec = kernel(rows, 610, k);
      spec.epilogue = epilogue(true, "gelu", false, true);
      const auto code = jit::emit(build(spec), target_with_lanes(16));
      ASSERT_TRUE(code.ok()) << print(spec) << ": " << code.error().message;
      EXPECT_EQ(code->inner_loop_spills, 0) << print(spec);
      EXPECT_EQ(code->required_isa, bit(Isa::avx2) | bit(Isa::avx512) | bit(Isa::amx_bf16));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Tiled,
                         ::testing::Values(Case{16, DataType::bf16, false, Arithmetic::tiles},
                                           Case{16, DataType::bf16, true, Arithmetic::tiles},
                                           Case{16, DataType::bf16, false, Arithmetic::split_tiles},
                                           Case{16, DataType::bf16, true, Arithmetic::split_tiles},
                                           Case{16, DataType::f32, false, Arithmetic::split_tiles},
                                           Case{16, DataType::f16, false, Arithmetic::split_tiles}),
                         [](const auto& test) {
                           return std::string(ops::name(test.param.arithmetic)) + "_" +
                                  std::string(graph::name(test.param.weight)) +
                                  (test.param.twelve_bits ? "_twelve_bits" : "");
                         });

// fp32 as three bf16: the same values, whatever they are, and the range they were in.
TEST(TilePack, PartsAddUpToX) {
  LinearKernel spec;
  spec.arithmetic = Arithmetic::split_tiles;
  spec.lanes = 16;
  spec.weight = DataType::bf16;
  spec.rows = 16;
  spec.n = 32;
  spec.k = 70;
  Problem problem(spec, 1, Fill::normal, 21, GuardedRows::Flush::end);
  Random random(22);
  for (std::int64_t row = 0; row < problem.m; ++row) {
    for (std::int64_t k = 0; k < spec.k; ++k) {
      const int exponent = static_cast<int>(random() % 200) - 80;  // parts stay above subnormals
      ops::write_scalar(DataType::f32, problem.x->row(row) + 4 * k,
                        static_cast<float>(std::ldexp(draw(Fill::normal, random), exponent)));
    }
  }
  problem.pack_tiles();
  const auto* parts = reinterpret_cast<const std::uint16_t*>(problem.tile_x->row(0));
  for (std::int64_t step = 0; step < 3; ++step) {
    for (std::int64_t row = 0; row < 16; ++row) {
      for (std::int64_t i = 0; i < 32; ++i) {
        double sum = 0;
        for (std::int64_t part = 0; part < 3; ++part) {
          sum += ops::read_scalar(DataType::bf16, parts + ((step * 3 + part) * 16 + row) * 32 + i);
        }
        const std::int64_t k = 32 * step + i;
        const bool exists = row < problem.m && k < spec.k;
        EXPECT_EQ(sum, exists ? value_at(*problem.x, DataType::f32, row, k) : 0.0);
      }
    }
  }
  double largest = 0;
  for (std::int64_t k = 0; k < spec.k; ++k) {
    largest = std::max(largest, std::abs(value_at(*problem.x, DataType::f32, 3, k)));
  }
  const auto lanes = problem.magnitude_patterns().subspan(3 * 16, 16);
  EXPECT_EQ(std::bit_cast<float>(*std::max_element(lanes.begin(), lanes.end())), largest);
}

TEST(TileRange, RefusesWhatTilesCannotDo) {
  const auto accepts = [](float x, float weight, std::int64_t k = 1000) {
    std::vector<std::uint32_t> magnitudes(32, 0);
    magnitudes[21] = std::bit_cast<std::uint32_t>(x);  // of the second row; the first is zero
    return ops::in_range(magnitudes, weight, k);
  };
  EXPECT_TRUE(accepts(1, 1));
  EXPECT_TRUE(accepts(0, 1));
  EXPECT_TRUE(accepts(1e30f, 1e-20f));
  EXPECT_TRUE(accepts(1e-20f, 1e20f));
  EXPECT_TRUE(accepts(1e30f, 1));
  EXPECT_FALSE(accepts(1e30f, 1e8f)) << "sums may overflow";
  EXPECT_FALSE(accepts(1e35f, 1, 1000000)) << "sums may overflow";
  EXPECT_FALSE(accepts(1e-30f, 1)) << "parts become zero";
  EXPECT_FALSE(accepts(1e-15f, 1e-15f)) << "products become zero";
  EXPECT_FALSE(accepts(std::numeric_limits<float>::infinity(), 1));
  EXPECT_FALSE(accepts(std::numeric_limits<float>::quiet_NaN(), 1));
  EXPECT_FALSE(accepts(1, std::numeric_limits<float>::infinity()));
  EXPECT_FALSE(accepts(3e38f, 1e-20f)) << "rounded up to a part that is infinite";
  EXPECT_FALSE(accepts(1e-20f, 3e38f)) << "rounded up to a part that is infinite";
  EXPECT_FALSE(accepts(1e20f, 1e-26f)) << "parts of weights become zero";
  EXPECT_FALSE(accepts(1, 0));
  EXPECT_FALSE(accepts(1, std::numeric_limits<float>::quiet_NaN()));
}

// Three products or six: what a weight is stored in decides about speed only.
TEST(TileBits, AreThoseOfEveryFormOfTheWeight) {
  LinearKernel spec;
  spec.arithmetic = Arithmetic::split_tiles;
  spec.lanes = 16;
  spec.rows = 32;
  spec.n = 70;
  spec.k = 700;
  std::vector<double> wanted;
  for (const auto& [weight, twelve_bits] : {std::pair{DataType::bf16, false},
                                            {DataType::bf16, true},
                                            {DataType::f32, false},
                                            {DataType::f16, false}}) {
    spec.weight = weight;
    spec.twelve_bits = twelve_bits;
    const Problem problem(spec, 2, Fill::normal, 8, GuardedRows::Flush::end, [&](Problem& p) {
      Random random(9);
      for (std::int64_t row = 0; row < spec.n; ++row) {
        for (std::int64_t k = 0; k < spec.k; ++k) {
          const int eighths = static_cast<int>(random() % 255) - 127;  // fit both 16-bit types
          ops::write_scalar(weight, p.w->row(row) + k * size_in_bytes(weight), eighths / 8.0);
        }
      }
    });
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      if (wanted.empty()) wanted = problem.results();
      EXPECT_EQ(problem.results(), wanted) << print(spec) << " " << name(engine);
    }
  }
}

}  // namespace
}  // namespace tilewright
