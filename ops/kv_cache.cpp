// KvCache: see kv_cache.h. Tested by kv_cache_test.
#include "ops/kv_cache.h"

#include <cstring>

#include "jit/base/eight_bits.h"
#include "ops/scalar_type.h"

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
  if (of_pages()) return row_bytes();
  const std::int64_t scale_bytes = dtype_ == graph::DataType::i8 ? sizeof(float) : 0;
  return block_tokens * (row_bytes() + scale_bytes);
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
      const auto size = static_cast<std::size_t>(2 * block_bytes());
      BlockBytes memory = allocate_block(size);
      if (!memory) {
        rebuild_tables();
        return Error{"out of memory for the key/value cache"};
      }
      sequence.push_back(Block{std::move(memory)});
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

char* KvCache::scale_in(void* const* blocks, std::int64_t token) const {
  return static_cast<char*>(blocks[token / block_tokens]) + block_tokens * token_stride() +
         token % block_tokens * static_cast<std::int64_t>(sizeof(float));
}

char* KvCache::key_scale(std::int64_t sequence, std::int64_t token) const {
  return scale_in(key_blocks(sequence, 0), token);
}

char* KvCache::value_scale(std::int64_t sequence, std::int64_t token) const {
  return scale_in(value_blocks(sequence, 0), token);
}

template <class Visit>
void KvCache::each_row(bool values, std::int64_t first, std::int64_t tokens,
                       const Visit& visit) const {
  const bool has_scales = dtype_ == graph::DataType::i8;
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t h = 0; h < kv_heads_; ++h) {
      void* const* blocks = values ? value_blocks(b, h) : key_blocks(b, h);
      for (std::int64_t t = first; t < first + tokens; ++t) {
        visit(token_in(blocks, t), has_scales ? scale_in(blocks, t) : nullptr);
      }
    }
  }
}

void KvCache::read(std::int64_t tokens, graph::DataType dtype, void* keys, void* values) const {
  const int bytes = graph::size_in_bytes(dtype);
  for (bool of_values : {false, true}) {
    char* to = static_cast<char*>(of_values ? values : keys);
    each_row(of_values, 0, tokens, [&](const char* row, const char* scale) {
      if (scale == nullptr) {
        std::memcpy(to, row, static_cast<std::size_t>(row_bytes()));
      } else {
        const double factor = read_scalar(graph::DataType::f32, scale);
        for (std::int64_t i = 0; i < head_dim_; ++i) {
          write_scalar(dtype, to + i * bytes, factor * read_scalar(dtype_, row + i));
        }
      }
      to += head_dim_ * bytes;
    });
  }
}

Status KvCache::append(std::int64_t tokens, graph::DataType dtype, const void* keys,
                       const void* values) {
  if (Status reserved = reserve(tokens); !reserved) return reserved;
  const int bytes = graph::size_in_bytes(dtype);
  for (bool of_values : {false, true}) {
    const char* from = static_cast<const char*>(of_values ? values : keys);
    each_row(of_values, length_, tokens, [&](char* row, char* scale) {
      if (scale == nullptr) {
        std::memcpy(row, from, static_cast<std::size_t>(row_bytes()));
      } else {
        const auto number = [&](std::int64_t i) {
          return static_cast<float>(read_scalar(dtype, from + i * bytes));
        };
        auto* integers = reinterpret_cast<std::int8_t*>(row);
        write_scalar(graph::DataType::f32, scale,
                     eight_bits::quantize(head_dim_, number, integers));
      }
      from += head_dim_ * bytes;
    });
  }
  advance(tokens);
  return {};
}

Status KvCache::write(std::int64_t tokens, graph::DataType dtype, const void* keys,
                      const void* values) {
  const std::int64_t old_length = length_;
  length_ = 0;
  Status written = append(tokens, dtype, keys, values);
  if (!written) length_ = old_length;
  return written;
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
