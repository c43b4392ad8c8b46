// WeightMemory: see weight_memory.h. Tested by weight_memory_test.
#include "ops/weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "jit/base/round_up.h"

namespace tilewright::ops {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = 2u << 20;
constexpr std::size_t kAheadPart = 12;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of Linux 5.14

// Address space whose memory comes in huge pages: fewer TLB misses while decode streams all
// weights (measured: 10 % of bandwidth).
char* map(std::size_t bytes) {
  // What the alignment needs beyond `bytes` is given back at once.
  const std::size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* memory =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  if (slack == 0) return static_cast<char*>(memory);
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::size_t skipped = round_up(address, kHugePage) - address;
  char* begin = static_cast<char*>(memory) + skipped;
  if (skipped > 0) munmap(memory, skipped);
  if (skipped < slack) munmap(begin + bytes, slack - skipped);
  madvise(begin, bytes, MADV_HUGEPAGE);
  return begin;
}

}  // namespace

void Unmap::operator()(char* memory) const { munmap(memory, bytes); }

WeightBytes map_huge(std::size_t bytes) {
  const std::size_t size = round_up(bytes, kPage);
  return {map(size), Unmap{size}};
}

void WeightMemory::reserve(std::size_t bytes, bool ask_ahead) {
  bytes = round_up(bytes, kHugePage);
  if (bytes == 0 || next_ != nullptr) return;
  next_ = map(bytes);
  if (next_ == nullptr) return;
  end_ = next_ + bytes;
  const std::size_t ahead = bytes / kAheadPart / kHugePage * kHugePage;
  if (ahead == 0 || !ask_ahead) return;
  stop_ = false;
  present_ = 0;
  asking_.begin([this, ahead, begin = next_] {
    for (std::size_t at = 0; at < ahead && !stop_; at += kHugePage) {
      if (madvise(begin + at, kHugePage, kPopulateWrite) != 0) return;
      present_ = at + kHugePage;
    }
  });
}

void WeightMemory::stop_asking() {
  stop_ = true;
  asking_.join();
}

WeightBytes WeightMemory::allocate(std::size_t bytes) {
  stop_asking();
  const std::size_t size = round_up(std::max(bytes, std::size_t{1}), kPage);
  if (size <= reserved_bytes()) {
    char* memory = next_;
    next_ = memory + size;
    return {memory, Unmap{size}};
  }
  return map_huge(size);
}

void WeightMemory::settle() {
  stop_asking();
  if (next_ != end_) munmap(next_, reserved_bytes());
  next_ = end_ = nullptr;
}

}  // namespace tilewright::ops
