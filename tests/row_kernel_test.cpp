// The row kernel: every op x type x length x lanes against running error bounds, random regions,
// special values, and what is not supported.
#include "ops/row_kernel.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "ops/scalar_type.h"
#include "row_region.h"

namespace tilewright {
namespace {

using graph::DataType;
using graph::Op;
using ops::ColumnAccess;
using ops::RowInstruction;
using ops::RowKernel;
using ops::RowOperand;

constexpr std::array<std::int64_t, 15> kColumns{1,  2,  3,  7,  8,   9,   15,  16,
                                                17, 31, 33, 64, 100, 576, 1000};
constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};

RowKernel region(int lanes, std::vector<RowOperand> inputs, std::vector<RowInstruction> body,
                 DataType output, ColumnAccess access = ColumnAccess::contiguous) {
  RowKernel spec;
  spec.lanes = lanes;
  spec.outputs = {static_cast<int>(inputs.size() + body.size()) - 1};
  spec.inputs = std::move(inputs);
  spec.body = std::move(body);
  spec.output_operands = {{output, access}};
  return spec;
}

// Run-time and baked-in columns.
void expect_right(Engine engine, RowKernel spec, std::int64_t rows, std::int64_t columns,
                  Random& random, const Fill& fill = standard_normal) {
  for (bool baked : {false, true}) {
    spec.columns = baked ? columns : -1;
    RegionData data(spec, rows, columns, random, fill);
    std::int64_t checked = 0;
    EXPECT_EQ(check_region(data, engine, &checked), "") << print(spec);
    EXPECT_GT(checked, 0) << print(spec);
  }
}

double positive(Random& random) { return std::abs(standard_normal(random)) + 1e-3; }

struct OpCase {
  RowInstruction instruction;
  int operands;
  Fill fill = standard_normal;
};

std::vector<OpCase> float_cases() {
  std::vector<OpCase> cases;
  for (Op op : {Op::add, Op::sub, Op::mul, Op::maximum, Op::minimum}) cases.push_back({{op}, 2});
  cases.push_back({{Op::div}, 2, positive});
  for (Op op :
       {Op::neg, Op::abs, Op::exp, Op::expm1, Op::sin, Op::cos, Op::tanh, Op::erf, Op::sigmoid,
        Op::silu, Op::relu, Op::gelu, Op::sum, Op::mean, Op::amax, Op::softmax}) {
    cases.push_back({{op}, 1});
  }
  for (Op op : {Op::reciprocal, Op::sqrt, Op::rsqrt, Op::log, Op::log1p})
    cases.push_back({{op}, 1, positive});
  cases.push_back({{Op::gelu, {}, 0, true}, 1});
  for (double exponent : {2.0, 3.0, 0.5, -0.5, -1.0}) {
    cases.push_back({{Op::pow, {}, exponent}, 1, positive});
  }
  for (DataType type : kFloats) cases.push_back({{Op::convert, {}, 0, false, type}, 1});
  cases.push_back({{Op::where}, 3});
  for (int operands : {1, 2}) {
    for (bool plus_one : {false, true}) {
      cases.push_back({{Op::rms_norm, {}, 1e-5, plus_one}, operands});
    }
  }
  for (int operands : {1, 2, 3}) cases.push_back({{Op::layer_norm, {}, 1e-5}, operands});
  for (Op op : {Op::eq, Op::ne, Op::lt, Op::le, Op::gt, Op::ge, Op::logical_and, Op::logical_or}) {
    cases.push_back({{op, {}, 0, false, DataType::boolean}, 2});
  }
  cases.push_back({{Op::logical_not, {}, 0, false, DataType::boolean}, 1});
  for (OpCase& test : cases) {
    for (int i = 0; i < test.operands; ++i) test.instruction.operands.push_back(i);
  }
  return cases;
}

class RowKernelOps : public ::testing::TestWithParam<Machine> {
 protected:
  int lanes() const { return GetParam().lanes; }

