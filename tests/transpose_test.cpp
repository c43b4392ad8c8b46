// Squares of vectors turned by vectors, against indices, for each number of lanes.
#include "ops/attention/transpose.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernel_run.h"

namespace tilewright {
namespace {

using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

class Transpose : public ::testing::TestWithParam<Machine> {};

TEST_P(Transpose, ExchangesRowsAndColumns) {
  const int lanes = GetParam().lanes;
  Builder b("transpose", lanes, 2);
  const Reg from = b.arg(0), to = b.arg(1);
  std::vector<Reg> square;
  for (int row = 0; row < lanes; ++row) {
    square.push_back(b.load(Element::i32, b.at(from, row * b.vector_bytes())));
  }
  square = ops::transpose(b, square);
  for (int row = 0; row < lanes; ++row) {
    b.store(Element::i32, b.at(to, row * b.vector_bytes()), square[static_cast<std::size_t>(row)]);
  }
  std::vector<std::int32_t> x, y(static_cast<std::size_t>(lanes * lanes));
  for (int i = 0; i < lanes * lanes; ++i) x.push_back(i);
  const std::vector<std::int64_t> arguments{reinterpret_cast<std::int64_t>(x.data()),
                                            reinterpret_cast<std::int64_t>(y.data())};
  run_kernel(GetParam().engine, std::move(b).finish(), arguments);
  for (int row = 0; row < lanes; ++row) {
    for (int column = 0; column < lanes; ++column) {
      EXPECT_EQ(y[static_cast<std::size_t>(row * lanes + column)], column * lanes + row);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, Transpose, ::testing::ValuesIn(machines()), machine_name);

}  // namespace
}  // namespace tilewright
