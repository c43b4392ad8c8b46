// KvCache: see kv_cache.h. Tested by kv_cache_test.
#include "ops/kv_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "jit/base/eight_bits.h"
#include "ops/scalar_type.h"

namespace tilewright::ops {
namespace {

// Of an extent.
constexpr std::int64_t kMostBlocks = 64;
// Blocks that nobody has asked for yet: a part of what a sequence has, and at most so many.
constexpr std::int64_t kGrowthPart = 4, kMostBlocksAhead = 4;

}  // namespace

KvCache::KvCache(std::int64_t batch, std::int64_t kv_heads, std::int64_t head_dim,
                 graph::DataType dtype)
    : batch_(batch), kv_heads_(kv_heads), head_dim_(head_dim), dtype_(dtype) {
  first_keys_.assign(static_cast<std::size_t>(batch), 0);
  shifts_ = first_keys_;
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
  shifts_ = first_keys_;
  rebuild_tables();
}

std::int64_t KvCache::token_stride() const {
  return of_pages() ? kv_heads_ * row_bytes() : row_bytes();
}

std::int64_t KvCache::head_stride(std::int64_t sequence, std::int64_t token) const {
  if (of_pages() || kv_heads_ == 1) return row_bytes();
  const std::int64_t block = place_in_blocks(sequence, token) / block_tokens;
  return static_cast<char*>(key_blocks(sequence, 1)[block]) -
         static_cast<char*>(key_blocks(sequence, 0)[block]);
}

std::int64_t KvCache::scale_bytes() const {
  return dtype_ == graph::DataType::i8 ? block_tokens * std::int64_t{sizeof(float)} : 0;
}

std::int64_t KvCache::block_bytes() const { return scale_bytes() + block_tokens * row_bytes(); }

std::int64_t KvCache::block_count() const {
  std::int64_t count = 0;
  for (const Extent& extent : extents_) count += extent.blocks;
  return count;
}

std::int64_t KvCache::blocks_for(std::int64_t tokens) const {
  const std::int64_t shift = shifts_.empty() ? 0 : std::ranges::max(shifts_);
  return (shift + tokens + block_tokens - 1) / block_tokens;
}

std::int64_t KvCache::bytes() const { return batch_ * extent_bytes(block_count()); }

Status KvCache::set_first_keys(std::span<const std::int64_t> first_keys) {
  if (static_cast<std::int64_t>(first_keys.size()) != batch_) {
    return Error{"first_keys has another length than the cache's batch"};
  }
  for (std::int64_t first : first_keys) {
    if (first < 0) return Error{"first_keys has a negative entry"};
  }
  first_keys_.assign(first_keys.begin(), first_keys.end());
  if (length_ > 0) return {};  // its tokens stay where they are
  for (std::size_t i = 0; i < shifts_.size(); ++i) {
    shifts_[i] = (block_tokens - first_keys_[i] % block_tokens) % block_tokens;
  }
  return {};
}

std::optional<KvCache::Extent> KvCache::make_extent(std::int64_t blocks) const {
  Extent extent{blocks, {}};
  for (std::int64_t b = 0; b < batch_; ++b) {
    extent.memory.push_back(allocate_block(static_cast<std::size_t>(extent_bytes(blocks))));
    if (!extent.memory.back()) return std::nullopt;
  }
  return extent;
}

Status KvCache::reserve(std::int64_t tokens) {
  if (of_pages()) return {};  // RaggedRows was made with enough of them
  const std::int64_t wanted = blocks_for(length_ + tokens);
  const std::size_t extents_before = extents_.size();
  for (std::int64_t have = block_count(); have < wanted; have = block_count()) {
    const std::int64_t ahead = std::min(have / kGrowthPart, kMostBlocksAhead);
    // Powers of two, so that there are few sizes of extents and what one sequence leaves fits
    // the next.
    const auto blocks = static_cast<std::int64_t>(std::bit_floor(
        static_cast<std::uint64_t>(std::min(std::max(wanted - have, ahead), kMostBlocks))));
    std::optional<Extent> extent = make_extent(std::max<std::int64_t>(blocks, 1));
    if (!extent) {
      extents_.resize(extents_before);
      return Error{"out of memory for the key/value cache"};
    }
    extents_.push_back(std::move(*extent));
  }
  if (extents_.size() > extents_before) rebuild_tables();
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
          const std::int64_t offset = page * token_stride() + h * row_bytes();
          keys.push_back(pages_.keys + offset);
          values.push_back(pages_.values + offset);
        }
        continue;
      }
      for (const Extent& extent : extents_) {
        char* const head = extent.memory[static_cast<std::size_t>(b)].get() +
                           h * extent.blocks * 2 * block_bytes() + scale_bytes();
        for (std::int64_t block = 0; block < extent.blocks; ++block) {
          keys.push_back(head + 2 * block * block_bytes());
          values.push_back(head + (2 * block + 1) * block_bytes());
        }
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

char* KvCache::token_in(void* const* blocks, std::int64_t place) const {
  return static_cast<char*>(blocks[place / tokens_per_block()]) +
         place % tokens_per_block() * token_stride();
}

char* KvCache::key(std::int64_t sequence, std::int64_t token) const {
  return token_in(key_blocks(sequence, 0), place_in_blocks(sequence, token));
}

char* KvCache::value(std::int64_t sequence, std::int64_t token) const {
  return token_in(value_blocks(sequence, 0), place_in_blocks(sequence, token));
}

char* KvCache::scale_in(void* const* blocks, std::int64_t place) const {
  return static_cast<char*>(blocks[place / block_tokens]) - scale_bytes() +
         place % block_tokens * static_cast<std::int64_t>(sizeof(float));
}

char* KvCache::key_scale(std::int64_t sequence, std::int64_t token) const {
  return scale_in(key_blocks(sequence, 0), place_in_blocks(sequence, token));
}

char* KvCache::value_scale(std::int64_t sequence, std::int64_t token) const {
  return scale_in(value_blocks(sequence, 0), place_in_blocks(sequence, token));
}

template <class Visit>
void KvCache::each_row(bool values, std::int64_t first, std::int64_t tokens,
                       const Visit& visit) const {
  const bool has_scales = dtype_ == graph::DataType::i8;
  for (std::int64_t b = 0; b < batch_; ++b) {
    for (std::int64_t h = 0; h < kv_heads_; ++h) {
      void* const* blocks = values ? value_blocks(b, h) : key_blocks(b, h);
      const std::int64_t begin = place_in_blocks(b, first);
      for (std::int64_t place = begin; place < begin + tokens; ++place) {
        visit(token_in(blocks, place), has_scales ? scale_in(blocks, place) : nullptr);
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
  for (const Extent& from : extents_) {
    if (reordered.block_count() >= blocks_for(length_)) break;
    std::optional<Extent> extent = reordered.make_extent(from.blocks);
    if (!extent) return Error{"out of memory for the key/value cache"};
    for (std::size_t i = 0; i < indices.size(); ++i) {
      std::memcpy(extent->memory[i].get(), from.memory[static_cast<std::size_t>(indices[i])].get(),
                  static_cast<std::size_t>(extent_bytes(from.blocks)));
    }
    reordered.extents_.push_back(std::move(*extent));
  }
  for (std::size_t i = 0; i < indices.size(); ++i) {
    reordered.first_keys_[i] = first_keys_[static_cast<std::size_t>(indices[i])];
    reordered.shifts_[i] = shifts_[static_cast<std::size_t>(indices[i])];
  }
  reordered.rebuild_tables();
  reordered.length_ = length_;
  *this = std::move(reordered);
  return {};
}

}  // namespace tilewright::ops
