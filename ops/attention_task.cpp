// See attention_task.h.
//
// Tested by program_test and task_test.
#include "ops/attention_task.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "ops/attention/merge_kernel.h"
#include "ops/attention/prefill_kernel.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

bool fills_tiles(const AttentionTask& task, const Queries& queries) {
  return queries.at_once > task.few_queries;
}

const KvCache* cache_of(const AttentionTask& task, const Frame& frame) {
  return task.cache < 0 ? nullptr : frame.caches[static_cast<std::size_t>(task.cache)];
}

std::int64_t query_bytes(const AttentionKernel& spec) {
  return (spec.head_dim * graph::size_in_bytes(spec.input) + 63) / 64 * 64;
}

// Keys and values of one head of one sequence, as both kernels take them.
struct KeysAndValues {
  KeysAndValues(const AttentionTask& task, const Frame& frame, std::int64_t sequence,
                std::int64_t head) {
    if (const KvCache* cache = cache_of(task, frame)) {
      keys = cache->key_blocks(sequence, head);
      values = cache->value_blocks(sequence, head);
      key_stride = value_stride = cache->token_stride();
      block_tokens = cache->tokens_per_block();
      return;
    }
    plain[0] = task.k.address(frame) +
               task.k_strides.offset(frame, sequence, head, 0) * task.k.element_bytes;
    plain[1] = task.v.address(frame) +
               task.v_strides.offset(frame, sequence, head, 0) * task.v.element_bytes;
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

  const char* key(std::int64_t token) const {
    const auto* blocks = static_cast<const char* const*>(keys);
    return blocks[token / block_tokens] + token % block_tokens * key_stride;
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

// The parts of a query's keys. They end, as their chunks do, where those of the whole sequence do:
// so behind a window, too, chunks are blocks of the cache, which are read in order.
class KeyParts {
 public:
  explicit KeyParts(const KeyRange& keys) : keys_(keys) {}

  std::int64_t count() const {
    return keys_.count == 0 ? 0 : (skipped() + keys_.count + kPartKeys - 1) / kPartKeys;
  }
  // [first, first + count) is part `index`; none if it is not one of them.
  KeyRange part(std::int64_t index) const {
    const std::int64_t end = keys_.first + keys_.count;
    const std::int64_t begin = keys_.first - skipped() + index * kPartKeys;
    const std::int64_t first = std::min(std::max(begin, keys_.first), end);
    return {first, std::min(begin + kPartKeys, end) - first, keys_.origin};
  }
  // The part that has the key nearest to `key` of the query's keys as its first.
  std::int64_t nearest(std::int64_t key) const {
    return (skipped() + key + kPartKeys / 2) / kPartKeys;
  }

 private:
  // Keys of the first part that the query does not see.
  std::int64_t skipped() const { return (keys_.first - keys_.origin) % kPartKeys; }

  KeyRange keys_;
};

// A sequence's tokens, if they go one at a time, and the keys of the last, who sees the most.
struct FewQueries {
  std::int64_t queries = 0;
  KeyRange keys = {};
  std::int64_t work() const { return queries * keys.count; }
};

FewQueries few_queries(const AttentionTask& task, const Frame& frame, std::int64_t sequence) {
  const Queries queries = queries_of(task, frame, sequence);
  if (fills_tiles(task, queries) || queries.count == 0) return {};
  return {queries.count - queries.padding(), keys_of(task, frame, queries.batch, queries.last())};
}

// Tokens one at a time, in parts. A part of all queries of a sequence's head is one item, since the
// queries read almost the same keys.
class Parts {
 public:
  Parts(const AttentionTask& task, const Frame& frame, char* scratch)
      : task_(task), frame_(frame), rows_(task, frame), kv_heads_(frame.dim(task.kv_heads)) {
    for (std::int64_t sequence = 0; sequence < sequence_count(task, frame); ++sequence) {
      const FewQueries few = few_queries(task, frame, sequence);
      queries_ = std::max(queries_, few.queries);
      // Of earlier tokens a window's keys can be cut into one part more.
      const bool windows = task.window > 0 && few.queries > 1;
      parts_ = std::max(parts_, KeyParts(few.keys).count() + (windows ? 1 : 0));
      work_ += few.work();
    }
    part_args_[AttentionArgs::q_head_stride] =
        frame.dim(task.q_strides.head) * task.q.element_bytes;
    part_args_[AttentionArgs::scale] = std::bit_cast<std::int32_t>(task.scale);
    part_args_[AttentionArgs::softcap] = std::bit_cast<std::int32_t>(task.softcap);
    part_args_[AttentionArgs::scratch] = argument(scratch);
    merge_args_[MergeArgs::part_stride] = part_bytes_;
    merge_args_[MergeArgs::output_head_stride] =
        frame.dim(task.output_strides.head) * task.output.element_bytes;
  }

  // [sequence][head][part]. The parts of a head are neighbours: one thread's are in its cache when
  // they are merged.
  std::int64_t items() const { return sequence_count(task_, frame_) * kv_heads_ * parts_; }
  std::int64_t bytes() const { return items() * queries_ * part_bytes_; }
  // A thread's, evenly by keys: of a batch of 4 sequences with 700 keys and 4 with 8, shares of as
  // many parts gave all keys to one of two threads. Tokens of a 135M model took 1.09 times as long.
  WorkRange share(int thread, int threads) const {
    return {begin(thread, threads), begin(thread + 1, threads)};
  }

  // One of the items that end before `end`, all of this thread.
  void run(std::int64_t item, std::int64_t end) {
    const std::int64_t head = item / parts_ % kv_heads_, sequence = item / parts_ / kv_heads_;
    const Queries queries = queries_of(task_, frame_, sequence);
    if (fills_tiles(task_, queries)) return;
    const char* next = item + 1 < end ? first_key(item + 1) : nullptr;
    part_args_[AttentionArgs::next_key] = argument(next ? next : first_key(item));
    compute(sequence, queries, head, item % parts_);
    std::atomic<std::int32_t>& done =
        frame_.parts_done[static_cast<std::size_t>(sequence * kv_heads_ + head)];
    // What others wrote before they counted is seen by the last who counts.
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < parts_) return;
    done.store(0, std::memory_order_relaxed);
    merge(sequence, queries, head);
  }

 private:
  // Where a thread's share of the items begins.
  std::int64_t begin(int thread, int threads) const {
    if (thread == 0) return 0;
    std::int64_t before = kv_heads_ * work_ * thread / threads;
    for (std::int64_t sequence = 0; sequence < sequence_count(task_, frame_); ++sequence) {
      const FewQueries few = few_queries(task_, frame_, sequence);
      if (before < kv_heads_ * few.work()) {
        const std::int64_t head = before / few.work(), keys = before % few.work() / few.queries;
        return (sequence * kv_heads_ + head) * parts_ + KeyParts(few.keys).nearest(keys);
      }
      before -= kv_heads_ * few.work();
    }
    return items();
  }

  char* part(std::int64_t sequence, std::int64_t head, std::int64_t query,
             std::int64_t index) const {
    const std::int64_t token = (sequence * kv_heads_ + head) * queries_ + query;
    return frame_.parts + (token * parts_ + index) * part_bytes_;
  }

  // A number per query head of the group.
  std::int64_t numbers(const Operand& operand, std::int64_t head) const {
    return argument(operand.address(frame_) + 4 * head * task_.spec.group);
  }

  void compute(std::int64_t sequence, const Queries& queries, std::int64_t head,
               std::int64_t index) {
    const std::int64_t first_head = head * task_.spec.group;
    const KeysAndValues cached(task_, frame_, sequence, head);
    cached.give<AttentionArgs>(part_args_);
    if (task_.spec.slopes) part_args_[AttentionArgs::slopes] = numbers(task_.slopes, head);
    for (std::int64_t query = queries.padding(); query < queries.count; ++query) {
      const std::int64_t batch = queries.batch, row = queries.first + query;
      const KeyRange keys = keys_of(task_, frame_, batch, row);
      if (index >= KeyParts(keys).count()) continue;
      const KeyRange of_part = KeyParts(keys).part(index);
      part_args_[AttentionArgs::q] = argument(rows_.q(batch, first_head, row));
      part_args_[AttentionArgs::part] =
          argument(part(sequence, head, query - queries.padding(), index));
      part_args_[AttentionArgs::mask] = argument(rows_.mask(batch, first_head, row));
      part_args_[AttentionArgs::origin] = keys.first;
      part_args_[AttentionArgs::first_key] = of_part.first;
      part_args_[AttentionArgs::key_count] = of_part.count;
      part_args_[AttentionArgs::first_chunk] =
          kChunkKeys - (of_part.first - of_part.origin) % kChunkKeys;
      task_.kernel->function(part_args_);
    }
  }

  // The first one that the item's part reads, or null if it reads none.
  const char* first_key(std::int64_t item) const {
    const std::int64_t head = item / parts_ % kv_heads_, sequence = item / parts_ / kv_heads_;
    const Queries queries = queries_of(task_, frame_, sequence);
    const std::int64_t index = item % parts_, query = queries.padding();
    if (fills_tiles(task_, queries) || query == queries.count) return nullptr;
    const KeyParts parts(keys_of(task_, frame_, queries.batch, queries.first + query));
    if (index >= parts.count()) return nullptr;
    return KeysAndValues(task_, frame_, sequence, head).key(parts.part(index).first);
  }

  void merge(std::int64_t sequence, const Queries& queries, std::int64_t head) {
    if (task_.spec.sinks) merge_args_[MergeArgs::sinks] = numbers(task_.sinks, head);
    for (std::int64_t query = 0; query < queries.count; ++query) {
      const std::int64_t batch = queries.batch, row = queries.first + query;
      merge_args_[MergeArgs::parts] =
          argument(part(sequence, head, std::max<std::int64_t>(query - queries.padding(), 0), 0));
      merge_args_[MergeArgs::part_count] = KeyParts(keys_of(task_, frame_, batch, row)).count();
      merge_args_[MergeArgs::output] = argument(rows_.output(batch, head * task_.spec.group, row));
      task_.merge->function(merge_args_);
    }
  }

  const AttentionTask& task_;
  const Frame& frame_;
  const QueryRows rows_;
  const std::int64_t kv_heads_;
  const std::int64_t part_bytes_ = task_.spec.group * PartLayout(task_.spec).bytes;
  std::int64_t queries_ = 0, parts_ = 1;  // the most of a sequence
  std::int64_t work_ = 0;                 // of a head of all sequences: keys that tokens meet
  std::int64_t part_args_[AttentionArgs::count] = {};
  std::int64_t merge_args_[MergeArgs::count] = {};
};

void run_parts(const AttentionTask& task, const Frame& frame, const Turn& turn, int thread,
               int threads) {
  Parts parts(task, frame, frame.scratch[static_cast<std::size_t>(thread)]);
  struct PartItems {
    const Parts& parts;
    std::int64_t count, bytes;
    WorkRange share(int of, int team) const { return parts.share(of, team); }
  };
  const PartItems items{parts, parts.items(), 2 * kPartKeys * row_bytes(task.spec)};
  share_with_tails(items, thread, threads, turn, [&](WorkRange range) {
    for (std::int64_t item = range.begin; item < range.end; ++item) parts.run(item, range.end);
  });
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
    arguments_[PrefillArgs::strips] = argument(strips_.data());
    arguments_[PrefillArgs::scale] = std::bit_cast<std::int32_t>(task.scale);
    arguments_[PrefillArgs::softcap] = std::bit_cast<std::int32_t>(task.softcap);
    nowhere_ = scratch;
    arguments_[PrefillArgs::scratch] = argument(scratch + query_bytes(task.spec));
  }

  void run(std::int64_t sequence, std::int64_t kv_head, std::int64_t first_row,
           std::int64_t count) {
    constexpr std::int64_t far = std::numeric_limits<std::int64_t>::max();
    const Queries queries = queries_of(task_, frame_, sequence);
    const std::int64_t strip_rows = ops::strip_rows(task_.spec.lanes);
    const std::int64_t strips = (count + strip_rows - 1) / strip_rows;
    std::int64_t first = far, end = 0, origin = 0;
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      StripKeys& keys = strips_[static_cast<std::size_t>(strip)];
      keys = {0, 0, far};
      for (std::int64_t i = strip * strip_rows; i < (strip + 1) * strip_rows; ++i) {
        const KeyRange row = set_row(queries, kv_head, first_row, i, i < count);
        if (i >= count) continue;
        keys.end = std::max(keys.end, row.first + row.count);
        keys.sure_first = std::max(keys.sure_first, row.first);
        keys.sure_end = std::min(keys.sure_end, row.first + row.count);
        if (row.count > 0) first = std::min(first, row.first);
        origin = row.origin;
      }
      end = std::max(end, keys.end);
    }
    first = std::min(first, end);
    arguments_[PrefillArgs::strip_count] = strips;
    arguments_[PrefillArgs::first_key] = first;
    arguments_[PrefillArgs::key_count] = end - first;
    // Chunks end at the same keys for all queries of a sequence, and wherever it begins.
    arguments_[PrefillArgs::first_chunk] = kChunkKeys - (first - origin) % kChunkKeys;
    const KeysAndValues cached(task_, frame_, sequence, kv_head);
    cached.give<PrefillArgs>(arguments_);
    task_.prefill->function(arguments_);
  }