  void run(const RegionData& data) {
    EXPECT_EQ(run_engine(GetParam().engine, build(data.spec), data.args.data()), "");
  }
  void expect_right(const RowKernel& spec, std::int64_t rows, std::int64_t columns, Random& random,
                    const Fill& fill = standard_normal) {
    tilewright::expect_right(GetParam().engine, spec, rows, columns, random, fill);
  }
};

TEST_P(RowKernelOps, MatchTheBoundsForEveryTypeAndLength) {
  Random random(1);
  for (const OpCase& test : float_cases()) {
    for (DataType type : kFloats) {
      const bool boolean = test.instruction.dtype == DataType::boolean;
      const bool reduces = op_class(test.instruction.op) == graph::OpClass::reduction;
      std::vector<RowOperand> inputs(static_cast<std::size_t>(test.operands), RowOperand{type});
      const RowKernel spec =
          region(lanes(), inputs, {test.instruction}, boolean ? DataType::boolean : type,
                 reduces ? ColumnAccess::broadcast : ColumnAccess::contiguous);
      for (std::int64_t columns : kColumns) {
        expect_right(spec, columns < 500 ? 2 : 1, columns, random, test.fill);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(RowKernelOps, TakeIntegersAndBooleans) {
  Random random(2);
  const RowOperand f32{DataType::f32}, i32{DataType::i32}, boolean{DataType::boolean};
  const RowOperand position{DataType::i64, ColumnAccess::broadcast};
  std::vector<RowKernel> specs;
  const auto add = [&](std::vector<RowOperand> inputs, std::vector<RowInstruction> body,
                       DataType output) {
    specs.push_back(region(lanes(), std::move(inputs), std::move(body), output));
  };
  for (Op op : {Op::add, Op::sub, Op::mul}) {
    add({i32, i32}, {{op, {0, 1}, 0, false, DataType::i32}}, DataType::i32);
  }
  for (Op op : {Op::eq, Op::ne, Op::lt, Op::le, Op::gt, Op::ge}) {
    add({i32, i32}, {{op, {0, 1}, 0, false, DataType::boolean}}, DataType::boolean);
    add({boolean, boolean}, {{op, {0, 1}, 0, false, DataType::boolean}}, DataType::boolean);
    add({i32, f32}, {{op, {0, 1}, 0, false, DataType::boolean}}, DataType::f32);
  }
  for (Op op : {Op::logical_and, Op::logical_or}) {
    add({boolean, i32}, {{op, {0, 1}, 0, false, DataType::boolean}}, DataType::boolean);
  }
  add({boolean}, {{Op::logical_not, {0}, 0, false, DataType::boolean}}, DataType::boolean);
  add({i32}, {{Op::neg, {0}, 0, false, DataType::i32}}, DataType::i32);
  add({boolean, f32, i32}, {{Op::where, {0, 1, 2}}}, DataType::f32);
  add({boolean, boolean, boolean}, {{Op::where, {0, 1, 2}, 0, false, DataType::boolean}},
      DataType::boolean);
  add({boolean, i32, i32}, {{Op::where, {0, 1, 2}, 0, false, DataType::i32}}, DataType::i32);
  add({boolean}, {{Op::convert, {0}, 0, false, DataType::f32}}, DataType::f32);
  // A rotary table: cos(position * inverse frequency).
  add({position, f32}, {{Op::convert, {0}}, {Op::mul, {2, 1}}, {Op::cos, {3}}}, DataType::f32);
  for (const RowKernel& spec : specs) {
    for (std::int64_t columns : kColumns) expect_right(spec, 2, columns, random);
  }
}

// i64 at the edges of its halves: every pair of values, one of them varying, against C++.
TEST_P(RowKernelOps, WideIntegersAreExact) {
  constexpr std::int64_t kHalf = std::int64_t{1} << 31, kWhole = std::int64_t{1} << 32;
  using Limits = std::numeric_limits<std::int64_t>;
  const std::vector<std::int64_t> values{0,
                                         1,
                                         -1,
                                         2,
                                         7,
                                         kHalf - 1,
                                         kHalf,
                                         -kHalf,
                                         -kHalf - 1,
                                         kWhole,
                                         kWhole - 1,
                                         -kWhole,
                                         -kWhole - 1,
                                         kWhole + kHalf,
                                         1234567890123,
                                         -987654321098765,
                                         Limits::max(),
                                         Limits::min(),
                                         Limits::min() + 1,
                                         -kWhole + 1};
  const auto count = static_cast<std::int64_t>(values.size());
  const auto wrapped = [](std::int64_t a, std::int64_t b, bool minus) {
    const auto x = static_cast<std::uint64_t>(a), y = static_cast<std::uint64_t>(b);
    return static_cast<std::int64_t>(minus ? x - y : x + y);
  };
  struct Wide {
    Op op;
    DataType result;
    std::function<std::int64_t(std::int64_t, std::int64_t)> expected;
  };
  const DataType i64 = DataType::i64, boolean = DataType::boolean;
  const std::vector<Wide> cases{
      {Op::eq, boolean, [](auto a, auto b) { return std::int64_t{a == b}; }},
      {Op::ne, boolean, [](auto a, auto b) { return std::int64_t{a != b}; }},
      {Op::lt, boolean, [](auto a, auto b) { return std::int64_t{a < b}; }},
      {Op::le, boolean, [](auto a, auto b) { return std::int64_t{a <= b}; }},
      {Op::gt, boolean, [](auto a, auto b) { return std::int64_t{a > b}; }},
      {Op::ge, boolean, [](auto a, auto b) { return std::int64_t{a >= b}; }},
      {Op::add, i64, [&](auto a, auto b) { return wrapped(a, b, false); }},
      {Op::sub, i64, [&](auto a, auto b) { return wrapped(a, b, true); }},
      {Op::neg, i64, [&](auto a, auto) { return wrapped(0, a, true); }},
      {Op::abs, i64, [&](auto a, auto) { return a < 0 ? wrapped(0, a, true) : a; }},
      {Op::convert, boolean, [](auto a, auto) { return std::int64_t{a != 0}; }},
      {Op::convert, DataType::i32, [](auto a, auto) { return static_cast<std::int32_t>(a); }},
  };
  for (const Wide& test : cases) {
    // x varies, y does not; the third input is what a wide result is compared with.
    const bool unary = test.op == Op::neg || test.op == Op::abs || test.op == Op::convert;
    std::vector<RowInstruction> body{
        {test.op, unary ? std::vector{0} : std::vector{0, 1}, 0, false, test.result}};
    if (test.result == i64) body.push_back({Op::eq, {3, 2}, 0, false, boolean});
    const DataType stored = test.result == i64 ? boolean : test.result;
    const RowKernel spec =
        region(lanes(), {{i64}, {i64, ColumnAccess::broadcast}, {i64}}, std::move(body), stored);
    ASSERT_TRUE(supported(spec).ok()) << print(spec) << supported(spec).error().message;
    Random random(1);
    tilewright::RegionData data(spec, count, count, random);
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t y = values[static_cast<std::size_t>(r)];
      std::memcpy(data.operands[1]->row(r), &y, sizeof y);
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t x = values[static_cast<std::size_t>(c)], z = test.expected(x, y);
        std::memcpy(data.operands[0]->row(r) + c * 8, &x, sizeof x);
        std::memcpy(data.operands[2]->row(r) + c * 8, &z, sizeof z);
      }
    }
    ASSERT_EQ(tilewright::run_engine(GetParam().engine, build(spec), data.args.data()), "");
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t x = values[static_cast<std::size_t>(c)];
        const std::int64_t y = values[static_cast<std::size_t>(r)];
        const auto got = static_cast<std::int64_t>(
            ops::read_scalar(stored, data.operands[3]->row(r) + c * size_in_bytes(stored)));
        EXPECT_EQ(got, test.result == i64 ? 1 : test.expected(x, y))
            << name(test.op) << " of " << x << " and " << y;
      }
    }
  }
}

// f16 and bf16 rounding inside a region, over every exponent.
TEST_P(RowKernelOps, ConvertRoundsToTheType) {
  Random random(3);
  const Fill wide = [](Random& r) {
    return std::ldexp(standard_normal(r), std::uniform_int_distribution<int>(-30, 18)(r));
  };
  for (DataType type : {DataType::bf16, DataType::f16}) {
    RowKernel spec = region(lanes(), {{}}, {{Op::convert, {0}, 0, false, type}}, DataType::f32);
    RegionData data(spec, 1, 4096, random, wide);
    run(data);
    for (std::int64_t i = 0; i < data.columns; ++i) {
      const double x = ops::read_scalar(DataType::f32, data.operands[0]->row(0) + 4 * i);
      const double y = ops::read_scalar(DataType::f32, data.operands[1]->row(0) + 4 * i);
      ASSERT_EQ(y, ops::rounded_to(type, x)) << x;
    }
  }
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::array kSpecials{0.0,   -0.0,   1.0,  -1.0, kInfinity, -kInfinity,
                               kNan,  1e-40,  -2.5, 3e38, -3e38,     65520.0,
                               0.125, -1e-30, 7.0,  1e30, 0.5};

// NaN, infinities, zeros and denormals through ops whose special values ATen defines by IEEE.
TEST_P(RowKernelOps, TreatSpecialValuesAsIeee) {
  Random random(4);
  for (Op op : {Op::add, Op::sub,  Op::mul,  Op::div,     Op::maximum,    Op::minimum,    Op::neg,
                Op::abs, Op::relu, Op::sqrt, Op::convert, Op::reciprocal, Op::eq,         Op::lt,
                Op::le,  Op::ne,   Op::ge,   Op::gt,      Op::where,      Op::logical_not}) {
    const bool compares = op >= Op::eq;
    std::vector<int> operands{0, 1, 2};
    const bool unary = op == Op::neg || op == Op::abs || op == Op::relu || op == Op::sqrt ||
                       op == Op::convert || op == Op::reciprocal || op == Op::logical_not;
    operands.resize(op == Op::where ? 3 : unary ? 1 : 2);
    const DataType type = compares ? DataType::boolean : DataType::f32;
    const RowKernel spec = region(lanes(), {{}, {}, {}}, {{op, operands, 0, false, type}}, type);
    std::size_t next = 0;
    const Fill specials = [&](Random&) {  // every pair in 17 columns x 17 rows
      const std::size_t count = kSpecials.size(), cells = count * count;
      const std::size_t cell = next % cells, operand = next / cells;
      ++next;
      return kSpecials[operand == 0 ? cell % count : cell / count];
    };
    const auto count = static_cast<std::int64_t>(kSpecials.size());
    RegionData data(spec, count, count, random, specials);
    run(data);
    reference(spec, data.args_of_reference().data());
    for (std::int64_t cell = 0; cell < count * count; ++cell) {
      const std::int64_t row = cell / count, offset = cell % count * size_in_bytes(type);
      const double kernel = ops::read_scalar(type, data.operands[3]->row(row) + offset);
      const double expected = ops::read_scalar(type, data.references[0]->row(row) + offset);
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(kernel)) << name(op) << " cell " << cell << " is " << kernel;
      } else {
        EXPECT_EQ(kernel, expected) << name(op) << " cell " << cell;
        const bool zero_may_have_either_sign = op == Op::maximum || op == Op::minimum;
        if (!zero_may_have_either_sign) {
          EXPECT_EQ(std::signbit(kernel), std::signbit(expected)) << name(op) << " cell " << cell;
        }
      }
    }
  }
}

