// KvCache: keys and values of one layer for several sequences, in blocks of equally many tokens.
//
// Blocks are its own, for a batch of sequences of one length, or pages of memory that somebody else
// owns, for the sequences of ragged steps (ragged_rows.h). Both are found through a table.
//
// A block of its own holds [block_tokens][head_dim] of K of one head, another of V; blocks are
// found through a table of pointers per (sequence, kv head), the form that the attention kernel
// reads. Kernels write tokens behind `length()`; the caller commits them with advance() when the
// step has succeeded, so a failed step leaves the cache as it was.
//
// Blocks come in extents, as sequences grow: [kv_heads][blocks][K, V] of one sequence. So a head's
// keys and values lie in the order in which a thread reads them, up to 64 blocks in one piece: from
// pieces of 8 KB a core gets a third of what it gets from memory in order, with prefetches 0.7 to
// 0.8 (perf/results/attention-zen4.md). An extent has what is asked for, or a quarter of what the
// sequence has, at most 4 blocks, if that is more: of an extent all pages are new, which a token
// must not wait long for.
//
// Of i8, a block is [block_tokens] f32 scales, then [block_tokens][head_dim] integers
// (jit/base/eight_bits.h): kernels find both from the one pointer of the table, which is the first
// token's, and read the scales of neighbouring tokens as vectors, before the tokens.
//
// Thread-compatible: one program step at a time uses a cache. Tested by kv_cache_test.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "graph/type.h"
#include "jit/base/result.h"
#include "ops/block_memory.h"
#include "ops/ragged_rows.h"

namespace tilewright::ops {

class KvCache {
 public:
  static constexpr std::int64_t block_tokens = 64;

  // dtype: f32, bf16, f16 or i8.
  KvCache(std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim, graph::DataType dtype);

  // Somebody else's memory: tokens of [kv_heads][head_dim], those of a page behind one another. It
  // holds no sequence until a step begins. REQUIRES: not i8, whose scales have no place there.
  struct Pages {
    char *keys, *values;
    std::int64_t page_tokens;
  };
  KvCache(const Pages& pages, std::int64_t kv_heads, std::int64_t head_dim, graph::DataType dtype);

  KvCache(KvCache&&) = default;
  KvCache& operator=(KvCache&&) = default;
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  std::int64_t batch() const { return batch_; }
  std::int64_t kv_heads() const { return kv_heads_; }
  std::int64_t head_dim() const { return head_dim_; }
  graph::DataType dtype() const { return dtype_; }
  std::int64_t length() const { return length_; }  // of each sequence; REQUIRES: not ragged
  std::int64_t length(std::int64_t sequence) const {
    return ragged() ? rows_->sequences[static_cast<std::size_t>(sequence)].length : length_;
  }
  std::int64_t bytes() const;  // of its own blocks

  // Of pages: the next step's rows. It ends with advance().
  void begin_step(std::shared_ptr<const RaggedRows> rows);
  // Whether this or the last step is ragged, and then its rows.
  bool ragged() const { return rows_ != nullptr; }
  const RaggedRows& rows() const { return *rows_; }
  // Whose row this is, of tensors [batch, rows], and the how-manieth new token of that sequence.
  struct Place {
    std::int64_t sequence, token;
  };
  Place place(std::int64_t batch, std::int64_t row) const {
    if (!ragged()) return {batch, row};
    const std::int64_t sequence = rows_->sequence_of[static_cast<std::size_t>(row)];
    return {sequence, row - rows_->sequences[static_cast<std::size_t>(sequence)].first_row};
  }
  // Whether a step of [batch, rows] fits the sequences.
  bool takes(std::int64_t batch, std::int64_t rows) const {
    if (of_pages()) return step_begun_ && batch == 1 && rows == rows_->rows();
    return batch == batch_;
  }

  // The first key of each sequence that may be attended to (left padding); zeros at first.
  // Before there are tokens, it also says where they will lie.
  std::span<const std::int64_t> first_keys() const { return first_keys_; }
  Status set_first_keys(std::span<const std::int64_t> first_keys);

