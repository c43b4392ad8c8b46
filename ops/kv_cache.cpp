// KvCache: see kv_cache.h. Tested by kv_cache_test.
#include "ops/kv_cache.h"

#include <cstdlib>
#include <cstring>

namespace tilewright::ops {

KvCache::KvCache(std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim,
                 graph::DataType dtype)
    : batch_(batch), kv_heads_(kv_heads), head_dim_(head_dim), dtype_(dtype) {
  first_keys_.assign(static_cast<std::size_t>(batch), 0);
  blocks_.resize(static_cast<std::size_t>(batch));
  rebuild_tables();
}

KvCache::KvCache(const Pages& pages, std::int64_t kv_heads, std::int64_t head_dim,
                 graph::DataType dtype)
    : batch_(0), kv_heads_(kv_heads), head_dim_(head_dim), dtype_(dtype), pages_(pages) {}

void KvCache::begin_step(std::shared_ptr<const RaggedRows> rows) {
  rows_ = std::move(rows);
  step_begun_ = true;
  batch_ = static_cast<std::int64_t>(rows_->sequences.size());
  first_keys_.assign(rows_->sequences.size(), 0);
  rebuild_tables();
}

std::int64_t KvCache::token_stride() const {
  return of_pages() ? kv_heads_ * row_bytes() : row_bytes();
}

std::int64_t KvCache::head_stride() const {
  return of_pages() ? row_bytes() : block_tokens * row_bytes();
}

std::int64_t KvCache::bytes() const {
  std::int64_t count = 0;
  for (const auto& sequence : blocks_) count += static_cast<std::int64_t>(sequence.size());
  return count * 2 * block_bytes();
}

Status KvCache::set_first_keys(std::span<const std::int64_t> first_keys) {
  if (static_cast<std::int64_t>(first_keys.size()) != batch_) {
    return Error{"first_keys has another length than the cache's batch"};
  }
  for (std::int64_t first : first_keys) {
    if (first < 0) return Error{"first_keys has a negative entry"};
  }
  first_keys_.assign(first_keys.begin(), first_keys.end());
  return {};
}

Status KvCache::reserve(std::int64_t tokens) {
  if (of_pages()) return {};  // RaggedRows was made with enough of them
  const auto wanted =
      static_cast<std::size_t>((length_ + tokens + block_tokens - 1) / block_tokens);
  bool grown = false;
  for (auto& sequence : blocks_) {
    while (sequence.size() < wanted) {
      const auto size = static_cast<std::size_t>((2 * block_bytes() + 63) / 64 * 64);
      void* memory = std::aligned_alloc(64, size);
      if (memory == nullptr) {
        rebuild_tables();
        return Error{"out of memory for the key/value cache"};
      }
      // Zeroed so that no kernel can ever meet a NaN in a token that was not written.
      std::memset(memory, 0, size);
      sequence.push_back(Block{{static_cast<char*>(memory), std::free}});
      grown = true;
    }
  }
  if (grown) rebuild_tables();
  return {};
}

void KvCache::advance(std::int64_t tokens) {
  if (of_pages()) {
    step_begun_ = false;  // where the next tokens go, only its owner knows
    return;
  }
  length_ += tokens;
}

void KvCache::truncate(std::int64_t length) { length_ = length; }

void KvCache::rebuild_tables() {
  const auto tables = static_cast<std::size_t>(batch_ * kv_heads_);
  key_tables_.assign(tables, {});
  value_tables_.assign(tables, {});
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t h = 0; h < kv_heads_; ++h) {
      auto& keys = key_tables_[static_cast<std::size_t>(b * kv_heads_ + h)];
      auto& values = value_tables_[static_cast<std::size_t>(b * kv_heads_ + h)];
      if (of_pages()) {
        for (std::int64_t page : rows_->sequences[static_cast<std::size_t>(b)].pages) {
          const std::int64_t offset = page * token_stride() + h * head_stride();
          keys.push_back(pages_.keys + offset);
          values.push_back(pages_.values + offset);
        }
        continue;
      }
      for (const Block& block : blocks_[static_cast<std::size_t>(b)]) {
        keys.push_back(block.memory.get() + h * head_stride());
        values.push_back(block.memory.get() + block_bytes() + h * head_stride());
      }
    }
  }
}

void* const* KvCache::key_blocks(std::int64_t sequence, std::int64_t head) const {
  return key_tables_[static_cast<std::size_t>(sequence * kv_heads_ + head)].data();
}

void* const* KvCache::value_blocks(std::int64_t sequence, std::int64_t head) const {
  return value_tables_[static_cast<std::size_t>(sequence * kv_heads_ + head)].data();
}

char* KvCache::token_in(void* const* blocks, std::int64_t token) const {
  return static_cast<char*>(blocks[token / tokens_per_block()]) +
         token % tokens_per_block() * token_stride();
}

char* KvCache::key(std::int64_t sequence, std::int64_t token) const {
  return token_in(key_blocks(sequence, 0), token);
}

char* KvCache::value(std::int64_t sequence, std::int64_t token) const {
  return token_in(value_blocks(sequence, 0), token);
}

void KvCache::read(void* keys, void* values) const {
  const auto row = static_cast<std::size_t>(token_stride());
  auto* key_out = static_cast<char*>(keys);
  auto* value_out = static_cast<char*>(values);
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t h = 0; h < kv_heads_; ++h) {
      for (std::int64_t t = 0; t < length_; ++t) {
        std::memcpy(key_out, key(b, t) + h * head_stride(), row);
        std::memcpy(value_out, value(b, t) + h * head_stride(), row);
        key_out += row;
        value_out += row;
      }
    }
  }
}

Status KvCache::write(const void* keys, const void* values, std::int64_t length) {
  const std::int64_t old_length = length_;
  length_ = 0;
  if (Status reserved = reserve(length); !reserved) {
    length_ = old_length;
    return reserved;
  }
  const auto row = static_cast<std::size_t>(token_stride());
  const auto* key_in = static_cast<const char*>(keys);
  const auto* value_in = static_cast<const char*>(values);
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t h = 0; h < kv_heads_; ++h) {
      for (std::int64_t t = 0; t < length; ++t) {
        std::memcpy(key(b, t) + h * head_stride(), key_in, row);
        std::memcpy(value(b, t) + h * head_stride(), value_in, row);
        key_in += row;
        value_in += row;
      }
    }
  }
  length_ = length;
  return {};
}

Status KvCache::reorder(std::span<const std::int64_t> indices) {
  for (std::int64_t index : indices) {
    if (index < 0 || index >= batch_) return Error{"a sequence index is outside the cache's batch"};
  }
  KvCache reordered(static_cast<std::int64_t>(indices.size()), kv_heads_, head_dim_, dtype_);
  if (Status reserved = reordered.reserve(length_); !reserved) return reserved;
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const auto source = static_cast<std::size_t>(indices[i]);
    for (std::size_t block = 0; block < reordered.blocks_[i].size(); ++block) {
      std::memcpy(reordered.blocks_[i][block].memory.get(), blocks_[source][block].memory.get(),
                  static_cast<std::size_t>(2 * block_bytes()));
    }
    reordered.first_keys_[i] = first_keys_[source];
  }
  reordered.length_ = length_;
  *this = std::move(reordered);
  return {};
}

}  // namespace tilewright::ops