// One NaN anywhere in the row reaches amax, softmax and the sums; a row of -inf gives NaN.
TEST_P(RowKernelOps, ReductionsKeepNan) {
  Random random(5);
  for (Op op : {Op::sum, Op::mean, Op::amax, Op::softmax, Op::rms_norm, Op::layer_norm}) {
    for (std::int64_t columns : {1, 5, 16, 37, 100}) {
      const RowKernel spec = region(lanes(), {{}}, {{op, {0}, 1e-5}}, DataType::f32);
      for (std::int64_t position = 0; position < columns; ++position) {
        std::int64_t next = 0;
        RegionData data(spec, 1, columns, random,
                        [&](Random& r) { return next++ == position ? kNan : standard_normal(r); });
        run(data);
        for (std::int64_t i = 0; i < columns; ++i) {
          ASSERT_TRUE(std::isnan(ops::read_scalar(DataType::f32, data.operands[1]->row(0) + 4 * i)))
              << name(op) << " of " << columns << " columns, NaN at " << position;
        }
      }
    }
  }
  const RowKernel spec = region(lanes(), {{}}, {{Op::softmax, {0}}}, DataType::f32);
  RegionData data(spec, 1, 37, random, [](Random&) { return -kInfinity; });
  run(data);
  EXPECT_TRUE(std::isnan(ops::read_scalar(DataType::f32, data.operands[1]->row(0))));
}

