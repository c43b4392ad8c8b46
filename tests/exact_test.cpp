// Tests of ops/gemm/exact: every value of a 16-bit type fits and comes back bit for bit, its fp32
// neighbours do not fit; one odd value anywhere decides for a whole weight.
#include "ops/gemm/exact.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

std::uint32_t widened(DataType type, std::uint16_t bits) {
  return std::bit_cast<std::uint32_t>(static_cast<float>(read_scalar(type, &bits)));
}

bool is_nan(std::uint32_t bits) { return std::isnan(std::bit_cast<float>(bits)); }

TEST(Exact, EveryValueOfTheTypeFitsAndComesBack) {
  for (DataType type : {DataType::bf16, DataType::f16}) {
    for (std::uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
      const auto bits = static_cast<std::uint16_t>(pattern);
      const std::uint32_t wide = type == DataType::bf16 ? pattern << 16 : widened(type, bits);
      if (type == DataType::f16 && is_nan(wide)) {
        EXPECT_FALSE(fits(type, {&wide, 1}));
        continue;
      }
      ASSERT_TRUE(fits(type, {&wide, 1})) << pattern;
      std::uint16_t back = 0;
      narrow(type, {&wide, 1}, &back);
      ASSERT_EQ(back, bits);
    }
  }
}

TEST(Exact, NeighboursDoNotFit) {
  for (DataType type : {DataType::bf16, DataType::f16}) {
    for (std::uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
      const std::uint32_t wide = type == DataType::bf16
                                     ? pattern << 16
                                     : widened(type, static_cast<std::uint16_t>(pattern));
      if (is_nan(wide)) continue;
      for (std::uint32_t neighbour : {wide + 1, wide - 1}) {
        EXPECT_FALSE(fits(type, {&neighbour, 1})) << neighbour;
      }
    }
  }
}

// What a double says about every exponent and a few mantissas, independently of the bit tricks.
TEST(Exact, HalfAgreesWithRounding) {
  for (std::uint32_t sign_and_exponent = 0; sign_and_exponent < 512; ++sign_and_exponent) {
    for (std::uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += 1u << 11) {
      const std::uint32_t bits = sign_and_exponent << 23 | mantissa;
      const auto value = static_cast<double>(std::bit_cast<float>(bits));
      const bool expected = !std::isnan(value) && rounded_to(DataType::f16, value) == value;
      ASSERT_EQ(fits(DataType::f16, {&bits, 1}), expected) << value;
    }
  }
}

TEST(Exact, OneValueDecides) {
  constexpr std::int64_t k = 37, pitch = 40;
  std::vector<float> first(5 * pitch, 1.5f), second(9 * pitch, -0.25f);
  const std::vector<WeightBlock> blocks = {{first.data(), 5, pitch * 4},
                                           {second.data(), 9, pitch * 4}};
  EXPECT_EQ(exact_type(blocks, k), DataType::bf16);
  for (float* place : {&first[0], &second[8 * pitch + k - 1]}) {
    float& value = *place;
    const float before = value;
    value = 1.0f + 0x1p-10f;  // 11 significant bits: fp16, not bf16
    EXPECT_EQ(exact_type(blocks, k), DataType::f16);
    value = 1.0f + 0x1p-23f;
    EXPECT_EQ(exact_type(blocks, k), DataType::f32);
    value = before;
  }
  second[k] = 1.0f + 0x1p-23f;  // between rows: not part of the weight
  EXPECT_EQ(exact_type(blocks, k), DataType::bf16);
}

}  // namespace
}  // namespace tilewright::ops
