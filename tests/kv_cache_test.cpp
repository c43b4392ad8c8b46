// KvCache: growth, addressing, commit, truncation, reading and reordering, against a plain array.
#include "ops/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <vector>

namespace tilewright::ops {
namespace {

std::vector<float> numbers(std::int64_t count, float start) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::iota(values.begin(), values.end(), start);
  return values;
}

TEST(KvCache, WriteThenReadAcrossBlocks) {
  KvCache cache(2, 3, 5, graph::DataType::f32);
  const std::int64_t length = 2 * KvCache::block_tokens + 7;
  const std::vector<float> keys = numbers(2 * 3 * length * 5, 0),
                           values = numbers(2 * 3 * length * 5, 1e6f);
  ASSERT_TRUE(cache.write(length, graph::DataType::f32, keys.data(), values.data()).ok());
  EXPECT_EQ(cache.length(), length);
  std::vector<float> read_keys(keys.size()), read_values(values.size());
  cache.read(cache.length(), graph::DataType::f32, read_keys.data(), read_values.data());
  EXPECT_EQ(read_keys, keys);
  EXPECT_EQ(read_values, values);
}

TEST(BlockMemory, BlocksAreZeroedAndApartAndComeBack) {
  constexpr std::size_t bytes = 96'000;  // 21 of a slab
  std::vector<BlockBytes> blocks;
  for (int i = 0; i < 50; ++i) {
    blocks.push_back(allocate_block(bytes));
    ASSERT_TRUE(blocks.back());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(blocks.back().get()) % 64, 0u);
    EXPECT_EQ(std::count(blocks.back().get(), blocks.back().get() + bytes, 0), bytes);
    std::fill_n(blocks.back().get(), bytes, static_cast<char>(i + 1));
  }
  for (int i = 0; i < 50; ++i) {
    const char* block = blocks[static_cast<std::size_t>(i)].get();
    EXPECT_EQ(std::count(block, block + bytes, static_cast<char>(i + 1)), bytes) << i;
  }
  const std::size_t before = slab_bytes();
  blocks.clear();
  EXPECT_EQ(slab_bytes(), before);  // idle, for the next sequence
  const BlockBytes again = allocate_block(bytes);
  EXPECT_EQ(std::count(again.get(), again.get() + bytes, 0), bytes);
  EXPECT_EQ(slab_bytes(), before);
}

TEST(BlockMemory, NoMoreThanSixtyFourMegabytesStayIdle) {
  constexpr std::size_t megabyte = 1u << 20;
  std::vector<BlockBytes> blocks;
  for (int i = 0; i < 400; ++i) blocks.push_back(allocate_block(megabyte / 2));
  EXPECT_GE(slab_bytes(), 200 * megabyte);
  blocks.clear();
  EXPECT_LE(slab_bytes(), 64 * megabyte);
  EXPECT_FALSE(allocate_block(std::size_t{1} << 60));
}

TEST(KvCache, TablesFindEveryTokenOfEveryHead) {
  KvCache cache(2, 3, 4, graph::DataType::f32);
  const std::int64_t length = KvCache::block_tokens + 3;
  const std::vector<float> keys = numbers(2 * 3 * length * 4, 0),
                           values = numbers(2 * 3 * length * 4, 1e6f);
  ASSERT_TRUE(cache.write(length, graph::DataType::f32, keys.data(), values.data()).ok());
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < 3; ++h) {
      for (std::int64_t t = 0; t < length; ++t) {
        const std::int64_t block = t / KvCache::block_tokens, inside = t % KvCache::block_tokens;
        const char* key =
            static_cast<const char*>(cache.key_blocks(b, h)[block]) + inside * cache.token_stride();
        const char* value = static_cast<const char*>(cache.value_blocks(b, h)[block]) +
                            inside * cache.token_stride();
        const std::size_t at = static_cast<std::size_t>(((b * 3 + h) * length + t) * 4);
        EXPECT_EQ(std::memcmp(key, &keys[at], 16), 0);
        EXPECT_EQ(std::memcmp(value, &values[at], 16), 0);
        EXPECT_EQ(key, cache.key(b, t) + h * cache.head_stride(b, t));
      }
    }
  }
}