  // Where a token lies, counted in tokens from the begin of its sequence's first block: the first
  // key is the first of a block, as if nothing were before it. So a chunk of keys is a block.
  std::int64_t place_in_blocks(std::int64_t sequence, std::int64_t token) const {
    return token + shifts_[static_cast<std::size_t>(sequence)];
  }

  // Makes room for tokens [length, length + tokens) in blocks of its own. Error: out of memory; the
  // cache is unchanged then.
  Status reserve(std::int64_t tokens);
  void advance(std::int64_t tokens);   // REQUIRES: reserved
  void truncate(std::int64_t length);  // REQUIRES: 0 <= length <= length(), blocks of its own

  // Pointers to the blocks of one (sequence, kv head).
  void* const* key_blocks(std::int64_t sequence, std::int64_t head) const;
  void* const* value_blocks(std::int64_t sequence, std::int64_t head) const;
  // Where token `token` of (sequence, head 0) lies; the token's other heads follow at
  // head_stride() bytes. A head's tokens of one block follow at token_stride().
  char* key(std::int64_t sequence, std::int64_t token) const;
  char* value(std::int64_t sequence, std::int64_t token) const;
  // The same of their scales. REQUIRES: i8
  char* key_scale(std::int64_t sequence, std::int64_t token) const;
  char* value_scale(std::int64_t sequence, std::int64_t token) const;
  std::int64_t head_stride(std::int64_t sequence, std::int64_t token) const;
  std::int64_t token_stride() const;
  std::int64_t tokens_per_block() const { return of_pages() ? pages_.page_tokens : block_tokens; }

  // REQUIRES, from here on: blocks of its own. Contents are contiguous [batch, kv_heads, tokens,
  // head_dim] in the cache's dtype, or of a cache of i8 in f32 (without loss), bf16 or f16.

  // The first tokens. REQUIRES: reserved
  void read(std::int64_t tokens, graph::DataType dtype, void* keys, void* values) const;
  // Behind the last token. Error: out of memory; the cache is unchanged then.
  Status append(std::int64_t tokens, graph::DataType dtype, const void* keys, const void* values);
  // In place of all contents, alike.
  Status write(std::int64_t tokens, graph::DataType dtype, const void* keys, const void* values);
  // Sequence i becomes the old sequence indices[i] (beam search, batch selection and repetition):
  // the batch becomes indices.size().
  Status reorder(std::span<const std::int64_t> indices);

 private:
  bool of_pages() const { return pages_.page_tokens != 0; }
  std::int64_t row_bytes() const { return head_dim_ * graph::size_in_bytes(dtype_); }
  struct Extent {
    std::int64_t blocks;
    std::vector<BlockBytes> memory;  // [sequence]
  };
  std::int64_t scale_bytes() const;  // of a block
  std::int64_t block_bytes() const;  // of K or V of a head
  std::int64_t extent_bytes(std::int64_t blocks) const {
    return kv_heads_ * blocks * 2 * block_bytes();
  }
  std::int64_t block_count() const;  // of a head's K
  // For so many tokens of each sequence.
  std::int64_t blocks_for(std::int64_t tokens) const;
  // Nothing: out of memory.
  std::optional<Extent> make_extent(std::int64_t blocks) const;
  // place: of place_in_blocks()
  char* token_in(void* const* blocks, std::int64_t place) const;
  char* scale_in(void* const* blocks, std::int64_t place) const;
  // visit(row, its scale or null) of each token [first, first + tokens) of each head and sequence,
  // in the order of contents: of K, else of V.
  template <class Visit>
  void each_row(bool values, std::int64_t first, std::int64_t tokens, const Visit& visit) const;
  void rebuild_tables();

  std::int64_t batch_, kv_heads_, head_dim_, length_ = 0;
  graph::DataType dtype_;
  Pages pages_ = {};
  std::shared_ptr<const RaggedRows> rows_;
  bool step_begun_ = false;  // of pages
  std::vector<std::int64_t> first_keys_;
  std::vector<std::int64_t> shifts_;  // of places; below block_tokens, of pages 0
  std::vector<Extent> extents_;       // in the order of their tokens
  std::vector<std::vector<void*>> key_tables_,
      value_tables_;  // [sequence * kv_heads + head][block]
};

}  // namespace tilewright::ops
