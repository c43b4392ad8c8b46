// The linear kernel: every number of rows x lanes x type x shape x epilogue against bounds from
// unpacked weights in double, in guarded memory; and the promise that y's bits depend on nothing
// but x, w and the epilogue.
#include "ops/gemm/linear_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>
#include <random>

#include "guarded_rows.h"
#include "kernel_run.h"
#include "ops/gemm/pack.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::LinearArgs;
using ops::LinearKernel;
using Random = std::mt19937;
using Rows = std::unique_ptr<GuardedRows>;

constexpr double kUnit = 0x1p-24;  // rounding error of fp32, relative

double bytes_of(DataType type) { return size_in_bytes(type); }

// How values are drawn.
enum class Fill { normal, integers };

double draw(Fill fill, Random& random) {
  if (fill == Fill::integers) return static_cast<double>(static_cast<int>(random() % 7) - 3);
  return std::normal_distribution<double>()(random);
}

Rows guarded(std::int64_t rows, std::int64_t columns, DataType type, GuardedRows::Flush flush) {
  return std::make_unique<GuardedRows>(rows, columns * size_in_bytes(type), 3 * bytes_of(type),
                                       flush);
}

double value_at(const GuardedRows& rows, DataType type, std::int64_t row, std::int64_t column) {
  return ops::read_scalar(type, rows.row(row) + column * size_in_bytes(type));
}

void fill_rows(const GuardedRows& rows, DataType type, std::int64_t count, std::int64_t columns,
               Fill fill, Random& random) {
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      ops::write_scalar(type, rows.row(r) + c * size_in_bytes(type), draw(fill, random));
    }
  }
}

// One problem: operands of M = blocks * rows rows in guarded memory.
struct Problem {
  Problem(LinearKernel kernel, std::int64_t block_count, Fill fill, unsigned seed,
          GuardedRows::Flush flush)
      : spec(std::move(kernel)), blocks(block_count), m(block_count * spec.rows) {
    Random random(seed);
    w = guarded(spec.n, spec.k, spec.weight, flush);
    x = guarded(m, spec.k, DataType::f32, flush);
    y = guarded(m, outputs(), spec.output, flush);
    fill_rows(*w, spec.weight, spec.n, spec.k, fill, random);
    fill_rows(*x, DataType::f32, m, spec.k, fill, random);
    bias = guarded(1, spec.n, spec.output, flush);
    residual = guarded(m, outputs(), spec.output, flush);
    fill_rows(*bias, spec.output, 1, spec.n, fill, random);
    fill_rows(*residual, spec.output, m, outputs(), fill, random);
    partial_sums =
        guarded(1, m * ops::kPartialSumsBytesPerRow / 4, DataType::f32, GuardedRows::Flush::end);
    if (spec.twelve_bits && fill == Fill::normal) scatter_outsiders();
    std::vector<ops::WeightBlock> stacked{{w->row(0), spec.n, w->stride()}};
    if (spec.epilogue.gated) {
      stacked = {{w->row(0), spec.n / 2, w->stride()},
                 {w->row(spec.n / 2), spec.n / 2, w->stride()}};
    }
    const std::int64_t size = ops::packed_bytes(spec.n, spec.k, spec.weight);
    std::vector<std::byte> as_values(static_cast<std::size_t>(size));
    ops::pack_panels(stacked, spec.k, spec.weight, spec.weight, spec.epilogue.gated, 0,
                     ops::panel_count(spec.n), as_values.data());
    packed =
        spec.twelve_bits ? in_twelve_bits(as_values, flush) : guarded(1, size, DataType::u8, flush);
    if (!spec.twelve_bits) std::copy(as_values.begin(), as_values.end(), packed->row(0));
    unpacked = guarded(1, ops::unpacked_bytes(), DataType::u8, GuardedRows::Flush::end);
  }

  // Exponents that no table has, all different: their steps must stay in 16 bits.
  void scatter_outsiders() const {
    int exponent = -100;
    for (std::int64_t row = 0; row < spec.n; row += 9) {
      for (std::int64_t k = row % 5; k < spec.k; k += 17) {
        ops::write_scalar(spec.weight, w->row(row) + 2 * k, std::ldexp(1.0, exponent));
        exponent = exponent < -20 ? exponent + 2 : -100;
      }
    }
  }

