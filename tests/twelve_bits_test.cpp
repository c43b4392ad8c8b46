// Weights in 12 bits: packing and unpacking is the identity over all bf16 patterns and over tensors
// made to defeat it, and the sizes are those that twelve_bits.h promises.
#include "ops/gemm/twelve_bits.h"

#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "ops/gemm/pack.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using Bits = std::vector<std::uint16_t>;
using Random = std::mt19937;

struct Packed {
  std::vector<std::byte> bytes;
  std::int64_t rows, k;

  Packed(const Bits& values, std::int64_t row_count, std::int64_t depth)
      : rows(row_count), k(depth) {
    const WeightBlock block{values.data(), rows, 2 * k};
    const std::int64_t panels = (rows + 31) / 32;
    const std::int64_t panel = packed_bytes(32, k, DataType::bf16) / 2;
    Bits pairs(static_cast<std::size_t>(panels * panel));
    pack_panels({&block, 1}, k, DataType::bf16, DataType::bf16, false, 0, panels, pairs.data());
    twelve_bits::Packer packer(panels, k);
    for (std::int64_t i = 0; i < panels; ++i) packer.inspect(i, pairs.data() + i * panel);
    bytes.resize(static_cast<std::size_t>(packer.place()));
    for (std::int64_t i = 0; i < panels; ++i) {
      packer.pack(i, pairs.data() + i * panel, bytes.data());
    }
  }

  Bits unpacked() const {
    Bits values(static_cast<std::size_t>(rows * k));
    for (std::int64_t row = 0; row < rows; ++row) {
      unpack_row(bytes.data(), row, k, {DataType::bf16, true}, DataType::bf16,
                 values.data() + row * k);
    }
    return values;
  }
};

void expect_identity(const Bits& values, std::int64_t rows, std::int64_t k) {
  EXPECT_EQ(Packed(values, rows, k).unpacked(), values) << rows << " x " << k;
}

Bits made(std::int64_t count, const std::function<std::uint32_t(std::int64_t)>& value) {
  Bits bits(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    bits[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(value(i));
  }
  return bits;
}

std::uint16_t normal(Random& random, double deviation) {
  std::uint16_t bits = 0;
  write_scalar(DataType::bf16, &bits, std::normal_distribution<double>(0, deviation)(random));
  return bits;
}

// All in order (each step has one or two high bytes), and all shuffled (no step fits a table).
TEST(TwelveBits, KeepAllPatterns) {
  Bits all(65536);
  std::iota(all.begin(), all.end(), std::uint16_t{0});
  for (std::int64_t k : {8, 64, 256, 2048}) expect_identity(all, 65536 / k, k);
  std::shuffle(all.begin(), all.end(), Random(1));
  for (std::int64_t k : {8, 64, 256, 2048}) expect_identity(all, 65536 / k, k);
}

// Every pattern once as the only one that is not in the table, in every place of a step in turn.
TEST(TwelveBits, KeepEachPatternAmongOthers) {
  Random random(2);
  for (std::uint32_t first = 0; first < 65536; first += 8192) {
    const std::int64_t rows = 256, k = 8192;  // 8192 steps
    Bits values = made(rows * k, [&](std::int64_t) { return normal(random, 0.02); });
    for (std::int64_t i = 0; i < 8192; ++i) {
      const std::int64_t row = i % 8 * 32 + i * 7 % 32, at = i / 8 * 8 + i % 8;
      values[static_cast<std::size_t>(row * k + at)] =
          static_cast<std::uint16_t>(first + static_cast<std::uint32_t>(i));
    }
    expect_identity(values, rows, k);
  }
}

TEST(TwelveBits, KeepAdversarialTensors) {
  Random random(3);
  const std::vector<std::function<std::uint32_t(std::int64_t)>> tensors = {
      [](std::int64_t) { return 0u; },
      [](std::int64_t) { return 0x8000u; },
      [](std::int64_t) { return 0xffffu; },                                    // NaN
      [](std::int64_t i) { return i % 2 == 0 ? 0x7f80u : 0xff80u; },           // infinities
      [](std::int64_t i) { return static_cast<std::uint32_t>(i % 128); },      // subnormals
      [](std::int64_t i) { return static_cast<std::uint32_t>(i % 16 << 8); },  // 16 high bytes
      [](std::int64_t i) { return static_cast<std::uint32_t>(i % 17 << 8); },  // one too many
      [](std::int64_t i) { return static_cast<std::uint32_t>(i * 0x9e37 >> 3); },
      [&](std::int64_t) { return static_cast<std::uint32_t>(random()); },
      [&](std::int64_t i) { return i % 1000 == 0 ? 0u : normal(random, 1e-3); },
      [&](std::int64_t i) {
        return normal(random, std::ldexp(1.0, static_cast<int>(i % 90) - 45));
      },
  };
  for (const auto& tensor : tensors) {
    for (const auto& [rows, k] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {1, 1}, {32, 8}, {33, 9}, {31, 127}, {64, 128}, {40, 129}, {96, 1000}}) {
      expect_identity(made(rows * k, tensor), rows, k);
    }
  }
}

