// Packing of linear weights against the layout as pack.h states it, element by element.
#include "ops/gemm/pack.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

// Where pack.h says that element (row, k) of the stacked weight is, in elements.
std::int64_t packed_index(std::int64_t column, std::int64_t panel, std::int64_t k,
                          std::int64_t depth, DataType dtype) {
  if (dtype == DataType::f32) return (panel * depth + k) * 32 + column;
  const std::int64_t pairs = (depth + 31) / 32 * 32 / 2;
  return (((panel * pairs + k / 2) * 2 + column / 16) * 16 + column % 16) * 2 + k % 2;
}

// Bits that differ for every element, so that no two can be exchanged unnoticed.
template <class Bits>
std::vector<Bits> random_bits(std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<Bits> bits(static_cast<std::size_t>(count));
  for (Bits& value : bits) value = static_cast<Bits>(engine() | 1u);
  return bits;
}

// A [k, rows] block is packed as the [rows, k] block that it is the transpose of.
template <class Bits>
void check_transposed(std::int64_t rows, std::int64_t k, DataType dtype) {
  const auto size = static_cast<std::int64_t>(sizeof(Bits));
  const std::vector<Bits> plain = random_bits<Bits>(rows * k, 1);
  std::vector<Bits> turned(plain.size());
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < k; ++i) {
      turned[static_cast<std::size_t>(i * rows + row)] =
          plain[static_cast<std::size_t>(row * k + i)];
    }
  }
  const auto bytes = static_cast<std::size_t>(packed_bytes(rows, k, dtype));
  std::vector<std::byte> expected(bytes), got(bytes);
  const WeightBlock as_rows{plain.data(), rows, k * size};
  const WeightBlock as_columns{turned.data(), rows, rows * size, true};
  const std::int64_t panels = (rows + 31) / 32;
  pack_panels(std::span(&as_rows, 1), k, dtype, dtype, false, 0, panels, expected.data());
  pack_panels(std::span(&as_columns, 1), k, dtype, dtype, false, 0, panels, got.data());
  EXPECT_EQ(got, expected) << rows << " x " << k;
}

TEST(Pack, Transposed) {
  for (std::int64_t rows : {1, 31, 32, 33, 80}) {
    for (std::int64_t k : {1, 5, 16, 33, 64}) {
      check_transposed<std::uint32_t>(rows, k, DataType::f32);
      check_transposed<std::uint16_t>(rows, k, DataType::bf16);
    }
  }
}

struct Shape {
  std::vector<std::int64_t> rows;  // of the stacked blocks
  std::int64_t k;
  std::int64_t row_padding = 0;  // elements between rows
  bool gated = false;
};

template <class Bits>
void check(const Shape& shape, DataType dtype) {
  SCOPED_TRACE(testing::Message() << "k=" << shape.k << " blocks=" << shape.rows.size()
                                  << " rows=" << shape.rows[0] << " gated=" << shape.gated);
  std::vector<std::vector<Bits>> sources;
  std::vector<WeightBlock> blocks;
  std::int64_t n = 0;
  const std::int64_t pitch = shape.k + shape.row_padding;
  for (std::int64_t rows : shape.rows) {
    // Exactly as long as the block: with AddressSanitizer a read beyond it is an error.
    const std::int64_t count = (rows - 1) * pitch + shape.k;
    sources.push_back(random_bits<Bits>(count, static_cast<unsigned>(sources.size() + 1)));
    blocks.push_back(
        {sources.back().data(), rows, pitch * static_cast<std::int64_t>(sizeof(Bits))});
    n += rows;
  }
  const std::int64_t panels = (n + 31) / 32;
  const auto size = static_cast<std::size_t>(packed_bytes(n, shape.k, dtype)) / sizeof(Bits);
  std::vector<Bits> expected(size, 0);
  std::int64_t stacked = 0;
  for (std::size_t block = 0; block < blocks.size(); ++block) {
    for (std::int64_t row = 0; row < blocks[block].rows; ++row, ++stacked) {
      std::int64_t panel = stacked / 32, column = stacked % 32;
      if (shape.gated) {
        panel = row / 16;
        column = row % 16 + 16 * static_cast<std::int64_t>(block);
      }
      for (std::int64_t k = 0; k < shape.k; ++k) {
        expected[static_cast<std::size_t>(packed_index(column, panel, k, shape.k, dtype))] =
            sources[block][static_cast<std::size_t>(row * pitch + k)];
      }
    }
  }
  // Canaries behind the panels; and panels one by one, in another order, as threads would.
  std::vector<Bits> packed(size + 8, static_cast<Bits>(0x7ff1));
  for (std::int64_t panel = panels - 1; panel >= 0; --panel) {
    pack_panels(blocks, shape.k, dtype, dtype, shape.gated, panel, panel + 1, packed.data());
  }
  for (std::size_t i = size; i < packed.size(); ++i) EXPECT_EQ(packed[i], 0x7ff1);
  packed.resize(size);
  EXPECT_TRUE(packed == expected);
  std::vector<Bits> at_once(size);
  pack_panels(blocks, shape.k, dtype, dtype, shape.gated, 0, panels, at_once.data());
  EXPECT_TRUE(at_once == expected);
}