 private:
  KeyRange set_row(const Queries& queries, std::int64_t kv_head, std::int64_t first_row,
                   std::int64_t index, bool exists) {
    const QueryRows rows(task_, frame_);
    const int group = task_.spec.group;
    const std::int64_t row = first_row + (exists ? index : 0);
    const std::int64_t query = queries.first + row / group, head = kv_head * group + row % group;
    const KeyRange keys = exists ? keys_of(task_, frame_, queries.batch, query) : KeyRange{0, 0, 0};
    const auto i = static_cast<std::size_t>(index);
    q_[i] = rows.q(queries.batch, head, query);
    output_[i] = exists ? rows.output(queries.batch, head, query) : nowhere_;
    mask_[i] = rows.mask(queries.batch, head, query);
    first_keys_[i] = static_cast<std::int32_t>(keys.first);
    end_keys_[i] = static_cast<std::int32_t>(keys.first + keys.count);
    if (task_.spec.slopes) slopes_[i] = number(task_.slopes, head);
    if (task_.spec.sinks) sinks_[i] = number(task_.sinks, head);
    return keys;
  }

  float number(const Operand& numbers, std::int64_t head) const {
    return reinterpret_cast<const float*>(numbers.address(frame_))[head];
  }

  const AttentionTask& task_;
  const Frame& frame_;
  char* nowhere_;  // output of rows that do not exist
  std::array<const void*, kMostTileRows> q_, output_, mask_;
  std::array<std::int32_t, kMostTileRows> first_keys_, end_keys_;
  std::array<float, kMostTileRows> slopes_, sinks_;
  std::array<StripKeys, kMostStrips> strips_;
  std::int64_t arguments_[PrefillArgs::count] = {};
};