TEST(KvCache, AHeadsKeysAndValuesLieInTheOrderInWhichTheyAreRead) {
  KvCache cache(2, 3, 64, graph::DataType::bf16);
  ASSERT_TRUE(cache.reserve(16 * KvCache::block_tokens).ok());
  constexpr std::int64_t block_bytes = KvCache::block_tokens * 64 * 2;
  const char* expected = cache.key(1, 0);
  for (std::int64_t h = 0; h < 3; ++h) {
    for (int block = 0; block < 16; ++block) {
      EXPECT_EQ(cache.key_blocks(1, h)[block], expected);
      EXPECT_EQ(cache.value_blocks(1, h)[block], expected + block_bytes);
      expected += 2 * block_bytes;
    }
  }
}

// Token by token, or a prompt and then token by token, through extents of several sizes.
TEST(KvCache, GrowsByAQuarterAndKeepsItsTokens) {
  constexpr std::int64_t heads = 3, head_dim = 2, batch = 2;
  for (std::int64_t prompt : {1, 700}) {
    KvCache cache(batch, heads, head_dim, graph::DataType::f32);
    std::vector<float> expected[batch * heads];
    for (std::int64_t length = 0; length < 2500;) {
      const std::int64_t tokens = length == 0 ? prompt : 1;
      const std::vector<float> x =
          numbers(batch * heads * tokens * head_dim, static_cast<float>(10 * length));
      ASSERT_TRUE(cache.append(tokens, graph::DataType::f32, x.data(), x.data()).ok());
      for (std::int64_t head = 0; head < batch * heads; ++head) {
        const auto from = x.begin() + head * tokens * head_dim;
        expected[head].insert(expected[head].end(), from, from + tokens * head_dim);
      }
      length += tokens;
      const std::int64_t used = batch * heads * length * head_dim * 2 * 4;
      const std::int64_t block = batch * heads * KvCache::block_tokens * head_dim * 2 * 4;
      ASSERT_LE(cache.bytes(), used + used / 4 + block) << length;
      ASSERT_LE(cache.bytes(), used + 5 * block) << length;
    }
    const std::int64_t indices[] = {1, 0};
    ASSERT_TRUE(cache.reorder(indices).ok());
    std::vector<float> keys(static_cast<std::size_t>(batch * heads * cache.length() * head_dim)),
        values(keys.size());
    cache.read(cache.length(), graph::DataType::f32, keys.data(), values.data());
    EXPECT_EQ(keys, values);
    for (std::size_t head = 0; head < batch * heads; ++head) {
      const std::vector<float>& from = expected[(head + heads) % (batch * heads)];
      EXPECT_TRUE(std::equal(from.begin(), from.end(),
                             keys.begin() + static_cast<std::ptrdiff_t>(head * from.size())))
          << head;
    }
  }
}

// Wherever padding ends: chunks of keys are blocks.
TEST(KvCache, TheFirstKeyIsTheFirstOfABlock) {
  constexpr std::int64_t tokens = 150, heads = 2, head_dim = 2, batch = 4;
  const std::int64_t first[batch] = {0, 5, 64, 100};
  KvCache cache(batch, heads, head_dim, graph::DataType::f32);
  ASSERT_TRUE(cache.set_first_keys(first).ok());
  const std::vector<float> keys = numbers(batch * heads * tokens * head_dim, 0),
                           values = numbers(batch * heads * tokens * head_dim, 1e5f);
  ASSERT_TRUE(cache.append(tokens, graph::DataType::f32, keys.data(), values.data()).ok());
  const auto expect_contents = [&](std::span<const float> wanted_keys) {
    std::vector<float> read_keys(keys.size()), read_values(keys.size());
    cache.read(tokens, graph::DataType::f32, read_keys.data(), read_values.data());
    EXPECT_TRUE(std::ranges::equal(read_keys, wanted_keys));
  };
  expect_contents(keys);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t place = cache.place_in_blocks(b, first[b]);
    EXPECT_EQ(place % KvCache::block_tokens, 0);
    EXPECT_EQ(cache.key(b, first[b]), cache.key_blocks(b, 0)[place / KvCache::block_tokens]);
  }
  // Tokens that are there stay where they are.
  const std::int64_t others[batch] = {1, 2, 3, 4};
  ASSERT_TRUE(cache.set_first_keys(others).ok());
  expect_contents(keys);
  const std::int64_t indices[batch] = {3, 2, 1, 0};
  ASSERT_TRUE(cache.reorder(indices).ok());
  std::vector<float> reordered;
  const std::int64_t sequence = heads * tokens * head_dim;
  for (std::int64_t b : indices) {
    reordered.insert(reordered.end(), keys.begin() + b * sequence,
                     keys.begin() + (b + 1) * sequence);
  }
  expect_contents(reordered);
}