// A masked score row: -inf in some places is probability 0 there.
TEST_P(RowKernelOps, SoftmaxOfMaskedScores) {
  const RowKernel spec = region(lanes(), {{}}, {{Op::softmax, {0}}}, DataType::f32);
  Random random(6);
  std::int64_t next = 0;
  RegionData data(spec, 1, 37, random, [&](Random& r) {
    return next++ % 3 == 1 ? -kInfinity : 50 * standard_normal(r);
  });
  run(data);
  reference(spec, data.args_of_reference().data());
  for (std::int64_t i = 0; i < 37; ++i) {
    const double kernel = ops::read_scalar(DataType::f32, data.operands[1]->row(0) + 4 * i);
    const double expected = ops::read_scalar(DataType::f32, data.references[0]->row(0) + 4 * i);
    EXPECT_NEAR(kernel, expected, 1e-5 * expected + 1e-37) << i;
  }
}

TEST_P(RowKernelOps, RandomRegionsMatchTheBounds) {
  std::int64_t checked = 0;
  for (unsigned seed = 0; seed < 600; ++seed) {
    Random random(seed);
    RowKernel spec = random_region(random, lanes());
    const std::int64_t columns = kColumns[seed % (kColumns.size() - 2)];
    if (seed % 2 == 0) spec.columns = columns;
    RegionData data(spec, seed % 4, columns, random);
    ASSERT_EQ(check_region(data, GetParam().engine, &checked), "") << "seed " << seed << "\n"
                                                                   << print(spec);
  }
  EXPECT_GT(checked, 10000);
}

