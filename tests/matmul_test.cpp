// The matmul kernel: sizes around every boundary x orientation x types against bounds in double, in
// guarded memory, by interpreter and machine code; and the reference against itself by hand.
#include "ops/gemm/matmul_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "guarded_rows.h"
#include "kernel_run.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::MatmulArgs;
using ops::MatmulKernel;

constexpr double kUnit = 0x1p-24;  // rounding error of fp32, relative

struct Problem {
  Problem(MatmulKernel kernel, std::int64_t m, std::int64_t n, std::int64_t k,
          GuardedRows::Flush flush)
      : spec(kernel),
        rows(m),
        columns(n),
        depth(k),
        x(m, k * size_in_bytes(spec.input), 12, flush),
        w(spec.transposed ? n : k, (spec.transposed ? k : n) * size_in_bytes(spec.input), 20,
          flush),
        y(m, n * size_in_bytes(spec.output), 4, flush) {
    std::mt19937 random(static_cast<unsigned>(m * 10007 + n * 101 + k));
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < k; ++j) write(x, i, j, normal(random));
    }
    for (std::int64_t j = 0; j < k; ++j) {
      for (std::int64_t c = 0; c < n; ++c) {
        spec.transposed ? write(w, c, j, normal(random)) : write(w, j, c, normal(random));
      }
    }
  }

  void write(const GuardedRows& operand, std::int64_t row, std::int64_t column,
             double value) const {
    ops::write_scalar(spec.input, operand.row(row) + column * size_in_bytes(spec.input), value);
  }
  double read(const GuardedRows& operand, DataType type, std::int64_t row,
              std::int64_t column) const {
    return ops::read_scalar(type, operand.row(row) + column * size_in_bytes(type));
  }

  std::vector<std::int64_t> args() const {
    std::vector<std::int64_t> list(MatmulArgs::count);
    list[MatmulArgs::x] = x.address();
    list[MatmulArgs::x_row_stride] = x.stride();
    list[MatmulArgs::w] = w.address();
    list[MatmulArgs::w_row_stride] = w.stride();
    list[MatmulArgs::y] = y.address();
    list[MatmulArgs::y_row_stride] = y.stride();
    list[MatmulArgs::columns] = columns;
    list[MatmulArgs::depth] = depth;
    list[MatmulArgs::block_count] = rows / block_rows(spec);
    list[MatmulArgs::single_rows] = rows % block_rows(spec);
    return list;
  }

  void expect_within_bounds(std::string_view by) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < columns; ++column) {
        double sum = 0, magnitude = 0;
        for (std::int64_t k = 0; k < depth; ++k) {
          const double right =
              spec.transposed ? read(w, spec.input, column, k) : read(w, spec.input, k, column);
          sum += read(x, spec.input, row, k) * right;
          magnitude += std::abs(read(x, spec.input, row, k) * right);
        }
        double error = static_cast<double>(depth + 8) * kUnit * magnitude + 0x1p-133;
        if (spec.output == DataType::bf16) error += 0x1p-8 * (std::abs(sum) + error);
        if (spec.output == DataType::f16) error += 0x1p-11 * (std::abs(sum) + error) + 0x1p-25;
        const double got = read(y, spec.output, row, column);
        ASSERT_LE(std::abs(got - sum), error)
            << by << ": " << print(spec) << " " << rows << "x" << columns << "x" << depth << " at "
            << row << ", " << column << ": " << got << " for " << sum;
      }
    }
    ASSERT_TRUE(y.intact()) << by << ": " << print(spec) << " wrote between rows";
  }

  MatmulKernel spec;
  std::int64_t rows, columns, depth;
  GuardedRows x, w, y;
};

class Matmul : public ::testing::TestWithParam<Machine> {
 protected:
  void check(bool transposed, DataType input, DataType output, std::int64_t m, std::int64_t n,
             std::int64_t k) const {
    const MatmulKernel spec{GetParam().lanes, transposed, input, output};
    ASSERT_TRUE(supported(spec).ok());
    for (GuardedRows::Flush flush : {GuardedRows::Flush::end, GuardedRows::Flush::start}) {
      const Problem problem(spec, m, n, k, flush);
      run_kernel(GetParam().engine, build(spec), problem.args());
      problem.expect_within_bounds(name(GetParam().engine));
      if (HasFatalFailure()) return;
    }
  }
};

TEST_P(Matmul, MatchesTheBoundsForEveryShape) {
  for (bool transposed : {false, true}) {
    for (std::int64_t m : {0, 1, 2, 3, 6, 7, 12, 13}) {
      for (std::int64_t n : {1, 3, 4, 7, 8, 15, 16, 17, 32, 71}) {
        for (std::int64_t k : {0, 1, 7, 16, 33, 128, 129, 300}) {
          check(transposed, DataType::f32, DataType::f32, m, n, k);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(Matmul, MatchesTheBoundsForEveryType) {
  for (bool transposed : {false, true}) {
    for (DataType input : {DataType::f32, DataType::bf16, DataType::f16}) {
      for (DataType output : {DataType::f32, DataType::bf16, DataType::f16}) {
        for (std::int64_t n : {5, 16, 27}) check(transposed, input, output, 8, n, 37);
        if (HasFatalFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, Matmul, ::testing::ValuesIn(machines()), machine_name);

TEST(MatmulReference, AgreesWithTheBounds) {
  for (bool transposed : {false, true}) {
    const MatmulKernel spec{8, transposed, DataType::bf16, DataType::f32};
    const Problem problem(spec, 5, 9, 21, GuardedRows::Flush::end);
    reference(spec, problem.args().data());
    problem.expect_within_bounds("reference");
  }
}

TEST(MatmulKernel, SaysWhatItCannotDo) {
  EXPECT_FALSE(ops::supported({8, false, DataType::f64, DataType::f64}).ok());
  EXPECT_FALSE(ops::supported({4, false, DataType::f32, DataType::f32}).ok());
}

}  // namespace
}  // namespace tilewright
