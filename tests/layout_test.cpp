// Layouts and dims: views against a brute-force walk over concrete sizes, collapsing, and the table
// of dims.
#include "ops/layout.h"

#include <gtest/gtest.h>

#include "ops/dim_table.h"

namespace tilewright::ops {
namespace {

using graph::Dim;
using graph::Shape;

graph::SymbolValues sizes() { return {{"b", 2}, {"s", 3}, {"past", 5}}; }

std::int64_t value(const Dim& dim) { return *dim.evaluate(sizes()); }

// Element offsets in row-major order of the layout's shape.
std::vector<std::int64_t> walk(const Layout& layout) {
  std::vector<std::int64_t> offsets{value(layout.offset)};
  for (std::size_t axis = 0; axis < layout.shape.size(); ++axis) {
    std::vector<std::int64_t> next;
    for (std::int64_t offset : offsets) {
      for (std::int64_t i = 0; i < value(layout.shape[axis]); ++i) {
        next.push_back(offset + i * value(layout.strides[axis]));
      }
    }
    offsets = std::move(next);
  }
  return offsets;
}

Layout tensor(const Shape& shape) { return {0, Dim(0), shape, row_major(shape)}; }

graph::Node node(graph::Op op, graph::Attributes attributes) {
  return {op, {}, {}, std::move(attributes)};
}

TEST(Layout, HeadsAreAViewOfAProjection) {
  const Dim b = Dim::symbol("b"), s = Dim::symbol("s");
  const Layout projection = tensor({b, s, 12});
  const auto part = view(
      node(graph::Op::slice, {{"axis", std::int64_t{2}}, {"start", Shape{4}}, {"end", Shape{12}}}),
      {graph::DataType::f32, {b, s, 8}}, projection);
  ASSERT_TRUE(part);
  const auto heads =
      view(node(graph::Op::reshape, {}), {graph::DataType::f32, {b, s, 2, 4}}, *part);
  ASSERT_TRUE(heads);
  const auto moved =
      view(node(graph::Op::permute, {{"order", std::vector<std::int64_t>{0, 2, 1, 3}}}),
           {graph::DataType::f32, {b, 2, s, 4}}, *heads);
  ASSERT_TRUE(moved);
  std::vector<std::int64_t> expected;
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h)
      for (int t = 0; t < 3; ++t)
        for (int d = 0; d < 4; ++d) expected.push_back(i * 36 + t * 12 + 4 + h * 4 + d);
  EXPECT_EQ(walk(*moved), expected);
}

TEST(Layout, ReshapeAcrossStridesNeedsACopy) {
  const Dim b = Dim::symbol("b"), s = Dim::symbol("s");
  Layout moved = tensor({b, s, 2, 4});
  std::swap(moved.shape[1], moved.shape[2]);
  std::swap(moved.strides[1], moved.strides[2]);
  EXPECT_FALSE(view(node(graph::Op::reshape, {}), {graph::DataType::f32, {b, s * Dim(8)}}, moved));
}

TEST(Layout, ReshapeOfAStridedMatrixKeepsItsStride) {
  const Dim b = Dim::symbol("b"), s = Dim::symbol("s");
  const Layout rows{0, Dim(3), {b * s, 8}, {Dim(20), Dim(1)}};
  const auto split =
      view(node(graph::Op::reshape, {}), {graph::DataType::f32, {b, 1, s, 2, 4}}, rows);
  ASSERT_TRUE(split);
  EXPECT_EQ(walk(*split), walk(rows));
}

TEST(Layout, BroadcastRepeats) {
  const Layout row = tensor({1, 4});
  const Layout wide = broadcast(row, {2, 3, 4});
  const std::vector<std::int64_t> offsets = walk(wide);
  for (std::size_t i = 0; i < offsets.size(); ++i)
    EXPECT_EQ(offsets[i], static_cast<std::int64_t>(i % 4));
}

TEST(Layout, CollapseMergesOnlyWhatAllAllow) {
  const Dim b = Dim::symbol("b"), s = Dim::symbol("s");
  const Layout whole = tensor({b, s, 1, 8});
  Layout padded = whole;
  padded.strides[0] = s * Dim(16);
  EXPECT_EQ(collapse(std::vector{whole, whole}, 3).size(), 1u);
  EXPECT_EQ(collapse(std::vector{whole, padded}, 3).size(), 2u);
}

TEST(DimTable, EvaluatesInternedPolynomials) {
  DimTable table;
  const Dim total = Dim::symbol("past") + Dim::symbol("s");
  const DimIndex a = table.intern(total), c = table.intern(Dim(64) * total),
                 seven = table.intern(Dim(7));
  EXPECT_EQ(table.intern(Dim::symbol("s") + Dim::symbol("past")), a);
  std::vector<std::int64_t> symbols, values;
  for (const std::string& name : table.symbols()) symbols.push_back(sizes().find(name)->second);
  table.evaluate(symbols, values);
  EXPECT_EQ(values[static_cast<std::size_t>(a)], 8);
  EXPECT_EQ(values[static_cast<std::size_t>(c)], 512);
  EXPECT_EQ(values[static_cast<std::size_t>(seven)], 7);
  const int past = table.symbol_of(table.intern(Dim::symbol("past")));
  ASSERT_GE(past, 0);
  EXPECT_EQ(table.symbols()[static_cast<std::size_t>(past)], "past");
  const DimIndex twice = table.intern(Dim(2) * Dim::symbol("s")),
                 square = table.intern(Dim::symbol("s") * Dim::symbol("s"));
  for (const DimIndex none : {a, c, seven, twice, square}) EXPECT_EQ(table.symbol_of(none), -1);
}

}  // namespace
}  // namespace tilewright::ops