TEST(KvCache, ReserveKeepsContentsAndUncommittedTokensDoNotCount) {
  KvCache cache(1, 1, 4, graph::DataType::f32);
  const std::vector<float> keys = numbers(12, 0), values = numbers(12, 100);
  ASSERT_TRUE(cache.write(3, graph::DataType::f32, keys.data(), values.data()).ok());
  ASSERT_TRUE(cache.reserve(1000).ok());
  EXPECT_EQ(cache.length(), 3);
  std::vector<float> read_keys(12), read_values(12);
  cache.read(cache.length(), graph::DataType::f32, read_keys.data(), read_values.data());
  EXPECT_EQ(read_keys, keys);
  cache.advance(2);
  EXPECT_EQ(cache.length(), 5);
  cache.truncate(1);
  EXPECT_EQ(cache.length(), 1);
}

TEST(KvCache, ReorderSelectsAndRepeatsSequences) {
  KvCache cache(2, 1, 2, graph::DataType::f32);
  const std::vector<float> keys{1, 2, 3, 4}, values{5, 6, 7, 8};
  ASSERT_TRUE(cache.write(1, graph::DataType::f32, keys.data(), values.data()).ok());
  const std::int64_t first[] = {0, 4};
  ASSERT_TRUE(cache.set_first_keys(first).ok());
  const std::int64_t indices[] = {1, 1, 0};
  ASSERT_TRUE(cache.reorder(indices).ok());
  EXPECT_EQ(cache.batch(), 3);
  std::vector<float> read_keys(6), read_values(6);
  cache.read(cache.length(), graph::DataType::f32, read_keys.data(), read_values.data());
  EXPECT_EQ(read_keys, (std::vector<float>{3, 4, 3, 4, 1, 2}));
  EXPECT_EQ(read_values, (std::vector<float>{7, 8, 7, 8, 5, 6}));
  EXPECT_EQ(cache.first_keys()[1], 4);
  const std::int64_t outside[] = {3};
  EXPECT_FALSE(cache.reorder(outside).ok());
}

// --- in eight bits