INSTANTIATE_TEST_SUITE_P(Machines, RowKernelOps, ::testing::ValuesIn(machines()), machine_name);

// What a decoder runs per token stays in registers.
TEST(RowKernel, NothingSpillsInTheLoops) {
  const RowOperand half{DataType::bf16}, once{DataType::f32, ColumnAccess::broadcast};
  for (int lanes : {8, 16}) {
    std::vector<RowKernel> specs{
        region(lanes, {{}, {}}, {{Op::rms_norm, {0, 1}, 1e-5, true}}, DataType::f32),
        region(lanes, {half, half, half}, {{Op::add, {0, 1}}, {Op::rms_norm, {3, 2}, 1e-5}},
               DataType::bf16),
        region(lanes, {{}, {}, {}}, {{Op::layer_norm, {0, 1, 2}, 1e-5}}, DataType::f32),
        region(lanes, {{}}, {{Op::softmax, {0}}}, DataType::f32),
        region(
            lanes, {{}, once, {DataType::boolean}},
            {{Op::scalar, {}, -1e9}, {Op::mul, {0, 1}}, {Op::where, {2, 4, 3}}, {Op::softmax, {5}}},
            DataType::f32),
        region(lanes, {{}, {}}, {{Op::silu, {0}}, {Op::mul, {2, 1}}}, DataType::f32),
        region(lanes, {half, half}, {{Op::gelu, {0}, 0, true}, {Op::mul, {2, 1}}}, DataType::bf16),
        region(lanes, {{}, {}}, {{Op::gelu, {0}}, {Op::mul, {2, 1}}}, DataType::f32),
        region(lanes, {{DataType::i64, ColumnAccess::broadcast}, {}},
               {{Op::convert, {0}}, {Op::mul, {2, 1}}, {Op::cos, {3}}}, DataType::f32),
    };
    for (RowKernel& spec : specs) {
      for (std::int64_t columns : {std::int64_t{-1}, std::int64_t{1001}}) {
        spec.columns = columns;
        const auto code = jit::emit(build(spec), target_with_lanes(lanes));
        ASSERT_TRUE(code.ok()) << code.error().message;
        EXPECT_EQ(code->inner_loop_spills, 0) << print(spec);
        EXPECT_EQ(code->spills, 0) << print(spec);
      }
    }
  }
}

// The residual sum is both stored and normalised; all of it in one kernel.
TEST(RowKernel, ResidualAndNormInOneRegion) {
  Random random(7);
  RowKernel spec =
      region(8, {{}, {}, {}}, {{Op::add, {0, 1}}, {Op::rms_norm, {3, 2}, 1e-5}}, DataType::f32);
  spec.outputs = {3, 4};
  spec.output_operands = {{DataType::f32}, {DataType::bf16}};
  for (std::int64_t columns : kColumns) {
    expect_right(Engine::interpreter, spec, 3, columns, random);
  }
}