  Rows in_twelve_bits(const std::vector<std::byte>& as_pairs, GuardedRows::Flush flush) const {
    const std::int64_t panels = ops::panel_count(spec.n);
    const auto* pairs = reinterpret_cast<const std::uint16_t*>(as_pairs.data());
    const std::int64_t panel_values = static_cast<std::int64_t>(as_pairs.size()) / 2 / panels;
    ops::twelve_bits::Packer packer(panels, spec.k);
    for (std::int64_t i = 0; i < panels; ++i) packer.inspect(i, pairs + i * panel_values);
    Rows result = guarded(1, packer.place(), DataType::u8, flush);
    std::byte* to = result->row(0);
    for (std::int64_t i = 0; i < panels; ++i) packer.pack(i, pairs + i * panel_values, to);
    return result;
  }

  std::int64_t outputs() const { return spec.epilogue.gated ? spec.n / 2 : spec.n; }

  std::vector<std::int64_t> args() const {
    std::vector<std::int64_t> list(LinearArgs::count);
    list[LinearArgs::x] = x->address();
    list[LinearArgs::x_row_stride] = x->stride();
    list[LinearArgs::x_block_stride] = spec.rows * x->stride();
    list[LinearArgs::x_stretch_stride] =
        ops::partial_sum_length() * graph::size_in_bytes(DataType::f32);
    list[LinearArgs::weight] = packed->address();
    list[LinearArgs::y] = y->address();
    list[LinearArgs::y_row_stride] = y->stride();
    list[LinearArgs::bias] = bias->address();
    list[LinearArgs::residual] = residual->address();
    list[LinearArgs::residual_row_stride] = residual->stride();
    list[LinearArgs::panel_begin] = 0;
    list[LinearArgs::panel_count] = ops::panel_count(spec.n);
    list[LinearArgs::block_count] = blocks;
    list[LinearArgs::partial_sums] = partial_sums->address();
    list[LinearArgs::unpacked] = unpacked->address();
    return list;
  }

  void run(Engine engine) const { run_kernel(engine, build(spec), args()); }

  std::vector<double> results() const {
    std::vector<double> list;
    for (std::int64_t r = 0; r < m; ++r) {
      for (std::int64_t c = 0; c < outputs(); ++c) {
        list.push_back(value_at(*y, spec.output, r, c));
      }
    }
    return list;
  }

  LinearKernel spec;
  std::int64_t blocks, m;
  Rows w, x, y, bias, residual, partial_sums, packed, unpacked;
};

// --- bounds

struct Bounded {
  double value = 0, error = 0;
};

Bounded rounded(Bounded a, double unit = kUnit) {
  a.error += unit * (std::abs(a.value) + a.error);
  return a;
}

// The sum's bound: one chain of k fused multiply-adds.
Bounded product(const Problem& p, std::int64_t row, std::int64_t column) {
  double sum = 0, magnitude = 0;
  for (std::int64_t k = 0; k < p.spec.k; ++k) {
    const double term =
        value_at(*p.x, DataType::f32, row, k) * value_at(*p.w, p.spec.weight, column, k);
    sum += term;
    magnitude += std::abs(term);
  }
  const double depth = static_cast<double>(p.spec.k) * kUnit;
  Bounded result{sum, depth / (1 - depth) * magnitude};
  if (!p.spec.epilogue.bias) return result;
  result.value += value_at(*p.bias, p.spec.output, 0, column);
  return rounded(result);
}

// The functions' errors are those that jit/math.h states; 1.13 bounds the slope of them all.
Bounded activated(const std::string& activation, Bounded a) {
  if (activation.empty()) return a;
  const double x = a.value, ulp = 2 * kUnit;
  if (activation == "relu") return {std::max(x, 0.0), a.error};
  double value = 0, own = 0;
  if (activation == "silu") {
    value = x / (1 + std::exp(-x));
    own = 2 * ulp * std::abs(value);
  } else if (activation == "gelu") {
    value = x / 2 * std::erfc(-x / std::numbers::sqrt2);
    own = 4 * ulp * std::abs(value) + 0x1p-24;
  } else {
    const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
    value = x / 2 * (1 + std::tanh(inner));
    own = 4 * ulp * std::abs(value) + 0x1p-22;
  }
  return {value, 1.13 * a.error + own};
}

