// GuardedRows: rows of bytes that end where an inaccessible page begins (or begin where one ends),
// with the bytes between rows poisoned. A kernel that reads past an operand dies; one that writes
// between rows is found by intact().
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace tilewright {

class GuardedRows {
 public:
  enum class Side { before, after };  // where the data touches an inaccessible page

  GuardedRows(std::int64_t rows, std::int64_t row_bytes, std::int64_t padding, Side side)
      : rows_(rows), row_bytes_(row_bytes), stride_(row_bytes + padding) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const auto used = static_cast<std::size_t>(
        std::max<std::int64_t>(rows > 0 ? (rows - 1) * stride_ + row_bytes : 0, 1));
    mapped_ = (used + page - 1) / page * page + 2 * page;
    void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<std::byte*>(memory);
    if (mprotect(base_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE) != 0) std::abort();
    std::memset(base_ + page, kPoison, mapped_ - 2 * page);
    data_ = side == Side::before ? base_ + page : base_ + mapped_ - page - used;
  }
  ~GuardedRows() { munmap(base_, mapped_); }
  GuardedRows(const GuardedRows&) = delete;
  GuardedRows& operator=(const GuardedRows&) = delete;

  std::byte* row(std::int64_t index) const { return data_ + index * stride_; }
  std::int64_t stride() const { return stride_; }
  std::int64_t address() const { return reinterpret_cast<std::int64_t>(data_); }

  // No byte between the rows has changed.
  bool intact() const {
    for (std::int64_t r = 0; r + 1 < rows_; ++r) {
      const std::byte* next = row(r + 1);
      const std::byte* padding = row(r) + row_bytes_;
      if (std::any_of(padding, next, [](std::byte b) { return b != std::byte{kPoison}; })) {
        return false;
      }
    }
    return true;
  }

 private:
  static constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
  std::int64_t rows_, row_bytes_, stride_;
  std::size_t mapped_ = 0;
  std::byte* base_ = nullptr;
  std::byte* data_ = nullptr;
};

}  // namespace tilewright