// Of all sequences and key/value heads.
std::int64_t tile_count(const AttentionTask& task, const Frame& frame, std::int64_t tile_rows) {
  std::int64_t count = 0;
  for (std::int64_t sequence = 0; sequence < sequence_count(task, frame); ++sequence) {
    const Queries queries = queries_of(task, frame, sequence);
    if (!fills_tiles(task, queries)) continue;
    count += (queries.count * task.spec.group + tile_rows - 1) / tile_rows;
  }
  return count * frame.dim(task.kv_heads);
}

// Tiles as large as leave each thread a few of them: no bit depends on where they end.
std::int64_t rows_of_tiles(const AttentionTask& task, const Frame& frame, int threads) {
  constexpr std::int64_t enough = 4;  // for each thread
  std::int64_t strips = kMostStrips;
  const std::int64_t strip_rows = ops::strip_rows(task.spec.lanes);
  while (strips > 1 && tile_count(task, frame, strips * strip_rows) < enough * threads) strips /= 2;
  return strips * strip_rows;
}

void run_tiles(const AttentionTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t kv_heads = frame.dim(task.kv_heads);
  const std::int64_t tile_rows = rows_of_tiles(task, frame, threads);
  Tile tile(task, frame, frame.scratch[static_cast<std::size_t>(thread)]);
  std::int64_t item = 0;
  TakenItems mine(tile_count(task, frame, tile_rows), thread, threads, frame.turn);
  for (std::int64_t sequence = 0; sequence < sequence_count(task, frame); ++sequence) {
    const Queries queries = queries_of(task, frame, sequence);
    if (!fills_tiles(task, queries)) continue;
    const std::int64_t rows = queries.count * task.spec.group;
    for (std::int64_t head = 0; head < kv_heads; ++head) {
      for (std::int64_t first = 0; first < rows; first += tile_rows, ++item) {
        if (!mine.takes(item)) continue;
        tile.run(sequence, head, first, std::min(tile_rows, rows - first));
      }
    }
  }
}

}  // namespace