Bounded expected(const Problem& p, std::int64_t row, std::int64_t column) {
  Bounded y = activated(p.spec.epilogue.activation, product(p, row, column));
  if (p.spec.epilogue.gated) {
    const Bounded up = product(p, row, column + p.spec.n / 2);
    const double error = std::abs(y.value) * up.error + std::abs(up.value) * y.error;
    y = rounded({y.value * up.value, error + y.error * up.error});
  }
  if (p.spec.epilogue.residual) {
    y.value += value_at(*p.residual, p.spec.output, row, column);
    y = rounded(y);
  }
  if (p.spec.output == DataType::bf16) y = rounded(y, 0x1p-8);
  if (p.spec.output == DataType::f16) y = rounded(y, 0x1p-11);
  y.error += p.spec.output == DataType::f16 ? 0x1p-25 : 0x1p-133;
  return y;
}

void expect_within_bounds(const Problem& p, std::string_view by) {
  for (std::int64_t row = 0; row < p.m; ++row) {
    for (std::int64_t column = 0; column < p.outputs(); ++column) {
      const Bounded wanted = expected(p, row, column);
      const double got = value_at(*p.y, p.spec.output, row, column);
      ASSERT_LE(std::abs(got - wanted.value), wanted.error)
          << by << ": " << print(p.spec) << " blocks=" << p.blocks << " row " << row << " column "
          << column << ": " << got << " for " << wanted.value;
    }
  }
  ASSERT_TRUE(p.y->intact()) << by << ": " << print(p.spec) << " wrote between rows";
}

// --- cases

ops::Epilogue epilogue(bool bias, const std::string& activation, bool gated, bool residual) {
  ops::Epilogue result;
  result.bias = bias;
  result.activation = activation;
  result.gated = gated;
  result.residual = residual;
  return result;
}

std::vector<ops::Epilogue> epilogues() {
  return {epilogue(false, "", false, false),    epilogue(true, "", false, false),
          epilogue(false, "", false, true),     epilogue(true, "gelu", false, true),
          epilogue(false, "silu", true, false), epilogue(true, "gelu_tanh", true, false),
          epilogue(true, "silu", true, true),   epilogue(false, "", true, false),
          epilogue(true, "relu", false, false), epilogue(false, "gelu_tanh", false, true),
          epilogue(true, "gelu", true, true)};
}

constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};

struct Case {
  int lanes;
  DataType weight;
  bool twelve_bits = false;
};

class Linear : public ::testing::TestWithParam<Case> {
 protected:
  LinearKernel kernel(int rows, std::int64_t n, std::int64_t k) const {
    LinearKernel spec;
    spec.lanes = GetParam().lanes;
    spec.weight = GetParam().weight;
    spec.twelve_bits = GetParam().twelve_bits;
    spec.rows = rows;
    spec.n = n;
    spec.k = k;
    return spec;
  }
};

