// Which kernels a task calls, and how often: counted by stand-ins, because a kernel that is never
// called gives no wrong result. And what a task computes on a machine that lacks its instructions:
// stand-ins that interpret the kernels.
#include "ops/task.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/attention/prefill_kernel.h"
#include "ops/attention_task.h"
#include "ops/gemm/tile_kernel.h"
#include "ops/linear_task.h"
#include "ops/scalar_type.h"
#include "ops/weights.h"

namespace tilewright::ops {
namespace {

// How often the stand-ins were called.
int tokens, merged, tiles, strips, copies, in_pieces, many_blocks, few_blocks;

template <int& count>
Kernel counting() {
  Kernel kernel;
  kernel.function = [](const std::int64_t*) { ++count; };
  return kernel;
}

Kernel counting_strips() {
  Kernel kernel;
  kernel.function = [](const std::int64_t* arguments) {
    ++tiles;
    strips += static_cast<int>(arguments[PrefillArgs::strip_count]);
  };
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
        frame{.dims = dims,
              .buffers = buffers,
              .caches = {},
              .problem = nullptr,
              .barrier = nullptr,
              .scratch = scratch,
              .packed = scratch_memory.data() + (1 << 21),
              .parts = memory.data(),
              .parts_done = parts_done} {}

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

AttentionTask causal_attention(const Kernel& token, const Kernel& merge, const Kernel& tile) {
  AttentionTask task{};
  task.spec.group = 3;
  task.kernel = &token;
  task.merge = &merge;
  task.prefill = &tile;
  task.causal = true;
  task.few_queries = 16;
  task.batch = DimIndex{1};
  task.kv_heads = DimIndex{2};
  task.queries = task.keys = task.values_keys = DimIndex{3};
  task.q = task.k = task.v = task.output = operand();
  return task;
}

// The same with a number of keys of its own, all of which every token sees: by token only.
AttentionTask attention_of_keys(const Kernel& token, const Kernel& merge) {
  AttentionTask task{};
  task.kernel = &token;
  task.merge = &merge;
  task.few_queries = 16;
  task.batch = DimIndex{1};
  task.kv_heads = DimIndex{2};
  task.queries = DimIndex{3};
  task.keys = task.values_keys = DimIndex{4};
  task.q = task.k = task.v = task.output = operand();
  return task;
}

TEST(AttentionTask, MoreThanAFewQueriesFillTiles) {
  const Kernel token = counting<tokens>(), merge = counting<merged>(), tile = counting_strips();
  AttentionTask task = causal_attention(token, merge, tile);
  const std::int64_t rows = strip_rows(task.spec.lanes);
  for (const std::int64_t few_queries : {16, 99}) {
    task.few_queries = few_queries;
    for (const std::int64_t queries : {1, 16, 17, 100}) {
      const Setting setting({0, 1, 2, queries});  // 0, and sizes by index
      tokens = strips = 0;
      for (int thread : {0, 1}) ops::run(task, setting.frame, thread, 2);
      EXPECT_EQ(tokens, queries > few_queries ? 0 : 2 * queries);
      EXPECT_EQ(strips, queries > few_queries ? 2 * ((3 * queries + rows - 1) / rows) : 0);
    }
  }
}

// A short prompt that is padded to a long one's length meets the kernel that it would meet alone:
// where the other multiplies by vdpbf16ps or AMX, a model's tokens depended on who shared its
// batch.
TEST(AttentionTask, PaddingDoesNotMakeAFewQueriesMany) {
  const Kernel token = counting<tokens>(), merge = counting<merged>(), tile = counting_strips();
  AttentionTask task = causal_attention(token, merge, tile);
  task.cache = 0;
  for (const auto& [padding, by_token] : {std::pair(14, 16), {13, 0}, {30, 0}}) {
    KvCache cache(2, 2, 64, graph::DataType::f32);
    ASSERT_TRUE(cache.set_first_keys(std::array<std::int64_t, 2>{padding, 0}).ok());
    ASSERT_TRUE(cache.reserve(30).ok());
    KvCache* const caches[] = {&cache};
    Setting setting({0, 2, 2, 30});
    setting.frame.caches = caches;
    // Of padding there are no parts: it may be thousands of rows.
    EXPECT_EQ(scratch_of(task, setting.frame).part_bytes,
              2 * 2 * by_token * 3 * PartLayout(task.spec).bytes)
        << padding;
    tokens = strips = merged = 0;
    ops::run(task, setting.frame, 0, 1);
    EXPECT_EQ(tokens, 2 * by_token) << padding;
    EXPECT_EQ(merged, padding == 13 ? 0 : 2 * 30) << padding;  // zeros for the padding
    EXPECT_EQ(strips, 2 * 4 * (padding == 13 ? 2 : 1)) << padding;
  }
}

// 300 rows of each of two heads are 13 strips: four tiles, as long as that is enough for threads.
TEST(AttentionTask, ThreadsGetAFewTilesEach) {
  const Kernel token = counting<tokens>(), merge = counting<merged>(), tile = counting_strips();
  const AttentionTask task = causal_attention(token, merge, tile);
  ASSERT_EQ(strip_rows(task.spec.lanes), 24);
  for (const auto& [threads, expected] : {std::pair(1, 8), {2, 8}, {3, 14}, {4, 26}, {16, 26}}) {
    const Setting setting({0, 1, 2, 100});
    tiles = strips = 0;
    for (int thread = 0; thread < threads; ++thread) {
      ops::run(task, setting.frame, thread, threads);
    }
    EXPECT_EQ(tiles, expected) << threads;
    EXPECT_EQ(strips, 26);
  }
}

// What each part asks for are the keys that the thread's next one begins with.
TEST(AttentionTask, EachPartAsksForTheNextOnesKeys) {
  static std::vector<std::pair<const char*, const char*>> first_and_next;
  Kernel token;
  token.function = [](const std::int64_t* arguments) {
    const auto* block = *reinterpret_cast<const char* const*>(arguments[AttentionArgs::k_blocks]);
    first_and_next.emplace_back(
        block + arguments[AttentionArgs::first_key] * arguments[AttentionArgs::k_token_stride],
        reinterpret_cast<const char*>(arguments[AttentionArgs::next_key]));
  };
  const Kernel merge = counting<merged>();
  // 3 heads of 600 keys, a token of a head 4 bytes: parts of 256, 256 and 88 keys.
  const Setting setting({0, 1, 3, 1, 600, 1, 600});
  AttentionTask task = attention_of_keys(token, merge);
  task.k.element_bytes = 4;
  task.k_strides.token = DimIndex{5};
  task.k_strides.head = DimIndex{6};
  for (int thread : {0, 1}) {
    first_and_next.clear();
    ops::run(task, setting.frame, thread, 2);
    ASSERT_GE(first_and_next.size(), 4u);
    for (std::size_t i = 0; i + 1 < first_and_next.size(); ++i) {
      EXPECT_EQ(first_and_next[i].second, first_and_next[i + 1].first) << thread << " " << i;
    }
    EXPECT_EQ(first_and_next.back().second, first_and_next.back().first);
  }
}

// Thread 0 does not wait: it finds all tiles, and of the parts what thread 1's tail holds. What is
// computed is as much as without a turn.
TEST(AttentionTask, WhoIsFreeTakesTilesAndParts) {
  const Kernel token = counting<tokens>(), merge = counting<merged>(), tile = counting_strips();
  const AttentionTask many = causal_attention(token, merge, tile);
  AttentionTask few = attention_of_keys(token, merge);
  few.spec.head_dim = 64;  // 128 KB a part
  std::array<Claim, 2> claims;
  for (const std::uint64_t number : {0, 256, 512}) {
    const bool in_turn = number != 0;
    Setting tiled({0, 1, 2, 100});
    tiled.frame.turn = {claims, number};
    tiles = 0;
    ops::run(many, tiled.frame, 0, 2);
    EXPECT_EQ(tiles, in_turn ? 8 : 4);
    ops::run(many, tiled.frame, 1, 2);
    EXPECT_EQ(tiles, 8);

    Setting parts({0, 1, 4, 1, 16 * 256});  // 4 heads of 16 parts
    parts.frame.turn = Turn{claims, number}.part(1);
    tokens = merged = 0;
    ops::run(few, parts.frame, 0, 2);
    EXPECT_EQ(tokens, in_turn ? 32 + 8 : 32);
    ops::run(few, parts.frame, 1, 2);
    EXPECT_EQ(tokens, 64);
    EXPECT_EQ(merged, 4);
  }
}

// 3 heads of 600 keys are 9 parts, whoever computes them; a token is merged once.
TEST(AttentionTask, ThreadsShareTheParts) {
  const Kernel token = counting<tokens>(), merge = counting<merged>();
  for (const int threads : {1, 2, 4, 16}) {
    const Setting setting({0, 1, 3, 2, 600});
    const AttentionTask task = attention_of_keys(token, merge);
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

// Of two sequences of 600 and 10 keys, which have three parts each, shares are even by keys, but
// for the parts that they begin and end with.
TEST(AttentionTask, ThreadsShareTheKeysEvenly) {
  static std::int64_t keys;
  Kernel token;
  token.function = [](const std::int64_t* arguments) {
    keys += arguments[AttentionArgs::key_count];
  };
  const Kernel merge = counting<merged>(), tile = counting_strips();
  AttentionTask task = causal_attention(token, merge, tile);
  task.cache = 0;
  for (const std::array<std::int64_t, 2> first_keys :
       {std::array<std::int64_t, 2>{0, 590}, {590, 0}}) {
    KvCache cache(2, 4, 64, graph::DataType::f32);
    ASSERT_TRUE(cache.set_first_keys(first_keys).ok());
    ASSERT_TRUE(cache.reserve(600).ok());
    cache.advance(599);
    KvCache* const caches[] = {&cache};
    Setting setting({0, 2, 4, 1});
    setting.frame.caches = caches;
    for (const int threads : {1, 2, 3, 8, 16}) {
      std::int64_t all = 0, most = 0;
      merged = 0;
      for (int thread = 0; thread < threads; ++thread) {
        keys = 0;
        ops::run(task, setting.frame, thread, threads);
        all += keys;
        most = std::max(most, keys);
      }
      EXPECT_EQ(all, 4 * 610);
      EXPECT_EQ(merged, 8);
      EXPECT_LE(most, all / threads + 256) << threads;
    }
  }
}

// Behind a window and behind padding: a chunk that began within a block read parts of blocks by
// turns, at half the speed.
TEST(AttentionTask, ChunksEndWhereBlocksOfTheCacheDo) {
  struct Part {
    std::int64_t first, count, first_chunk;
  };
  static std::vector<Part> parts;
  Kernel token;
  token.function = [](const std::int64_t* arguments) {
    parts.push_back({arguments[AttentionArgs::first_key], arguments[AttentionArgs::key_count],
                     arguments[AttentionArgs::first_chunk]});
  };
  const Kernel merge = counting<merged>(), tile = counting_strips();
  AttentionTask task = causal_attention(token, merge, tile);
  task.cache = 0;
  for (const auto& [window, padding, queries] : std::vector<std::array<std::int64_t, 3>>{
           {0, 0, 1}, {0, 37, 1}, {500, 0, 1}, {500, 37, 1}, {700, 5, 3}, {64, 0, 16}}) {
    task.window = window;
    KvCache cache(1, 1, 64, graph::DataType::f32);
    ASSERT_TRUE(cache.set_first_keys(std::array<std::int64_t, 1>{padding}).ok());
    ASSERT_TRUE(cache.reserve(1100).ok());
    cache.advance(1050);
    KvCache* const caches[] = {&cache};
    Setting setting({0, 1, 1, queries});
    setting.frame.caches = caches;
    parts.clear();
    for (int thread = 0; thread < 2; ++thread) ops::run(task, setting.frame, thread, 2);
    std::map<std::int64_t, std::int64_t> seen;  // how many queries see a key
    for (const Part& part : parts) {
      for (std::int64_t i = 0; i < part.count; ++i) ++seen[part.first + i];
      EXPECT_EQ((part.first + part.first_chunk) % KvCache::block_tokens, 0);
      EXPECT_LE(part.count, kPartKeys);
      EXPECT_GT(part.count, 0);
    }
    std::map<std::int64_t, std::int64_t> expected;
    for (std::int64_t query = 0; query < queries; ++query) {
      const std::int64_t end = 1050 + query + 1;
      for (std::int64_t key = window > 0 ? std::max(end - window, padding) : padding; key < end;
           ++key) {
        ++expected[cache.place_in_blocks(0, key)];
      }
    }
    EXPECT_EQ(seen, expected) << window << " " << padding << " " << queries;
  }
}

TEST(LinearTask, FourBlocksOfRowsArePacked) {
  const Kernel copy = counting<copies>(), pieces = counting<in_pieces>(),
               many = counting<many_blocks>(), few = counting<few_blocks>();
  LinearTask task{};
  task.spec.lanes = 8;
  task.spec.n = 256;
  task.spec.k = 300;
  task.variants = {{6, &few}, {1, &few}};
  task.many = {6, &many};
  task.x_type = graph::DataType::f32;
  task.copy = &copy;
  task.pieces = &pieces;
  task.most_rows = 48;
  task.many_blocks = 4;
  task.pack_panels = 8;
  task.weight = std::make_shared<PackedWeight>();
  task.x = task.y = operand();
  task.rows = DimIndex{1};
  const auto calls = [&](std::int64_t rows) {
    const Setting setting({0, rows});
    copies = in_pieces = many_blocks = few_blocks = 0;
    ops::run(task, setting.frame, 0, 1);
    return std::vector<int>{copies, in_pieces, many_blocks, few_blocks};
  };
  EXPECT_EQ(calls(18), (std::vector{0, 0, 0, 1}));
  EXPECT_EQ(calls(24), (std::vector{4, 12, 1, 0})) << "three stretches, the last with half a piece";
  EXPECT_EQ(calls(96), (std::vector{16, 48, 2, 0})) << "two chunks";
  EXPECT_EQ(calls(25), (std::vector{7, 12, 8, 8})) << "the last row alone, so panel by panel";
  task.spec.n = 224;
  EXPECT_EQ(calls(24), (std::vector{0, 0, 0, 1})) << "seven panels do not pay for a copy";
  task.x_type = graph::DataType::bf16;
  EXPECT_EQ(calls(1), (std::vector{3, 0, 0, 1})) << "16 bits are widened once";
  EXPECT_EQ(calls(5), (std::vector{3, 0, 0, 1})) << "many blocks of one row: no kernel for many";
}

TEST(LinearTask, BlocksAreAlikeIfThatTakesNoMoreOfThem) {
  LinearTask task{};
  task.variants = {{12, nullptr}, {8, nullptr}, {5, nullptr}, {4, nullptr}, {1, nullptr}};
  task.many = {12, nullptr};
  task.many_blocks = 4;
  const auto blocks = [&](std::int64_t rows, bool packed) {
    std::vector<std::array<std::int64_t, 3>> parts;
    ops::for_row_blocks(task, rows, packed,
                        [&](const auto& variant, std::int64_t first, std::int64_t count) {
                          parts.push_back({variant.rows, first, count});
                        });
    return parts;
  };
  using Parts = std::vector<std::array<std::int64_t, 3>>;
  EXPECT_EQ(blocks(16, false), (Parts{{8, 0, 2}}));
  EXPECT_EQ(blocks(10, false), (Parts{{8, 0, 1}, {1, 8, 2}})) << "twice 5 are two blocks, not one";
  EXPECT_EQ(blocks(15, false), (Parts{{12, 0, 1}, {1, 12, 3}})) << "three blocks of 5 are more";
  EXPECT_EQ(blocks(24, false), (Parts{{12, 0, 2}}));
  EXPECT_EQ(blocks(40, true), (Parts{{12, 0, 3}, {4, 36, 1}}));
  EXPECT_EQ(blocks(60, true), (Parts{{12, 0, 5}}));
  EXPECT_EQ(blocks(64, true), (Parts{{12, 0, 5}, {4, 60, 1}})) << "what lies in pieces stays";
  EXPECT_EQ(blocks(0, false), Parts{});
}

// The weights of rows that no kernel's blocks cover pass by once, too.
TEST(LinearTask, OneKernelCoversAnyNumberOfRowsBelowMany) {
  LinearTask task{};
  task.variants = {{8}, {5}, {1}};
  for (int rest = 1; rest < 8; ++rest) task.with_rest.push_back({.rows = 8, .rest = rest});
  for (int rest = 1; rest < 3; ++rest) task.with_rest.push_back({.rows = 5, .rest = rest});
  task.many = {8};
  task.many_blocks = 4;
  for (std::int64_t rows = 1; rows < 64; ++rows) {
    for (bool packed : {false, true}) {
      std::int64_t covered = 0, kernels = 0;
      ops::for_row_blocks(task, rows, packed,
                          [&](const auto& variant, std::int64_t first, std::int64_t count) {
                            EXPECT_EQ(first, covered) << rows;
                            covered += count * variant.rows + variant.rest;
                            ++kernels;
                          });
      EXPECT_EQ(covered, rows);
      EXPECT_LE(kernels, packed && rows >= 32 && rows % 8 != 0 ? 2 : 1) << rows;
    }
  }
}

// --- tasks whose kernels the interpreter runs

using graph::DataType;

constexpr std::size_t kSlots = 16;
std::array<jit::vir::Function, kSlots> functions;
std::array<std::atomic<int>, kSlots> calls;

// A function for each slot, because a pointer to a function carries nothing else.
template <std::size_t... slot>
constexpr std::array<jit::KernelFunction, kSlots> interpreters(std::index_sequence<slot...>) {
  return {[](const std::int64_t* args) {
    ++calls[slot];
    interpret(functions[slot], args);
  }...};
}

// y = x @ w.T of one type, by tiles for many rows. The weights fit bf16 or do not, and have a size.
class TiledTask {
 public:
  TiledTask(DataType type, std::int64_t n, std::int64_t k, bool exact = true, double scale = 1)
      : type_(type) {
    LinearKernel& spec = task_.spec;
    spec.lanes = 16;
    spec.n = n;
    spec.k = k;
    spec.output = type;
    std::normal_distribution<double> normal;
    w_ = std::vector<char>(static_cast<std::size_t>(n * k * size_in_bytes(type)));
    for (std::int64_t i = 0; i < n * k; ++i) {
      const auto drawn = static_cast<float>(scale * normal(random_));
      const std::uint32_t kept = exact ? 0xffff0000u : 0xffffffffu;
      write_scalar(type, w_.data() + i * size_in_bytes(type),
                   std::bit_cast<float>(std::bit_cast<std::uint32_t>(drawn) & kept));
    }
    const WeightBlock block{w_.data(), n, k * size_in_bytes(type)};
    task_.weight = *weights_.pack({block}, k, type, false, WeightForms{});
    spec.weight = task_.weight->form.dtype;
    for (int rows : {12, 4, 2, 1}) task_.variants.push_back({rows, kernel(spec, rows)});
    task_.many = {12, task_.variants[0].kernel};
    const CopyKernel copy{16, type, DataType::f32};
    task_.copy = add(build(copy));
    task_.x_type = type;
    task_.most_rows = 24;
    task_.many_blocks = 4;
    task_.pack_panels = 8;
    const bool fp32 = type == DataType::f32;
    LinearTask::Tiles tiles{fp32 ? Arithmetic::split_tiles : Arithmetic::tiles, {{{32}, {16}}}};
    first_tile_slot_ = used_;
    LinearKernel tiled = spec;
    tiled.arithmetic = tiles.arithmetic;
    for (std::size_t i = 0; i < 2; ++i) {
      tiles.variants[i].tiles = true;
      tiles.variants[i].kernel = kernel(tiled, tiles.variants[i].rows);
    }
    for (std::size_t i = 0; i < 2; ++i) {
      tiles.packs[i] = add(build(TilePack{tiles.arithmetic, tiles.variants[i].rows, k}));
    }
    tiles.most_rows = 64;
    if (fp32) tiles.largest_weight = weights_.largest_magnitude(task_.weight);
    task_.tiles = tiles;
    task_.x = {0, DimIndex{0}, size_in_bytes(type)};
    task_.y = {1, DimIndex{0}, size_in_bytes(type)};
    task_.rows = DimIndex{1};
    task_.x_stride = DimIndex{2};
    task_.y_stride = DimIndex{3};
  }

  // x is drawn, of a size; `change` may put other values into it.
  void run(std::int64_t rows, int threads, std::pair<std::int64_t, float> change = {-1, 0},
           double scale = 1) {
    const std::int64_t size = size_in_bytes(type_), n = task_.spec.n, k = task_.spec.k;
    std::normal_distribution<double> normal;
    x_.assign(static_cast<std::size_t>(rows * k * size), 0);
    y_.assign(static_cast<std::size_t>(rows * n * size), 0);
    for (std::int64_t i = 0; i < rows * k; ++i) {
      write_scalar(type_, x_.data() + i * size, scale * normal(random_));
    }
    if (change.first >= 0) write_scalar(type_, x_.data() + change.first * size, change.second);
    for (auto& count : calls) count = 0;
    const std::vector<std::int64_t> dims{0, rows, k, n};
    std::vector<char*> buffers{x_.data(), y_.data()};
    Barrier barrier;
    Frame frame{
        .dims = dims, .buffers = buffers, .caches = {}, .problem = nullptr, .barrier = &barrier};
    Scratch scratch;
    ASSERT_TRUE(scratch.reserve(scratch_of(task_, frame), threads));
    scratch.lend(frame);
    std::vector<std::jthread> team;
    for (int thread = 0; thread < threads; ++thread) {
      team.emplace_back([&, thread] { ops::run(task_, frame, thread, threads); });
    }
  }

  int tile_calls() const { return calls[first_tile_slot_] + calls[first_tile_slot_ + 1]; }
  int vector_calls() const {
    int count = 0;
    for (std::size_t i = 0; i < task_.variants.size(); ++i) count += calls[i];
    return count;
  }
  double y(std::int64_t row, std::int64_t column) const {
    return value(y_, row * task_.spec.n + column);
  }

  // The largest error of rows [begin, end), relative to what rounding may do.
  double error(std::int64_t begin, std::int64_t end) const {
    double largest = 0;
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t column = 0; column < task_.spec.n; ++column) {
        double sum = 0, magnitude = 0;
        for (std::int64_t i = 0; i < task_.spec.k; ++i) {
          const double term =
              value(x_, row * task_.spec.k + i) * value(w_, column * task_.spec.k + i);
          sum += term;
          magnitude += std::abs(term);
        }
        const double unit = type_ == DataType::f32 ? 0x1p-24 : 0x1p-8;
        const double bound =
            static_cast<double>(task_.spec.k) * 0x1p-24 * magnitude + unit * std::abs(sum);
        const double relative = std::abs(y(row, column) - sum) / bound;
        if (!(relative <= largest)) largest = relative;
      }
    }
    return largest;
  }

 private:
  double value(const std::vector<char>& values, std::int64_t index) const {
    return read_scalar(type_, values.data() + index * size_in_bytes(type_));
  }

  const Kernel* add(jit::vir::Function function) {
    static constexpr auto table = interpreters(std::make_index_sequence<kSlots>());
    functions[used_] = std::move(function);
    kernels_[used_].function = table[used_];
    return &kernels_[used_++];
  }
  const Kernel* kernel(LinearKernel spec, int rows) {
    spec.rows = rows;
    return add(build(spec));
  }

  DataType type_;
  LinearTask task_{};
  WeightStore weights_;
  std::array<Kernel, kSlots> kernels_;
  std::size_t used_ = 0, first_tile_slot_ = 0;
  std::vector<char> x_, y_, w_;
  std::mt19937 random_{5};
};

TEST(LinearTask, TilesMultiplyManyRows) {
  for (const auto& [type, exact] :
       {std::pair{DataType::bf16, true}, {DataType::f32, true}, {DataType::f32, false}}) {
    TiledTask task(type, 100, 75, exact);
    for (std::int64_t rows : {1, 8, 9, 16, 20, 32, 45, 70, 130}) {
      for (int threads : {1, 3}) {
        task.run(rows, threads);
        EXPECT_LE(task.error(0, rows), 1) << rows << " rows of " << graph::name(type);
        EXPECT_EQ(task.tile_calls() > 0, rows > 8) << rows;
        EXPECT_EQ(task.vector_calls() > 0, rows <= 8) << rows;
      }
    }
  }
}

TEST(LinearTask, Fp32OutOfTheRangeOfTilesIsMultipliedByVectors) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (bool exact : {true, false}) {
    for (float outsider : {infinity, nan, 1e37f}) {
      TiledTask task(DataType::f32, 64, 75, exact);
      task.run(70, 2, {40 * 75 + 3, outsider});  // chunks of 64 and 6 rows: row 40 is in the first
      EXPECT_GT(task.tile_calls(), 0);
      EXPECT_GT(task.vector_calls(), 0);
      EXPECT_LE(task.error(0, 40), 1);
      EXPECT_LE(task.error(41, 70), 1);
      if (std::isfinite(outsider)) {
        EXPECT_LE(task.error(40, 41), 1);
      } else {
        EXPECT_EQ(std::isnan(task.y(40, 0)), std::isnan(outsider));
        EXPECT_FALSE(std::isfinite(task.y(40, 0)));
      }
    }
  }
}

// A row's size and that of the weights decide, not that of their product.
TEST(LinearTask, Fp32OfEverySizeHasTheSmallError) {
  for (bool exact : {true, false}) {
    for (const auto& [x, weight, by_tiles] : {std::tuple{1e30, 1e-24, true},
                                              {1e-24, 1e30, true},
                                              {1e18, 1e-18, true},
                                              {1e30, 1e-30, false},
                                              {1e-30, 1e30, false},
                                              {1e-15, 1e-15, false},
                                              {1e36, 1.0, false}}) {
      TiledTask task(DataType::f32, 64, 75, exact, weight);
      task.run(40, 1, {-1, 0}, x);
      EXPECT_EQ(task.tile_calls() > 0, by_tiles) << x << " by " << weight;
      EXPECT_EQ(task.vector_calls() > 0, !by_tiles) << x << " by " << weight;
      EXPECT_LE(task.error(0, 40), 1) << x << " by " << weight;
    }
  }
}

}  // namespace
}  // namespace tilewright::ops
