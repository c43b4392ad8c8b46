// KvCache: growth, addressing, commit, truncation, reading and reordering, against a plain array.
#include "ops/kv_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

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
  ASSERT_TRUE(cache.write(keys.data(), values.data(), length).ok());
  EXPECT_EQ(cache.length(), length);
  std::vector<float> read_keys(keys.size()), read_values(values.size());
  cache.read(read_keys.data(), read_values.data());
  EXPECT_EQ(read_keys, keys);
  EXPECT_EQ(read_values, values);
}

TEST(KvCache, TablesFindEveryTokenOfEveryHead) {
  KvCache cache(2, 3, 4, graph::DataType::f32);
  const std::int64_t length = KvCache::block_tokens + 3;
  const std::vector<float> keys = numbers(2 * 3 * length * 4, 0),
                           values = numbers(2 * 3 * length * 4, 1e6f);
  ASSERT_TRUE(cache.write(keys.data(), values.data(), length).ok());
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
        EXPECT_EQ(key, cache.key(b, t) + h * cache.head_stride());
      }
    }
  }
}

TEST(KvCache, ReserveKeepsContentsAndUncommittedTokensDoNotCount) {
  KvCache cache(1, 1, 4, graph::DataType::f32);
  const std::vector<float> keys = numbers(12, 0), values = numbers(12, 100);
  ASSERT_TRUE(cache.write(keys.data(), values.data(), 3).ok());
  ASSERT_TRUE(cache.reserve(1000).ok());
  EXPECT_EQ(cache.length(), 3);
  std::vector<float> read_keys(12), read_values(12);
  cache.read(read_keys.data(), read_values.data());
  EXPECT_EQ(read_keys, keys);
  cache.advance(2);
  EXPECT_EQ(cache.length(), 5);
  cache.truncate(1);
  EXPECT_EQ(cache.length(), 1);
}

TEST(KvCache, ReorderSelectsAndRepeatsSequences) {
  KvCache cache(2, 1, 2, graph::DataType::f32);
  const std::vector<float> keys{1, 2, 3, 4}, values{5, 6, 7, 8};
  ASSERT_TRUE(cache.write(keys.data(), values.data(), 1).ok());
  const std::int64_t first[] = {0, 4};
  ASSERT_TRUE(cache.set_first_keys(first).ok());
  const std::int64_t indices[] = {1, 1, 0};
  ASSERT_TRUE(cache.reorder(indices).ok());
  EXPECT_EQ(cache.batch(), 3);
  std::vector<float> read_keys(6), read_values(6);
  cache.read(read_keys.data(), read_values.data());
  EXPECT_EQ(read_keys, (std::vector<float>{3, 4, 3, 4, 1, 2}));
  EXPECT_EQ(read_values, (std::vector<float>{7, 8, 7, 8, 5, 6}));
  EXPECT_EQ(cache.first_keys()[1], 4);
  const std::int64_t outside[] = {3};
  EXPECT_FALSE(cache.reorder(outside).ok());
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
  EXPECT_EQ(first(cache.value(1, 6) + cache.head_stride()), 1000 + 2 * 6 + 3);
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