std::vector<float> drawn(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// K, then V.
std::vector<float> contents(const KvCache& cache) {
  const auto half = static_cast<std::size_t>(cache.batch() * cache.kv_heads() * cache.length() *
                                             cache.head_dim());
  std::vector<float> values(2 * half);
  cache.read(cache.length(), graph::DataType::f32, values.data(), values.data() + half);
  return values;
}

TEST(EightBitCache, IsOffByHalfAScaleAndComesBackWithoutLoss) {
  constexpr std::int64_t head_dim = 24, rows = 2 * 3 * 70;
  KvCache cache(2, 3, head_dim, graph::DataType::i8);
  const std::vector<float> keys = drawn(rows * head_dim, 1), values = drawn(rows * head_dim, 2);
  ASSERT_TRUE(cache.write(70, graph::DataType::f32, keys.data(), values.data()).ok());
  const std::vector<float> read = contents(cache);
  for (std::size_t row = 0; row < 2 * rows; ++row) {
    const std::vector<float>& from = row < rows ? keys : values;
    const float* given = &from[row % rows * head_dim];
    float most = 0;
    for (int i = 0; i < head_dim; ++i) most = std::max(most, std::abs(given[i]));
    for (int i = 0; i < head_dim; ++i) {
      ASSERT_LE(std::abs(read[row * head_dim + static_cast<std::size_t>(i)] - given[i]),
                most / 254 * 1.001f);
    }
  }
  KvCache again(2, 3, head_dim, graph::DataType::i8);
  ASSERT_TRUE(
      again.write(70, graph::DataType::f32, read.data(), read.data() + rows * head_dim).ok());
  EXPECT_EQ(contents(again), read);
}

TEST(EightBitCache, TakesAndGivesTheTypesOfModels) {
  KvCache cache(1, 1, 4, graph::DataType::i8);
  const std::uint16_t bf16[] = {0x3f80, 0xbf00, 0, 0x42fe};  // 1, -0.5, 0, 127
  ASSERT_TRUE(cache.append(1, graph::DataType::bf16, bf16, bf16).ok());
  EXPECT_EQ(contents(cache), (std::vector<float>{1, 0, 0, 127, 1, 0, 0, 127}));
  std::uint16_t keys[4], values[4];
  cache.read(1, graph::DataType::bf16, keys, values);
  EXPECT_EQ(std::vector<std::uint16_t>(values, values + 4),
            (std::vector<std::uint16_t>{0x3f80, 0, 0, 0x42fe}));
  cache.read(1, graph::DataType::f16, keys, values);
  EXPECT_EQ(keys[3], 0x57f0);
}

TEST(EightBitCache, ScalesLieBeforeTheTokensOfAHeadsBlock) {
  KvCache cache(2, 3, 16, graph::DataType::i8);
  const std::int64_t tokens = KvCache::block_tokens + 3;
  const std::vector<float> keys = drawn(2 * 3 * tokens * 16, 1),
                           values = drawn(2 * 3 * tokens * 16, 2);
  ASSERT_TRUE(cache.write(tokens, graph::DataType::f32, keys.data(), values.data()).ok());
  // 2 blocks of each of 2 sequences.
  EXPECT_EQ(cache.bytes(), 2 * 2 * 2 * 3 * KvCache::block_tokens * (16 + 4));
  for (std::int64_t token : {std::int64_t{0}, std::int64_t{5}, tokens - 1}) {
    const std::int64_t block = token / KvCache::block_tokens,
                       inside = token % KvCache::block_tokens;
    const auto scale_at = [&](void* const* blocks) {
      return static_cast<char*>(blocks[block]) + 4 * (inside - KvCache::block_tokens);
    };
    for (std::int64_t head : {0, 2}) {
      EXPECT_EQ(cache.key_scale(1, token) + head * cache.head_stride(1, token),
                scale_at(cache.key_blocks(1, head)));
      EXPECT_EQ(cache.value_scale(1, token) + head * cache.head_stride(1, token),
                scale_at(cache.value_blocks(1, head)));
    }
    float scale = 0;
    std::memcpy(&scale, cache.key_scale(1, token), sizeof scale);
    EXPECT_GT(scale, 0);
  }
}

TEST(EightBitCache, GrowsIsCutAndReorderedWithItsScales) {
  constexpr std::int64_t head_dim = 8;
  KvCache cache(2, 1, head_dim, graph::DataType::i8);
  std::vector<float> expected[2];
  for (std::int64_t piece = 0; piece < 3; ++piece) {  // 40 + 40 + 40 tokens: over two blocks
    const std::vector<float> x = drawn(2 * 40 * head_dim, static_cast<unsigned>(piece));
    ASSERT_TRUE(cache.append(40, graph::DataType::f32, x.data(), x.data()).ok());
    for (std::size_t b : {0, 1}) {
      const auto from = x.begin() + static_cast<std::ptrdiff_t>(b * 40 * head_dim);
      expected[b].insert(expected[b].end(), from, from + 40 * head_dim);
    }
  }
  // In pieces or at once: the same rows.
  std::vector<float> whole = expected[0];
  whole.insert(whole.end(), expected[1].begin(), expected[1].end());
  KvCache at_once(2, 1, head_dim, graph::DataType::i8);
  ASSERT_TRUE(at_once.write(120, graph::DataType::f32, whole.data(), whole.data()).ok());
  EXPECT_EQ(contents(cache), contents(at_once));

  const std::vector<float> before = contents(cache);
  const std::int64_t indices[] = {1, 0, 1};
  ASSERT_TRUE(cache.reorder(indices).ok());
  cache.truncate(70);
  const std::vector<float> after = contents(cache);
  for (std::size_t b = 0; b < 3; ++b) {
    const auto from = before.begin() + static_cast<std::ptrdiff_t>(
                                           static_cast<std::size_t>(indices[b]) * 120 * head_dim);
    const auto to = after.begin() + static_cast<std::ptrdiff_t>(b * 70 * head_dim);
    EXPECT_TRUE(std::equal(from, from + 70 * head_dim, to)) << b;
  }
}

TEST(EightBitCache, WhatHasNoValueStaysWithout) {
  KvCache cache(1, 1, 2, graph::DataType::i8);
  const std::vector<float> keys{1, std::numeric_limits<float>::infinity(), 2, 1};
  ASSERT_TRUE(cache.write(2, graph::DataType::f32, keys.data(), keys.data()).ok());
  const std::vector<float> read = contents(cache);
  EXPECT_TRUE(std::isnan(read[0]) && std::isnan(read[1]));
  EXPECT_NEAR(read[2], 2, 1e-4);
}

TEST(KvCache, RefusesWrongFirstKeys) {
  KvCache cache(2, 1, 2, graph::DataType::bf16);
  const std::int64_t one[] = {0}, negative[] = {0, -1};
  EXPECT_FALSE(cache.set_first_keys(one).ok());
  EXPECT_FALSE(cache.set_first_keys(negative).ok());
}

TEST(RaggedRows, RowsAndPagesAreFound) {
  // Two pages of 4 tokens each, the second before the first; a token is [2 heads][3].
  std::vector<float> keys = numbers(16 * 6, 0), values = numbers(16 * 6, 1000);
  KvCache cache({reinterpret_cast<char*>(keys.data()), reinterpret_cast<char*>(values.data()), 4},
                2, 3, graph::DataType::f32);
  EXPECT_FALSE(cache.takes(1, 3));
  auto rows = RaggedRows::make({{0, 1, 0, {12}}, {0, 2, 5, {4, 0}}}, 4, 16);
  ASSERT_TRUE(rows.ok()) << rows.error().message;
  cache.begin_step(*rows);
  EXPECT_TRUE(cache.takes(1, 3));
  EXPECT_FALSE(cache.takes(1, 2));
  EXPECT_FALSE(cache.takes(3, 1));
  EXPECT_EQ(cache.batch(), 2);
  EXPECT_EQ(cache.length(0), 0);
  EXPECT_EQ(cache.length(1), 5);
  EXPECT_EQ(cache.place(0, 0).sequence, 0);
  EXPECT_EQ(cache.place(0, 2).sequence, 1);
  EXPECT_EQ(cache.place(0, 2).token, 1);
  const auto first = [](const char* address) {
    float value;
    std::memcpy(&value, address, sizeof value);
    return value;
  };
  EXPECT_EQ(first(cache.key(0, 0)), 12 * 6);
  EXPECT_EQ(first(cache.key(1, 3)), 7 * 6);
  EXPECT_EQ(first(cache.key(1, 6)), 2 * 6);
  EXPECT_EQ(first(cache.value(1, 6) + cache.head_stride(1, 6)), 1000 + 2 * 6 + 3);
  EXPECT_EQ(first(static_cast<char*>(cache.key_blocks(1, 1)[1]) + cache.token_stride()), 6 + 3);
  cache.advance(3);
  EXPECT_FALSE(cache.takes(1, 3));
}

TEST(RaggedRows, RefusesWhatWouldLeaveThePages) {
  EXPECT_FALSE(RaggedRows::make({{0, 0, 3, {0}}}, 4, 16).ok());   // no rows
  EXPECT_FALSE(RaggedRows::make({{0, 1, -1, {0}}}, 4, 16).ok());  // a negative length
  EXPECT_FALSE(RaggedRows::make({{0, 2, 3, {0}}}, 4, 16).ok());   // a fifth token
  EXPECT_FALSE(RaggedRows::make({{0, 1, 3, {13}}}, 4, 16).ok());  // a page beyond the end
  EXPECT_FALSE(RaggedRows::make({{0, 1, 3, {-1}}}, 4, 16).ok());
  EXPECT_TRUE(RaggedRows::make({{0, 1, 3, {12}}}, 4, 16).ok());
}

}  // namespace
}  // namespace tilewright::ops
