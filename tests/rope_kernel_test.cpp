// The rope, copy and embedding kernels against scalar code, with guard pages around every operand.
#include "ops/rope_kernel.h"

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "guarded_rows.h"
#include "kernel_run.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::CopyArgs;
using ops::CopyKernel;
using ops::EmbeddingArgs;
using ops::PieceArgs;
using ops::RopeArgs;
using ops::RopeKernel;
using Flush = GuardedRows::Flush;

constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};

class RopeKernels : public ::testing::TestWithParam<Machine> {};

void fill(GuardedRows& rows, std::int64_t count, std::int64_t columns, DataType type,
          std::mt19937& random) {
  std::normal_distribution<double> normal(0, 3);
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t i = 0; i < columns; ++i) {
      ops::write_scalar(type, rows.row(r) + i * size_in_bytes(type), normal(random));
    }
  }
}

double element(const GuardedRows& rows, std::int64_t r, std::int64_t i, DataType type) {
  return ops::read_scalar(type, rows.row(r) + i * size_in_bytes(type));
}

double unit_roundoff(DataType type) {
  return type == DataType::bf16 ? 0x1p-8 : type == DataType::f16 ? 0x1p-11 : 0x1p-24;
}

// x * cos + rotate_half(x) * sin, in double.
double rotated(const GuardedRows& x, const GuardedRows& cos, const GuardedRows& sin,
               const RopeKernel& spec, std::int64_t r, int i, double* magnitude) {
  const int half = spec.head_dim / 2;
  const double partner =
      i < half ? -element(x, r, i + half, spec.input) : element(x, r, i - half, spec.input);
  const double direct = element(x, r, i, spec.input) * element(cos, 0, i, spec.table);
  const double turned = partner * element(sin, 0, i, spec.table);
  *magnitude = std::abs(direct) + std::abs(turned);
  return direct + turned;
}

void check_rope(Engine engine, const RopeKernel& spec, bool in_place, std::mt19937& random) {
  constexpr std::int64_t kRows = 3;
  const auto rows_of = [&](DataType type, std::int64_t rows, Flush flush) {
    return GuardedRows(rows, spec.head_dim * size_in_bytes(type), 3 * size_in_bytes(type), flush);
  };
  const GuardedRows input = rows_of(spec.input, kRows, Flush::end);
  GuardedRows x = rows_of(spec.input, kRows, Flush::end);
  GuardedRows y = rows_of(spec.output, kRows, Flush::start);
  GuardedRows cos = rows_of(spec.table, 1, Flush::end), sin = rows_of(spec.table, 1, Flush::start);
  fill(x, kRows, spec.head_dim, spec.input, random);
  fill(cos, 1, spec.head_dim, spec.table, random);
  fill(sin, 1, spec.head_dim, spec.table, random);
  for (std::int64_t r = 0; r < kRows; ++r) {
    std::memcpy(input.row(r), x.row(r),
                static_cast<std::size_t>(spec.head_dim * size_in_bytes(spec.input)));
  }
  const GuardedRows& output = in_place ? x : y;
  std::array<std::int64_t, RopeArgs::count> args{};
  args[RopeArgs::rows] = kRows;
  args[RopeArgs::x] = x.address();
  args[RopeArgs::x_row_stride] = x.stride();
  args[RopeArgs::cos] = cos.address();
  args[RopeArgs::sin] = sin.address();
  args[RopeArgs::y] = output.address();
  args[RopeArgs::y_row_stride] = output.stride();
  run_kernel(engine, build(spec), args);
  EXPECT_TRUE(output.intact());
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (int i = 0; i < spec.head_dim; ++i) {
      double magnitude = 0;
      const double expected = rotated(input, cos, sin, spec, r, i, &magnitude);
      const double allowed =
          2 * 0x1p-24 * magnitude + unit_roundoff(spec.output) * std::abs(expected) + 1e-7;
      ASSERT_NEAR(element(output, r, i, spec.output), expected, allowed)
          << print(spec) << "row " << r << " element " << i;
    }
  }
}

