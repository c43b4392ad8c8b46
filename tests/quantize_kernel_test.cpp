// The quantising kernel against its scalar definition, bit by bit, with guard pages around every
// operand; and what the definition promises.
#include "ops/quantize_kernel.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "guarded_rows.h"
#include "jit/base/eight_bits.h"
#include "kernel_run.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::QuantizeArgs;
using ops::QuantizeKernel;
using Flush = GuardedRows::Flush;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

struct Quantized {
  std::vector<std::int8_t> integers;
  float scale;

  float value(std::size_t i) const { return scale * static_cast<float>(integers[i]); }
};

Quantized quantized(const std::vector<float>& row) {
  Quantized result{std::vector<std::int8_t>(row.size()), 0};
  result.scale = eight_bits::quantize(
      static_cast<std::int64_t>(row.size()),
      [&](std::int64_t i) { return row[static_cast<std::size_t>(i)]; }, result.integers.data());
  return result;
}

std::vector<float> drawn(std::size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const float size = std::ldexp(1.0f, static_cast<int>(random() % 40) - 20);
  std::vector<float> row;
  for (std::size_t i = 0; i < count; ++i) row.push_back(normal(random) * size);
  return row;
}

TEST(EightBits, IsOffByHalfAScaleAtMost) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    const std::vector<float> row = drawn(1 + random() % 130, random);
    const Quantized q = quantized(row);
    double most = 0;
    for (float x : row) most = std::max(most, std::abs(static_cast<double>(x)));
    EXPECT_LE(q.scale, most / 127 * (1 + 0x1p-15));
    for (std::size_t i = 0; i < row.size(); ++i) {
      const double error = std::abs(static_cast<double>(q.value(i)) - row[i]);
      ASSERT_LE(error, q.scale * (0.5 + 1e-5)) << row[i];
      ASSERT_LE(std::abs(q.integers[i]), 127);
    }
  }
}

TEST(EightBits, ItsNumbersAreExactAndGiveThemselvesAgain) {
  std::mt19937 random(2);
  for (int round = 0; round < 5000; ++round) {
    const Quantized q = quantized(drawn(64, random));
    std::vector<float> row;
    for (std::size_t i = 0; i < 64; ++i) {
      ASSERT_EQ(static_cast<double>(q.value(i)), static_cast<double>(q.scale) * q.integers[i]);
      row.push_back(q.value(i));
    }
    const Quantized again = quantized(row);
    ASSERT_EQ(again.scale, q.scale);
    ASSERT_EQ(again.integers, q.integers);
  }
}

TEST(EightBits, RowsOfAModelsTypeGiveThemselvesAgainInThatType) {
  std::mt19937 random(4);
  for (DataType type : {DataType::bf16, DataType::f16}) {
    const auto in_type = [type](float x) { return static_cast<float>(ops::rounded_to(type, x)); };
    std::normal_distribution<float> normal;
    for (int round = 0; round < 2000; ++round) {
      std::vector<float> row, read;
      for (int i = 0; i < 64; ++i) row.push_back(in_type(normal(random) * 3));
      const Quantized q = quantized(row);
      for (std::size_t i = 0; i < 64; ++i) read.push_back(in_type(q.value(i)));
      const Quantized again = quantized(read);
      ASSERT_EQ(again.scale, q.scale);
      ASSERT_EQ(again.integers, q.integers);
    }
  }
}

TEST(EightBits, RowsWithoutAValueBecomeNone) {
  for (const std::vector<float>& row : std::vector<std::vector<float>>{
           {1, kNan, 2}, {kNan}, {-kInfinity, 1}, {1, kInfinity, kNan}, {kLargest}}) {
    const Quantized q = quantized(row);
    EXPECT_TRUE(std::isnan(q.scale));
    for (std::int8_t integer : q.integers) EXPECT_EQ(integer, 0);
  }
  EXPECT_EQ(quantized({0x1.fep127f, 1}).integers, (std::vector<std::int8_t>{127, 0}));
}

TEST(EightBits, TinyRowsAreZero) {
  for (float x : {0.0f, -0.0f, kTiny, -kTiny, 0x1p-126f, 126 * 0x1p-126f}) {
    const Quantized q = quantized({x, x / 2});
    EXPECT_EQ(q.scale, 0);
    EXPECT_EQ(q.integers, (std::vector<std::int8_t>{0, 0}));
  }
  EXPECT_EQ(quantized({-127 * 0x1p-126f}).scale, 0x1p-126f);
}

