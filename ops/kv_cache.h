// KvCache: keys and values of one layer for a batch of sequences, in blocks of block_tokens tokens.
//
// A block holds [kv_heads][block_tokens][head_dim] of K, another of V; blocks are allocated as
// sequences grow and are found through a table of pointers per (sequence, kv head), the form that
// the attention kernel reads. Kernels write tokens behind `length()`; the caller commits them with
// advance() when the step has succeeded, so a failed step leaves the cache as it was.
//
// Thread-compatible: one program step at a time uses a cache. Tested by kv_cache_test.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "graph/type.h"
#include "jit/base/result.h"

namespace tilewright::ops {

class KvCache {
 public:
  static constexpr std::int64_t block_tokens = 64;

  // dtype: f32, bf16 or f16.
  KvCache(std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim, graph::DataType dtype);

  KvCache(KvCache&&) = default;
  KvCache& operator=(KvCache&&) = default;
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  std::int64_t batch() const { return batch_; }
  std::int64_t kv_heads() const { return kv_heads_; }
  std::int64_t head_dim() const { return head_dim_; }
  graph::DataType dtype() const { return dtype_; }
  std::int64_t length() const { return length_; }
  std::int64_t bytes() const;

  // The first key of each sequence that may be attended to (left padding); zeros at first.
  std::span<const std::int64_t> first_keys() const { return first_keys_; }
  Status set_first_keys(std::span<const std::int64_t> first_keys);

  // Makes room for tokens [length, length + tokens). Error: out of memory; the cache is unchanged
  // then.
  Status reserve(std::int64_t tokens);
  void advance(std::int64_t tokens);   // REQUIRES: reserved
  void truncate(std::int64_t length);  // REQUIRES: 0 <= length <= length()

  // Pointers to the blocks of one (sequence, kv head).
  void* const* key_blocks(std::int64_t sequence, std::int64_t head) const;
  void* const* value_blocks(std::int64_t sequence, std::int64_t head) const;
  // Where token `token` of (sequence, head 0) lies; heads follow at head_stride() bytes.
  char* key(std::int64_t sequence, std::int64_t token) const;
  char* value(std::int64_t sequence, std::int64_t token) const;
  std::int64_t head_stride() const { return block_tokens * token_stride(); }
  std::int64_t token_stride() const;

  // Whole contents as contiguous [batch, kv_heads, length, head_dim] in the cache's dtype.
  void read(void* keys, void* values) const;
  // Replaces the contents: [batch, kv_heads, length, head_dim].
  Status write(const void* keys, const void* values, std::int64_t length);
  // Sequence i becomes the old sequence indices[i] (beam search, batch selection and repetition):
  // the batch becomes indices.size().
  Status reorder(std::span<const std::int64_t> indices);

 private:
  struct Block {
    std::unique_ptr<char, void (*)(void*)> memory;  // K then V
  };
  std::int64_t block_bytes() const { return kv_heads_ * head_stride(); }
  void rebuild_tables();

  std::int64_t batch_, kv_heads_, head_dim_, length_ = 0;
  graph::DataType dtype_;
  std::vector<std::int64_t> first_keys_;
  std::vector<std::vector<Block>> blocks_;  // [sequence][block]
  std::vector<std::vector<void*>> key_tables_,
      value_tables_;  // [sequence * kv_heads + head][block]
};

}  // namespace tilewright::ops