// Stores come in the last pass only, so a row may be its own output.
TEST(RowKernel, OutputMayBeAnInput) {
  Random random(8);
  const RowKernel spec = region(8, {{}, {}}, {{Op::rms_norm, {0, 1}, 1e-5}}, DataType::f32);
  RegionData data(spec, 2, 100, random);
  std::vector<std::int64_t> args = data.args;
  reference(spec, data.args_of_reference().data());
  args[static_cast<std::size_t>(ops::RowArgs::pointer(2))] = data.operands[0]->address();
  args[static_cast<std::size_t>(ops::RowArgs::row_stride(2))] = data.operands[0]->stride();
  EXPECT_EQ(run_engine(Engine::interpreter, build(spec), args.data()), "");
  for (std::int64_t i = 0; i < 100; ++i) {
    const double expected = ops::read_scalar(DataType::f32, data.references[0]->row(1) + 4 * i);
    const double kernel = ops::read_scalar(DataType::f32, data.operands[0]->row(1) + 4 * i);
    EXPECT_NEAR(kernel, expected, 1e-6 * std::abs(expected)) << i;
  }
}

TEST(RowKernel, PrintIsTheKey) {
  RowKernel spec =
      region(8, {{}, {DataType::bf16, ColumnAccess::broadcast}},
             {{Op::scalar, {}, 0.1}, {Op::mul, {0, 2}}, {Op::rms_norm, {3, 1}, 1e-5, true}},
             DataType::bf16);
  spec.columns = 576;
  EXPECT_EQ(print(spec), R"(row lanes=8 columns=576 {
  %0 = input f32 contiguous
  %1 = input bf16 broadcast
  %2 = scalar() value=0.1 : f32
  %3 = mul(%0, %2) value=0 : f32
  %4 = rms_norm(%3, %1) value=1e-05 flag : f32
  output %4 bf16 contiguous
}
)");
}

TEST(RowKernel, SaysWhatHasNoVectorForm) {
  const auto reason = [](const RowKernel& spec) {
    const Status status = supported(spec);
    return status ? std::string("supported") : status.error().message;
  };
  const RowOperand wide{DataType::i64};
  const RowOperand wide_row{DataType::i64, ColumnAccess::broadcast};
  const auto f32 = DataType::f32, boolean = DataType::boolean, i32 = DataType::i32;
  EXPECT_EQ(reason(region(8, {wide}, {{Op::convert, {0}}}, f32)),
            "row kernel: convert of i64 and float has no vector form");
  EXPECT_EQ(reason(region(8, {wide}, {{Op::neg, {0}, 0, false, DataType::i64}}, DataType::i64)),
            "row kernel: an output of i64 has no vector form");
  for (double value : {9.3e18, -9.3e18, std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(
        reason(region(8, {wide}, {{Op::scalar, {}, value}, {Op::lt, {0, 1}, 0, false, boolean}},
                      boolean)),
        "row kernel: lt of i64 and a literal beyond 2^53");
  }
  EXPECT_EQ(reason(region(8, {wide}, {{Op::mul, {0, 0}, 0, false, DataType::i64}}, f32)),
            "row kernel: mul of i64 has no vector form");
  EXPECT_EQ(reason(region(8, {wide_row}, {{Op::convert, {0}}}, f32)), "supported");
  EXPECT_EQ(reason(region(8, {wide_row, wide}, {{Op::le, {0, 1}, 0, false, boolean}}, boolean)),
            "supported");
  EXPECT_EQ(reason(region(8, {{DataType::f64}}, {{Op::neg, {0}}}, f32)),
            "row kernel: a contiguous f64 input has no vector form");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::neg, {0}}}, DataType::i8)),
            "row kernel: an output of i8 has no vector form");
  EXPECT_EQ(reason(region(8, {{i32}, {i32}}, {{Op::div, {0, 1}, 0, false, i32}}, i32)),
            "row kernel: div of i32 has no vector form");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::convert, {0}, 0, false, i32}}, i32)),
            "row kernel: convert of f32 to i32 has no vector form");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::pow, {0}, 1.5}}, f32)),
            "row kernel: pow with exponent 1.5 has no vector form");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::linear, {0}}}, f32)),
            "row kernel: linear is not a row op");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::neg, {1}}}, f32)),
            "row kernel: neg reads %1 before it is defined");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::add, {0}}}, f32)), "row kernel: add of 1 operands");
  EXPECT_EQ(reason(region(8, {{}}, {{Op::neg, {0}}}, f32, ColumnAccess::broadcast)),
            "row kernel: output %1 varies along the row and is stored once");
}

}  // namespace
}  // namespace tilewright