TEST(EightBits, TiesGoToEven) {
  EXPECT_EQ(quantized({127, 0.5f, 1.5f, -2.5f, 3.5f, -0.5f}).integers,
            (std::vector<std::int8_t>{127, 0, 2, -2, 4, 0}));
}

// --- the kernel

class QuantizeKernels : public ::testing::TestWithParam<Machine> {};

// The rows of x, each with one of the numbers that are special somewhere.
std::vector<std::vector<float>> rows_of(int head_dim, DataType type, std::mt19937& random) {
  std::vector<std::vector<float>> rows;
  for (float special : {1.0f, 0.0f, kNan, -kNan, kInfinity, -kInfinity, kLargest, kTiny, 1e-37f,
                        1e30f, 127 * 0x1p-126f}) {
    std::vector<float> row = special == 0 || special == kTiny || special == 1e-37f
                                 ? std::vector<float>(static_cast<std::size_t>(head_dim), 0)
                                 : drawn(static_cast<std::size_t>(head_dim), random);
    row[random() % row.size()] = special;
    for (float& x : row) {
      char bytes[4];
      ops::write_scalar(type, bytes, x);
      x = static_cast<float>(ops::read_scalar(type, bytes));
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

void check(Engine engine, const QuantizeKernel& spec, Flush flush, std::mt19937& random) {
  const std::vector<std::vector<float>> values = rows_of(spec.head_dim, spec.input, random);
  const auto count = static_cast<std::int64_t>(values.size());
  const int bytes = size_in_bytes(spec.input);
  GuardedRows x(count, spec.head_dim * bytes, 3 * bytes, flush);
  // Rows of integers and scales with one stride, as heads of a block have.
  const std::int64_t gap = 5;
  GuardedRows y(count, spec.head_dim, gap, flush);
  GuardedRows scales(count, 4, spec.head_dim + gap - 4, flush);
  for (std::int64_t r = 0; r < count; ++r) {
    for (int i = 0; i < spec.head_dim; ++i) {
      ops::write_scalar(spec.input, x.row(r) + i * bytes,
                        values[static_cast<std::size_t>(r)][static_cast<std::size_t>(i)]);
    }
  }
  std::array<std::int64_t, QuantizeArgs::count> args{};
  args[QuantizeArgs::rows] = count;
  args[QuantizeArgs::x] = x.address();
  args[QuantizeArgs::x_row_stride] = x.stride();
  args[QuantizeArgs::y] = y.address();
  args[QuantizeArgs::scales] = scales.address();
  args[QuantizeArgs::y_row_stride] = y.stride();
  run_kernel(engine, build(spec), args);
  EXPECT_TRUE(y.intact() && scales.intact());
  for (std::int64_t r = 0; r < count; ++r) {
    const Quantized wanted = quantized(values[static_cast<std::size_t>(r)]);
    const double scale = ops::read_scalar(DataType::f32, scales.row(r));
    ASSERT_TRUE(scale == static_cast<double>(wanted.scale) ||
                (std::isnan(scale) && std::isnan(wanted.scale)))
        << print(spec) << "row " << r << ": " << scale << " for " << wanted.scale;
    ASSERT_EQ(std::memcmp(y.row(r), wanted.integers.data(), wanted.integers.size()), 0)
        << print(spec) << "row " << r;
  }
}

TEST_P(QuantizeKernels, GiveTheBitsOfTheDefinition) {
  std::mt19937 random(3);
  const auto [lanes, engine] = GetParam();
  for (int head_dim : {1, 2, 6, 7, 8, 15, 16, 34, 64, 80, 96, 100, 128, 256, 300}) {
    for (DataType input : {DataType::f32, DataType::bf16, DataType::f16}) {
      for (Flush flush : {Flush::end, Flush::start}) {
        check(engine, {lanes, head_dim, input}, flush, random);
        if (HasFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, QuantizeKernels, ::testing::ValuesIn(machines()), machine_name);

TEST(QuantizeKernel, PrintIsTheKey) {
  EXPECT_EQ(print(QuantizeKernel{16, 80, DataType::bf16}),
            "quantize lanes=16 head_dim=80 input=bf16\n");
}

}  // namespace
}  // namespace tilewright