void run(const AttentionTask& task, const Frame& frame, int thread, int threads) {
  // Both kinds of sequences meet in ragged steps only.
  bool few = false, many = false;
  for (std::int64_t sequence = 0; sequence < sequence_count(task, frame); ++sequence) {
    (fills_tiles(task, queries_of(task, frame, sequence)) ? many : few) = true;
  }
  if (many) run_tiles(task, frame, thread, threads);
  // One of them may have the turn: no barrier is between.
  if (few) run_parts(task, frame, many ? Turn{} : frame.turn, thread, threads);
}

std::int64_t sequence_count(const AttentionTask& task, const Frame& frame) {
  const KvCache* cache = cache_of(task, frame);
  return cache != nullptr && cache->ragged() ? cache->batch() : frame.dim(task.batch);
}

Queries queries_of(const AttentionTask& task, const Frame& frame, std::int64_t sequence) {
  const KvCache* cache = cache_of(task, frame);
  if (cache == nullptr || !cache->ragged()) {
    const std::int64_t queries = frame.dim(task.queries);
    if (cache == nullptr) return {sequence, 0, queries, queries};
    // Alone, it would have come without the padding on its left.
    const std::int64_t first = cache->first_keys()[static_cast<std::size_t>(sequence)];
    const std::int64_t padding =
        std::clamp<std::int64_t>(first - cache->length(sequence), 0, queries);
    return {sequence, 0, queries, queries - padding};
  }
  const auto& ragged = cache->rows().sequences[static_cast<std::size_t>(sequence)];
  // One row is taken for a step of decode. It may be the last of a prompt, and the first few may be
  // of a long one: nobody says. Those may differ from the prompt at once, as kernels do.
  const std::int64_t at_once = ragged.rows > 1 ? ragged.length + ragged.rows : 1;
  return {0, ragged.first_row, ragged.rows, at_once};
}

