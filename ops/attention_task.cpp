// See attention_task.h.
//
// Tested by program_test and task_test.
#include "ops/attention_task.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "ops/attention/prefill_kernel.h"

namespace tilewright::ops {
namespace {

// More queries than a step of speculation has.
constexpr std::int64_t kFewQueries = 16;

bool fills_tiles(const AttentionTask& task, const Frame& frame) {
  return frame.dim(task.queries) > kFewQueries;
}

std::int64_t row_bytes(const AttentionKernel& spec) {
  return (spec.head_dim * graph::size_in_bytes(spec.input) + 63) / 64 * 64;
}

// Keys and values of one head of one sequence, as both kernels take them.
struct KeysAndValues {
  KeysAndValues(const AttentionTask& task, const Frame& frame, std::int64_t batch,
                std::int64_t head) {
    if (task.cache >= 0) {
      const KvCache& cache = *frame.caches[static_cast<std::size_t>(task.cache)];
      keys = cache.key_blocks(batch, head);
      values = cache.value_blocks(batch, head);
      key_stride = value_stride = cache.token_stride();
      block_tokens = KvCache::block_tokens;
      return;
    }
    plain[0] =
        task.k.address(frame) + task.k_strides.offset(frame, batch, head, 0) * task.k.element_bytes;
    plain[1] =
        task.v.address(frame) + task.v_strides.offset(frame, batch, head, 0) * task.v.element_bytes;
    keys = &plain[0];
    values = &plain[1];
    key_stride = frame.dim(task.k_strides.token) * task.k.element_bytes;
    value_stride = frame.dim(task.v_strides.token) * task.v.element_bytes;
    block_tokens = std::max<std::int64_t>(frame.dim(task.keys), 1);
  }
  KeysAndValues(const KeysAndValues&) = delete;
  KeysAndValues& operator=(const KeysAndValues&) = delete;

  template <class Args>
  void give(std::int64_t* arguments) const {
    arguments[Args::k_blocks] = argument(keys);
    arguments[Args::v_blocks] = argument(values);
    arguments[Args::k_token_stride] = key_stride;
    arguments[Args::v_token_stride] = value_stride;
    arguments[Args::block_tokens] = block_tokens;
  }

  const void* keys;
  const void* values;
  std::int64_t key_stride, value_stride, block_tokens;
  void* plain[2] = {};
};

// Where a query of a head is in q, the output and the mask.
class QueryRows {
 public:
  QueryRows(const AttentionTask& task, const Frame& frame) : task_(task), frame_(frame) {}

  char* q(std::int64_t batch, std::int64_t head, std::int64_t query) const {
    return at(task_.q, task_.q_strides, batch, head, query);
  }
  char* output(std::int64_t batch, std::int64_t head, std::int64_t query) const {
    return at(task_.output, task_.output_strides, batch, head, query);
  }
  char* mask(std::int64_t batch, std::int64_t head, std::int64_t query) const {
    if (task_.spec.mask == MaskKind::none) return nullptr;
    return at(task_.mask, task_.mask_strides, batch, head, query);
  }

 private:
  char* at(const Operand& operand, const HeadStrides& strides, std::int64_t batch,
           std::int64_t head, std::int64_t query) const {
    return operand.address(frame_) +
           strides.offset(frame_, batch, head, query) * operand.element_bytes;
  }

  const AttentionTask& task_;
  const Frame& frame_;
};

// One token at a time.
void run_tokens(const AttentionTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t kv_heads = frame.dim(task.kv_heads);
  const std::int64_t queries = frame.dim(task.queries);
  const std::int64_t items = frame.dim(task.batch) * kv_heads * queries;
  const QueryRows rows(task, frame);
  std::int64_t arguments[AttentionArgs::count] = {};
  arguments[AttentionArgs::q_head_stride] = frame.dim(task.q_strides.head) * task.q.element_bytes;
  arguments[AttentionArgs::output_head_stride] =
      frame.dim(task.output_strides.head) * task.output.element_bytes;
  arguments[AttentionArgs::scale] = std::bit_cast<std::int32_t>(task.scale);
  arguments[AttentionArgs::softcap] = std::bit_cast<std::int32_t>(task.softcap);
  arguments[AttentionArgs::scratch] = argument(frame.scratch[static_cast<std::size_t>(thread)]);
  // Round robin: under a causal mask later queries cost more, and neighbours share keys in cache.
  for (std::int64_t item = thread; item < items; item += threads) {
    const std::int64_t query = item % queries;
    const std::int64_t head = item / queries % kv_heads;
    const std::int64_t batch = item / queries / kv_heads;
    const std::int64_t first_head = head * task.spec.group;
    const KeyRange keys = keys_of(task, frame, batch, query);
    const KeysAndValues cached(task, frame, batch, head);
    cached.give<AttentionArgs>(arguments);
    arguments[AttentionArgs::q] = argument(rows.q(batch, first_head, query));
    arguments[AttentionArgs::output] = argument(rows.output(batch, first_head, query));
    arguments[AttentionArgs::mask] = argument(rows.mask(batch, first_head, query));
    arguments[AttentionArgs::first_key] = keys.first;
    arguments[AttentionArgs::key_count] = keys.count;
    if (task.spec.slopes) {
      arguments[AttentionArgs::slopes] = argument(task.slopes.address(frame) + 4 * first_head);
    }
    if (task.spec.sinks) {
      arguments[AttentionArgs::sinks] = argument(task.sinks.address(frame) + 4 * first_head);
    }
    task.kernel->function(arguments);
  }
}

// Rows of one sequence and key/value head: the group's heads of the first token, of the second ...
class Tile {
 public:
  Tile(const AttentionTask& task, const Frame& frame, char* scratch) : task_(task), frame_(frame) {
    arguments_[PrefillArgs::q_rows] = argument(q_.data());
    arguments_[PrefillArgs::output_rows] = argument(output_.data());
    arguments_[PrefillArgs::mask_rows] = argument(mask_.data());
    arguments_[PrefillArgs::first_keys] = argument(first_keys_.data());
    arguments_[PrefillArgs::end_keys] = argument(end_keys_.data());
    arguments_[PrefillArgs::slopes] = argument(slopes_.data());
    arguments_[PrefillArgs::sinks] = argument(sinks_.data());
    arguments_[PrefillArgs::scale] = std::bit_cast<std::int32_t>(task.scale);
    arguments_[PrefillArgs::softcap] = std::bit_cast<std::int32_t>(task.softcap);
    nowhere_ = scratch;
    arguments_[PrefillArgs::scratch] = argument(scratch + row_bytes(task.spec));
  }