void check_all_types(const Shape& shape) {
  check<std::uint32_t>(shape, DataType::f32);
  check<std::uint16_t>(shape, DataType::bf16);
  check<std::uint16_t>(shape, DataType::f16);
}

TEST(Pack, EveryShapeOfPanel) {
  for (std::int64_t n : {1, 15, 31, 32, 33, 64, 100}) {
    for (std::int64_t k : {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100}) {
      check_all_types({{n}, k});
    }
  }
}

TEST(Pack, RowsWithAStride) {
  check_all_types({{33}, 37, 5});
  check_all_types({{33}, 64, 1});
}

TEST(Pack, StackedBlocksMeetInsideAPanel) {
  check_all_types({{48, 16, 16}, 40});
  check_all_types({{5, 1, 60}, 33});
}

TEST(Pack, Gated) {
  for (std::int64_t rows : {1, 15, 16, 17, 40}) {
    for (std::int64_t k : {1, 31, 32, 50}) check_all_types({{rows, rows}, k, 0, true});
  }
}

// fp32 that fits 16 bits packs to what its narrowed rows pack to.
TEST(Pack, NarrowsWhatFits) {
  for (DataType type : {DataType::bf16, DataType::f16}) {
    for (std::int64_t k : {1, 40, 64}) {
      constexpr std::int64_t rows = 45;
      std::vector<std::uint16_t> narrow(static_cast<std::size_t>(rows * k));
      std::vector<float> wide;
      for (std::size_t i = 0; i < narrow.size(); ++i) {
        narrow[i] = static_cast<std::uint16_t>(0x2000 + 7 * i);
        wide.push_back(static_cast<float>(read_scalar(type, &narrow[i])));
      }
      const auto size = static_cast<std::size_t>(packed_bytes(rows, k, type));
      std::vector<char> expected(size, 1), packed(size, 2);
      const std::vector<WeightBlock> narrow_block = {{narrow.data(), rows, k * 2}};
      const std::vector<WeightBlock> wide_block = {{wide.data(), rows, k * 4}};
      pack_panels(narrow_block, k, type, type, false, 0, 2, expected.data());
      pack_panels(wide_block, k, DataType::f32, type, false, 0, 2, packed.data());
      EXPECT_TRUE(packed == expected);
    }
  }
}

TEST(Pack, BytesRoundUp) {
  EXPECT_EQ(packed_bytes(33, 5, DataType::f32), 64 * 5 * 4);
  EXPECT_EQ(packed_bytes(33, 5, DataType::bf16), 64 * 32 * 2);
  EXPECT_EQ(packed_bytes(32, 64, DataType::f16), 32 * 64 * 2);
}

}  // namespace
}  // namespace tilewright::ops