KeyRange keys_of(const AttentionTask& task, const Frame& frame, std::int64_t batch,
                 std::int64_t query) {
  std::int64_t origin = 0, end = 0;
  if (const KvCache* cache = cache_of(task, frame)) {
    const KvCache::Place place = cache->place(batch, query);
    const auto in_blocks = [&](std::int64_t token) {
      return cache->place_in_blocks(place.sequence, token);
    };
    origin = in_blocks(cache->first_keys()[static_cast<std::size_t>(place.sequence)]);
    end = in_blocks(cache->length(place.sequence)) +
          (task.causal ? place.token + 1 : queries_of(task, frame, place.sequence).count);
  } else {
    const std::int64_t keys = frame.dim(task.keys);
    end = task.causal ? std::min(query + 1, keys) : keys;
  }
  const std::int64_t first = task.window > 0 ? std::max(origin, end - task.window) : origin;
  return {std::min(first, end), std::max<std::int64_t>(end - first, 0), origin};
}

ScratchSizes scratch_of(const AttentionTask& task, const Frame& frame) {
  ScratchSizes needed;
  bool few = false;
  for (std::int64_t sequence = 0; sequence < sequence_count(task, frame); ++sequence) {
    const Queries queries = queries_of(task, frame, sequence);
    std::int64_t bytes = scratch_bytes(task.spec);
    if (fills_tiles(task, queries)) {
      bytes =
          query_bytes(task.spec) + prefill_scratch_bytes({task.spec, task.arithmetic}, kMostStrips);
    } else {
      few = true;
    }
    needed.thread_bytes = std::max(needed.thread_bytes, bytes);
  }
  if (few) {
    needed.part_bytes = Parts(task, frame, nullptr).bytes();
    needed.counters = sequence_count(task, frame) * frame.dim(task.kv_heads);
  }
  return needed;
}

}  // namespace tilewright::ops
