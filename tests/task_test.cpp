// Which kernels a task calls, and how often: counted by stand-ins, because a kernel that is never
// called gives no wrong result.
#include "ops/task.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops/attention/prefill_kernel.h"
#include "ops/attention_task.h"
#include "ops/linear_task.h"

namespace tilewright::ops {
namespace {

// How often the stand-ins were called.
int tokens, merged, tiles, copies, many_blocks, few_blocks;

template <int& count>
Kernel counting() {
  Kernel kernel;
  kernel.function = [](const std::int64_t*) { ++count; };
  return kernel;
}

// Dims by index, and one buffer for all operands.
struct Setting {
  explicit Setting(std::vector<std::int64_t> values)
      : dims(std::move(values)),
        memory(1 << 16),
        scratch_memory(1 << 22),
        buffers{memory.data()},
        scratch(16, scratch_memory.data()),
        parts_done(16),
        frame{dims, buffers, {}, scratch, nullptr, memory.data(), parts_done} {}

  std::vector<std::int64_t> dims;
  std::vector<char> memory, scratch_memory;
  std::vector<char*> buffers, scratch;
  std::vector<std::atomic<std::int32_t>> parts_done;
  Frame frame;
};

Operand operand() {
  Operand result;
  result.buffer = 0;
  return result;
}

void expect_tiles_beyond(std::int64_t few_queries) {
  const Kernel token = counting<tokens>(), merge = counting<merged>(), tile = counting<tiles>();
  for (const std::int64_t queries : {1, 16, 17, 100}) {
    const Setting setting({0, 1, 2, queries});  // 0, and sizes by index
    AttentionTask task{};
    task.spec.group = 3;
    task.kernel = &token;
    task.merge = &merge;
    task.prefill = &tile;
    task.causal = true;
    task.few_queries = few_queries;
    task.batch = DimIndex{1};
    task.kv_heads = DimIndex{2};
    task.queries = task.keys = task.values_keys = DimIndex{3};
    task.q = task.k = task.v = task.output = operand();
    tokens = tiles = 0;
    for (int thread : {0, 1}) ops::run(task, setting.frame, thread, 2);
    const std::int64_t rows = prefill_rows(task.spec.lanes);
    EXPECT_EQ(tokens, queries > few_queries ? 0 : 2 * queries);
    EXPECT_EQ(tiles, queries > few_queries ? 2 * ((3 * queries + rows - 1) / rows) : 0);
  }
}

TEST(AttentionTask, MoreThanAFewQueriesFillTiles) {
  expect_tiles_beyond(16);
  expect_tiles_beyond(99);
}

// 3 heads of 600 keys are 9 parts, whoever computes them; a token is merged once.
TEST(AttentionTask, ThreadsShareTheParts) {
  const Kernel token = counting<tokens>(), merge = counting<merged>();
  for (const int threads : {1, 2, 4, 16}) {
    const Setting setting({0, 1, 3, 2, 600});
    AttentionTask task{};
    task.kernel = &token;
    task.merge = &merge;
    task.few_queries = 16;
    task.batch = DimIndex{1};
    task.kv_heads = DimIndex{2};
    task.queries = DimIndex{3};
    task.keys = task.values_keys = DimIndex{4};
    task.q = task.k = task.v = task.output = operand();
    EXPECT_EQ(scratch_of(task, setting.frame).counters, 3);
    EXPECT_EQ(scratch_of(task, setting.frame).part_bytes, 3 * 2 * 3 * PartLayout(task.spec).bytes);
    std::vector<int> shares;
    tokens = merged = 0;
    for (int thread = threads; thread-- > 0;) {
      const int before = tokens;
      ops::run(task, setting.frame, thread, threads);
      shares.push_back(tokens - before);
    }
    EXPECT_EQ(tokens, 9 * 2);
    EXPECT_EQ(merged, 3 * 2);
    EXPECT_LE(std::ranges::max(shares), 2 * ((9 + threads - 1) / threads));
    for (const auto& done : setting.frame.parts_done) EXPECT_EQ(done, 0);
  }
}

TEST(LinearTask, FourBlocksOfRowsArePacked) {
  const Kernel copy = counting<copies>(), many = counting<many_blocks>(),
               few = counting<few_blocks>();
  LinearTask task{};
  task.spec.n = 256;
  task.spec.k = 300;
  task.variants = {{6, &few}, {1, &few}};
  task.many = {6, &many};
  task.x_type = graph::DataType::f32;
  task.copy = &copy;
  task.most_rows = 48;
  task.many_blocks = 4;
  task.pack_panels = 8;
  task.weight = std::make_shared<PackedWeight>();
  task.x = task.y = operand();
  task.rows = DimIndex{1};
  const auto calls = [&](std::int64_t rows) {
    const Setting setting({0, rows});
    copies = many_blocks = few_blocks = 0;
    ops::run(task, setting.frame, 0, 1);
    return std::vector<int>{copies, many_blocks, few_blocks};
  };
  EXPECT_EQ(calls(18), (std::vector{0, 0, 1}));
  EXPECT_EQ(calls(24), (std::vector{3, 1, 0}));  // three stretches of k
  EXPECT_EQ(calls(96), (std::vector{6, 2, 0}));  // two chunks
  EXPECT_EQ(calls(25), (std::vector{3, 8, 8}));  // the last row alone, so panel by panel
  task.spec.n = 224;
  EXPECT_EQ(calls(24), (std::vector{0, 1, 0})) << "seven panels do not pay for a copy";
  task.x_type = graph::DataType::bf16;
  EXPECT_EQ(calls(1), (std::vector{3, 0, 1})) << "16 bits are widened once";
  EXPECT_EQ(calls(5), (std::vector{3, 0, 7})) << "many blocks of one row have no kernel for many";
}

}  // namespace
}  // namespace tilewright::ops
