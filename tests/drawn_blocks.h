// Blocks of keys or of values for the tests of both attention kernels, in guarded memory: poisoned
// where no key takes part, and a block without any is not even there. The last block may be short:
// tokens behind the end need not exist.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "guarded_rows.h"
#include "jit/base/eight_bits.h"
#include "ops/scalar_type.h"

namespace tilewright {

struct DrawnKeys {
  std::int64_t first = 0, count = 0;
  std::int64_t block_tokens = 1;
};

class DrawnBlocks {
 public:
  using DataType = graph::DataType;

  template <class Random>
  DrawnBlocks(const DrawnKeys& keys, DataType type, int head_dim, GuardedRows::Flush flush,
              Random& random)
      : block_tokens_(keys.block_tokens),
        type_(type),
        head_dim_(head_dim),
        stride_((head_dim + 3) * size_in_bytes(type)) {
    const std::int64_t end = keys.first + keys.count;
    for (std::int64_t token = 0; token < end; token += block_tokens_) {
      const std::int64_t tokens = std::min(block_tokens_, end - token);
      const std::int64_t bytes = scale_bytes() + tokens * stride_ - 3 * size_in_bytes(type);
      auto block = std::make_unique<GuardedRows>(1, bytes, 0, flush);
      for (std::int64_t t = std::max<std::int64_t>(keys.first - token, 0); t < tokens; ++t) {
        draw(first_token(*block), t, random);
      }
      table_.push_back(token + tokens > keys.first ? first_token(*block) : nullptr);
      blocks_.push_back(std::move(block));
    }
  }

  std::int64_t table() const { return reinterpret_cast<std::int64_t>(table_.data()); }
  std::int64_t stride() const { return stride_; }

  double element(std::int64_t key, int d) const {
    const std::byte* token = block_of(key) + key % block_tokens_ * stride_;
    const double number = ops::read_scalar(type_, token + d * size_in_bytes(type_));
    return has_scales() ? number * scale(key) : number;
  }

  // REQUIRES, as what is below: i8
  double scale(std::int64_t key) const {
    return ops::read_scalar(DataType::f32, scale(block_of(key), key % block_tokens_));
  }
  void set_scale(std::int64_t key, double scale_of_key) {
    ops::write_scalar(DataType::f32, scale(block_of(key), key % block_tokens_), scale_of_key);
  }

 private:
  bool has_scales() const { return type_ == DataType::i8; }

  std::int64_t scale_bytes() const { return has_scales() ? 4 * block_tokens_ : 0; }
  std::byte* block_of(std::int64_t key) const {
    return first_token(*blocks_[static_cast<std::size_t>(key / block_tokens_)]);
  }
  std::byte* first_token(const GuardedRows& block) const { return block.row(0) + scale_bytes(); }

  template <class Byte>
  Byte* scale(Byte* block, std::int64_t token) const {
    return block - scale_bytes() + 4 * token;
  }

  template <class Random>
  void draw(std::byte* block, std::int64_t token, Random& random) {
    std::normal_distribution<double> normal;
    std::byte* row = block + token * stride_;
    // Scales of all sizes, and rows of zeros.
    const double size = random() % 13 == 0 ? 0 : std::ldexp(1, -static_cast<int>(random() % 4));
    std::vector<float> numbers;
    for (int d = 0; d < head_dim_; ++d) {
      const double number = normal(random);
      if (has_scales()) {
        numbers.push_back(static_cast<float>(number * size));
      } else {
        ops::write_scalar(type_, row + d * size_in_bytes(type_), number);
      }
    }
    if (!has_scales()) return;
    const auto at = [&](std::int64_t i) { return numbers[static_cast<std::size_t>(i)]; };
    ops::write_scalar(DataType::f32, scale(block, token),
                      eight_bits::quantize(head_dim_, at, reinterpret_cast<std::int8_t*>(row)));
  }

  std::int64_t block_tokens_;
  DataType type_;
  int head_dim_;
  std::int64_t stride_;
  std::vector<std::unique_ptr<GuardedRows>> blocks_;
  std::vector<void*> table_;
};

}  // namespace tilewright