void check(const LinearKernel& spec, std::int64_t blocks, unsigned seed) {
  ASSERT_TRUE(supported(spec).ok()) << print(spec) << ": " << supported(spec).error().message;
  for (GuardedRows::Flush flush : {GuardedRows::Flush::end, GuardedRows::Flush::start}) {
    const Problem problem(spec, blocks, Fill::normal, seed, flush);
    for (Engine engine : engines(spec.lanes)) {
      problem.run(engine);
      expect_within_bounds(problem, name(engine));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

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
        check(spec, static_cast<std::int64_t>(turn % 3), static_cast<unsigned>(turn));
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
    for (Engine engine : engines(spec.lanes)) {
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
    const Problem problem(spec, 12 / rows, Fill::normal, 11, GuardedRows::Flush::end);
    for (Engine engine : engines(spec.lanes)) {
      for (std::int64_t panel = ops::panel_count(spec.n) - 1; panel >= 0; --panel) {
        std::vector<std::int64_t> args = problem.args();
        args[LinearArgs::panel_begin] = panel;
        args[LinearArgs::panel_count] = 1;
        run_kernel(engine, build(spec), args);
      }
      EXPECT_EQ(problem.results(), wanted) << name(engine) << " rows=" << rows;
    }
  }
}

// Stretches of x one below the other, as the caller of large blocks packs them: only addresses
// differ.
TEST_P(Linear, PackedXGivesTheSameBits) {
  for (const auto& [rows, blocks] : {std::pair{ops::max_rows(GetParam().lanes), 3}, {1, 2}}) {
    for (std::int64_t k : {96, 128, 331}) {
      LinearKernel spec = kernel(rows, 50, k);
      const Problem problem(spec, blocks, Fill::normal, 13, GuardedRows::Flush::end);
      problem.run(Engine::interpreter);
      const std::vector<double> wanted = problem.results();

      const std::int64_t run = ops::partial_sum_length() * size_in_bytes(DataType::f32);
      std::vector<char> packed(
          static_cast<std::size_t>((k / ops::partial_sum_length() + 1) * run * problem.m));
      for (std::int64_t row = 0; row < problem.m; ++row) {
        for (std::int64_t i = 0; i < k; ++i) {
          const std::int64_t to = (i / ops::partial_sum_length() * problem.m + row) * run +
                                  i % ops::partial_sum_length() * size_in_bytes(DataType::f32);
          ops::write_scalar(DataType::f32, packed.data() + to,
                            value_at(*problem.x, DataType::f32, row, i));
        }
      }
      std::vector<std::int64_t> args = problem.args();
      args[LinearArgs::x] = reinterpret_cast<std::int64_t>(packed.data());
      args[LinearArgs::x_row_stride] = run;
      args[LinearArgs::x_block_stride] = rows * run;
      args[LinearArgs::x_stretch_stride] = problem.m * run;
      spec.many_blocks = true;
      for (Engine engine : engines(spec.lanes)) {
        run_kernel(engine, build(spec), args);
        EXPECT_EQ(problem.results(), wanted) << name(engine) << " " << print(spec);
      }
      reference(spec, args.data());
      expect_within_bounds(problem, "reference");
    }
  }
}

TEST_P(Linear, NoPanelsOrBlocksWriteNothing) {
  const LinearKernel spec = kernel(2, 64, 8);
  const Problem problem(spec, 1, Fill::normal, 1, GuardedRows::Flush::end);
  const double before = value_at(*problem.y, spec.output, 0, 0);
  for (Engine engine : engines(spec.lanes)) {
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
    ops::write_scalar(DataType::f32, problem.x->row(0) + 32 * size_in_bytes(DataType::f32), nan);
    for (Engine engine : engines(spec.lanes)) {
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
          spec.epilogue = each;
          spec.output = output;
          const auto code = jit::emit(build(spec), target_with_lanes(spec.lanes));
          ASSERT_TRUE(code.ok()) << print(spec) << ": " << code.error().message;
          EXPECT_EQ(code->spills, 0) << print(spec);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Linear,
                         ::testing::Values(Case{8, DataType::f32}, Case{8, DataType::bf16},
                                           Case{8, DataType::f16}, Case{16, DataType::f32},
                                           Case{16, DataType::bf16}, Case{16, DataType::f16},
                                           Case{8, DataType::bf16, true},
                                           Case{16, DataType::bf16, true}),
                         [](const auto& test) {
                           return std::string(graph::name(test.param.weight)) +
                                  (test.param.twelve_bits ? "_twelve_bits" : "") + "_lanes" +
                                  std::to_string(test.param.lanes);
                         });

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
  EXPECT_EQ(print(spec), "linear lanes=8 rows=1 n=960 k=576 weight=f32 output=f32");
  spec.epilogue = epilogue(true, "silu", true, true);
  EXPECT_EQ(print(spec),
            "linear lanes=8 rows=1 n=960 k=576 weight=f32 output=f32 bias "
            "activation=silu gated residual");
}

}  // namespace
}  // namespace tilewright