  void run(std::int64_t batch, std::int64_t kv_head, std::int64_t first_row, std::int64_t count) {
    const QueryRows rows(task_, frame_);
    const int group = task_.spec.group;
    std::int64_t first = std::numeric_limits<std::int64_t>::max(), end = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(prefill_rows(task_.spec.lanes)); ++i) {
      const bool exists = static_cast<std::int64_t>(i) < count;
      const std::int64_t row = first_row + (exists ? static_cast<std::int64_t>(i) : 0);
      const std::int64_t query = row / group, head = kv_head * group + row % group;
      const KeyRange keys = exists ? keys_of(task_, frame_, batch, query) : KeyRange{0, 0};
      q_[i] = rows.q(batch, head, query);
      output_[i] = exists ? rows.output(batch, head, query) : nowhere_;
      mask_[i] = rows.mask(batch, head, query);
      first_keys_[i] = static_cast<std::int32_t>(keys.first);
      end_keys_[i] = static_cast<std::int32_t>(keys.first + keys.count);
      if (task_.spec.slopes) slopes_[i] = number(task_.slopes, head);
      if (task_.spec.sinks) sinks_[i] = number(task_.sinks, head);
      if (keys.count == 0) continue;
      first = std::min(first, keys.first);
      end = std::max(end, keys.first + keys.count);
    }
    first = std::min(first, end);
    arguments_[PrefillArgs::first_key] = first;
    arguments_[PrefillArgs::key_count] = end - first;
    const KeysAndValues cached(task_, frame_, batch, kv_head);
    cached.give<PrefillArgs>(arguments_);
    task_.prefill->function(arguments_);
  }

 private:
  float number(const Operand& numbers, std::int64_t head) const {
    return reinterpret_cast<const float*>(numbers.address(frame_))[head];
  }

  const AttentionTask& task_;
  const Frame& frame_;
  char* nowhere_;  // output of rows that do not exist
  std::array<const void*, kMostPrefillRows> q_, output_, mask_;
  std::array<std::int32_t, kMostPrefillRows> first_keys_, end_keys_;
  std::array<float, kMostPrefillRows> slopes_, sinks_;
  std::int64_t arguments_[PrefillArgs::count] = {};
};

void run_tiles(const AttentionTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t kv_heads = frame.dim(task.kv_heads);
  const std::int64_t rows = frame.dim(task.queries) * task.spec.group;
  const std::int64_t tile_rows = prefill_rows(task.spec.lanes);
  const std::int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const std::int64_t items = frame.dim(task.batch) * kv_heads * tiles;
  Tile tile(task, frame, frame.scratch[static_cast<std::size_t>(thread)]);
  for (std::int64_t item = thread; item < items; item += threads) {
    const std::int64_t first = item % tiles * tile_rows;
    tile.run(item / tiles / kv_heads, item / tiles % kv_heads, first,
             std::min(tile_rows, rows - first));
  }
}

}  // namespace

void run(const AttentionTask& task, const Frame& frame, int thread, int threads) {
  if (fills_tiles(task, frame)) return run_tiles(task, frame, thread, threads);
  run_tokens(task, frame, thread, threads);
}

KeyRange keys_of(const AttentionTask& task, const Frame& frame, std::int64_t sequence,
                 std::int64_t query) {
  std::int64_t first = 0, end = 0;
  if (task.cache >= 0) {
    const KvCache& cache = *frame.caches[static_cast<std::size_t>(task.cache)];
    first = cache.first_keys()[static_cast<std::size_t>(sequence)];
    end = cache.length() + (task.causal ? query + 1 : frame.dim(task.queries));
  } else {
    const std::int64_t keys = frame.dim(task.keys);
    end = task.causal ? std::min(query + 1, keys) : keys;
  }
  if (task.window > 0) first = std::max(first, end - task.window);
  return {std::min(first, end), std::max<std::int64_t>(end - first, 0)};
}

std::int64_t scratch_bytes(const AttentionTask& task, const Frame& frame) {
  const std::int64_t queries = frame.dim(task.queries);
  std::int64_t keys = 0;
  for (std::int64_t b = 0; b < frame.dim(task.batch) && queries > 0; ++b) {
    const KeyRange last = keys_of(task, frame, b, queries - 1);
    keys = std::max(keys, last.first + last.count);
  }
  if (!fills_tiles(task, frame)) return scratch_bytes(task.spec, keys);
  return row_bytes(task.spec) + prefill_scratch_bytes(task.spec, keys);
}

}  // namespace tilewright::ops