// 12 bits and the entries if nothing is outside; 4 bits more for each weight of a step with one.
TEST(TwelveBits, AreTwelve) {
  const std::int64_t rows = 64, k = 1024;
  const std::int64_t entries = (2 * twelve_bits::entry_bytes(k) + 63) / 64 * 64;
  Bits values(static_cast<std::size_t>(rows * k), 0x3f80);
  EXPECT_EQ(Packed(values, rows, k).bytes.size(), entries + rows * k * 12 / 8);
  // 17 high bytes, in as many columns of a stretch's last step: some are left out.
  for (std::int64_t i = 0; i < 17; ++i) {
    for (std::int64_t step = 15; step < k / 8; step += 16) {
      values[static_cast<std::size_t>(i * k + step * 8)] = static_cast<std::uint16_t>(i << 8);
    }
  }
  EXPECT_EQ(Packed(values, rows, k).bytes.size(), entries + rows * k * 12 / 8 + k / 128 * 128);
}

TEST(TwelveBits, HoldNormalWeightsInLittleMore) {
  Random random(4);
  const std::int64_t rows = 512, k = 2048;
  const Packed packed(made(rows * k, [&](std::int64_t) { return normal(random, 0.02); }), rows, k);
  EXPECT_LT(static_cast<double>(packed.bytes.size()), 0.77 * rows * k * 2);
}

// A stretch takes over the table of the one before only where its own would hold no more weights.
TEST(TwelveBits, TablesDoNotSufferFromTheirNeighbours) {
  Random random(5);
  const std::int64_t rows = 32, k = 128, stretches = 16;
  Bits all(static_cast<std::size_t>(rows * k * stretches));
  std::int64_t alone = 0;
  for (std::int64_t stretch = 0; stretch < stretches; ++stretch) {
    // Neighbours that share most, some or none of their high bytes.
    const double deviation = std::ldexp(0.02, static_cast<int>(stretch * stretch % 7));
    const Bits values = made(rows * k, [&](std::int64_t) { return normal(random, deviation); });
    for (std::int64_t i = 0; i < rows * k; ++i) {
      const std::int64_t at = (i / k * stretches + stretch) * k + i % k;
      all[static_cast<std::size_t>(at)] = values[static_cast<std::size_t>(i)];
    }
    alone += std::ssize(Packed(values, rows, k).bytes) - 64;  // its entry
  }
  const std::int64_t entry = (twelve_bits::entry_bytes(k * stretches) + 63) / 64 * 64;
  EXPECT_EQ(std::ssize(Packed(all, rows, k * stretches).bytes), entry + alone);
}

}  // namespace
}  // namespace tilewright::ops
