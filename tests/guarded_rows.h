// GuardedRows: rows of an operand in a guarded buffer, with the bytes between rows poisoned. A
// kernel that reads past an operand dies; one that writes between rows is found by intact().
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernel_harness.h"

namespace tilewright {

class GuardedRows {
 public:
  using Flush = testing::GuardedBuffer::Flush;

  GuardedRows(std::int64_t rows, std::int64_t row_bytes, std::int64_t padding, Flush flush)
      : rows_(rows),
        row_bytes_(row_bytes),
        stride_(row_bytes + padding),
        buffer_(static_cast<std::size_t>(std::max<std::int64_t>(rows * stride_ - padding, 1)),
                flush) {
    std::memset(buffer_.data(), kPoison, buffer_.size());
  }

  std::byte* row(std::int64_t index) const { return buffer_.data() + index * stride_; }
  std::int64_t stride() const { return stride_; }
  std::int64_t address() const { return buffer_.address(); }

  // No byte around or between the rows has changed.
  bool intact() const {
    for (std::int64_t r = 0; r + 1 < rows_; ++r) {
      const std::byte* next = row(r + 1);
      const auto changed = [](std::byte b) { return b != std::byte{kPoison}; };
      if (std::any_of(next - (stride_ - row_bytes_), next, changed)) return false;
    }
    return buffer_.slack_intact();
  }

 private:
  static constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
  std::int64_t rows_, row_bytes_, stride_;
  testing::GuardedBuffer buffer_;
};

}  // namespace tilewright