TEST_P(RopeKernels, RotateEveryTypeAndHeadDimension) {
  std::mt19937 random(1);
  const auto [lanes, engine] = GetParam();
  for (int head_dim : {2, 6, 16, 32, 34, 64, 80, 96, 128, 256, 300}) {
    for (DataType input : kFloats) {
      for (DataType table : kFloats) {
        for (DataType output : kFloats) {
          check_rope(engine, {lanes, head_dim, input, table, output}, false, random);
          if (input == output)
            check_rope(engine, {lanes, head_dim, input, table, output}, true, random);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(RopeKernel, PrintIsTheKey) {
  EXPECT_EQ(print(RopeKernel{8, 64, DataType::bf16, DataType::f32, DataType::bf16}),
            "rope lanes=8 head_dim=64 input=bf16 table=f32 output=bf16\n");
  EXPECT_EQ(print(CopyKernel{16, DataType::f32, DataType::bf16}),
            "copy lanes=16 input=f32 output=bf16\n");
  EXPECT_EQ(print_pieces(CopyKernel{8}), "pieces lanes=8 input=f32 output=f32\n");
  EXPECT_EQ(print_embedding(CopyKernel{8}), "embedding lanes=8 input=f32 output=f32\n");
}

constexpr std::array<std::int64_t, 18> kColumns{0,  1,  2,  3,  4,  5,  7,   8,   9,
                                                15, 16, 17, 31, 33, 64, 100, 576, 1000};

class CopyCase {
 public:
  CopyCase(const CopyKernel& spec, std::int64_t columns, std::mt19937& random)
      : spec_(spec), columns_(columns), x_(rows(spec.input, 4)), y_(rows(spec.output, kRows)) {
    fill(x_, 4, columns, spec.input, random);
  }

  void copy(Engine engine) {
    std::array<std::int64_t, CopyArgs::count> args{};
    args[CopyArgs::rows] = kRows;
    args[CopyArgs::columns] = columns_;
    args[CopyArgs::x] = x_.address();
    args[CopyArgs::x_row_stride] = x_.stride();
    args[CopyArgs::y] = y_.address();
    args[CopyArgs::y_row_stride] = y_.stride();
    run_kernel(engine, build(spec_), args);
    check({0, 1, 2});
  }

  // As many pieces as are full.
  void cut(Engine engine) {
    const std::int64_t piece = spec_.lanes * 4;
    const std::int64_t length = piece / size_in_bytes(spec_.output), pieces = columns_ / length;
    GuardedRows y(1, std::max<std::int64_t>(pieces, 1) * kRows * piece, 1, Flush::end);
    std::array<std::int64_t, PieceArgs::count> args{};
    args[PieceArgs::rows] = kRows;
    args[PieceArgs::pieces] = pieces;
    args[PieceArgs::x] = x_.address();
    args[PieceArgs::x_row_stride] = x_.stride();
    args[PieceArgs::y] = y.address();
    run_kernel(engine, build_pieces(spec_), args);
    for (std::int64_t i = 0; i < pieces * length; ++i) {
      for (std::int64_t row = 0; row < kRows; ++row) {
        const std::byte* at = y.row(0) + (i / length * kRows + row) * piece;
        const double expected = ops::rounded_to(spec_.output, element(x_, row, i, spec_.input));
        ASSERT_EQ(ops::read_scalar(spec_.output, at + i % length * size_in_bytes(spec_.output)),
                  expected)
            << print_pieces(spec_) << columns_ << " columns, row " << row << " element " << i;
      }
    }
  }

  void embed(Engine engine) {
    const std::array<std::int64_t, kRows> indices{3, 0, 3};
    std::array<std::int64_t, EmbeddingArgs::count> args{};
    args[EmbeddingArgs::rows] = kRows;
    args[EmbeddingArgs::columns] = columns_;
    args[EmbeddingArgs::table] = x_.address();
    args[EmbeddingArgs::table_row_stride] = x_.stride();
    args[EmbeddingArgs::indices] = std::bit_cast<std::int64_t>(indices.data());
    args[EmbeddingArgs::y] = y_.address();
    args[EmbeddingArgs::y_row_stride] = y_.stride();
    run_kernel(engine, build_embedding(spec_), args);
    check(indices);
  }

 private:
  static constexpr std::int64_t kRows = 3;

  GuardedRows rows(DataType type, std::int64_t count) const {
    const std::int64_t size = size_in_bytes(type);
    return {count, columns_ * size, size, Flush::end};
  }

  void check(const std::array<std::int64_t, kRows>& source) {
    EXPECT_TRUE(y_.intact());
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t from = source[static_cast<std::size_t>(r)];
      if (spec_.input == spec_.output) {
        const auto bytes = static_cast<std::size_t>(columns_ * size_in_bytes(spec_.input));
        ASSERT_EQ(std::memcmp(y_.row(r), x_.row(from), bytes), 0)
            << print(spec_) << columns_ << " columns, row " << r;
        continue;
      }
      for (std::int64_t i = 0; i < columns_; ++i) {
        const double expected = ops::rounded_to(spec_.output, element(x_, from, i, spec_.input));
        ASSERT_EQ(element(y_, r, i, spec_.output), expected)
            << print(spec_) << columns_ << " columns, row " << r << " element " << i;
      }
    }
  }

  CopyKernel spec_;
  std::int64_t columns_;
  GuardedRows x_, y_;
};

TEST_P(RopeKernels, CopyRowsOfAnyTypeAndLength) {
  std::mt19937 random(2);
  const auto [lanes, engine] = GetParam();
  for (std::int64_t columns : kColumns) {
    for (DataType input : kFloats) {
      for (DataType output : kFloats) {
        CopyCase({lanes, input, output}, columns, random).copy(engine);
        CopyCase({lanes, input, output}, columns, random).embed(engine);
        if (output != DataType::f32 && input != output) continue;
        CopyCase({lanes, input, output}, columns, random).cut(engine);
      }
    }
    for (DataType type : {DataType::i64, DataType::f64, DataType::i32, DataType::i16, DataType::u8,
                          DataType::boolean}) {
      CopyCase({lanes, type, type}, columns, random).copy(engine);
      CopyCase({lanes, type, type}, columns, random).embed(engine);
      if (HasFailure()) return;
    }
  }
}

// Every bit pattern of the 16-bit types survives a round trip, and agrees with the kernels' loads.
TEST_P(RopeKernels, WidenAllSixteenBitPatterns) {
  for (DataType type : {DataType::bf16, DataType::f16}) {
    const std::int64_t count = 1 << 16;
    std::vector<std::uint16_t> all(count), back(count);
    std::vector<float> widened(count);
    for (std::int64_t i = 0; i < count; ++i)
      all[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(i);
    std::array<std::int64_t, CopyArgs::count> args{1,
                                                   count,
                                                   std::bit_cast<std::int64_t>(all.data()),
                                                   0,
                                                   std::bit_cast<std::int64_t>(widened.data()),
                                                   0};
    run_kernel(GetParam().engine, build(CopyKernel{GetParam().lanes, type, DataType::f32}), args);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double value = ops::read_scalar(type, &all[i]);
      ops::write_scalar(type, &back[i], value);
      if (std::isnan(value)) {
        ASSERT_TRUE(std::isnan(widened[i]));
        ASSERT_TRUE(std::isnan(ops::read_scalar(type, &back[i])));
      } else {
        ASSERT_EQ(widened[i], value) << i;
        ASSERT_EQ(back[i], all[i]) << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, RopeKernels, ::testing::ValuesIn(machines()), machine_name);

}  // namespace
}  // namespace tilewright
