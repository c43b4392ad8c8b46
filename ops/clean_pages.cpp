// See clean_pages.h. Tested by weight_memory_test.
#include "ops/clean_pages.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace tilewright::ops {
namespace {

// Documentation/admin-guide/mm/pagemap.rst: one word for each page of the address space.
constexpr std::uint64_t kPresent = std::uint64_t{1} << 63;
constexpr std::uint64_t kSwapped = std::uint64_t{1} << 62;
constexpr std::uint64_t kOfFile = std::uint64_t{1} << 61;  // not so once a private page is written

constexpr std::uintptr_t kPage = 4096;

bool is_clean(std::uint64_t page) {
  return (page & kSwapped) == 0 && ((page & kPresent) == 0 || (page & kOfFile) != 0);
}

bool all_clean_in(int page_map, std::uintptr_t begin, std::uintptr_t end) {
  constexpr std::uintptr_t piece = 8192;  // pages; 64 KiB of the map
  std::vector<std::uint64_t> pages(piece);
  for (std::uintptr_t at = begin / kPage; at < end / kPage; at += piece) {
    const auto bytes = std::min(piece, end / kPage - at) * sizeof(std::uint64_t);
    const auto offset = static_cast<off_t>(at * sizeof(std::uint64_t));
    if (pread(page_map, pages.data(), bytes, offset) != static_cast<ssize_t>(bytes)) return false;
    const auto last = pages.begin() + static_cast<std::ptrdiff_t>(bytes / sizeof(std::uint64_t));
    if (!std::all_of(pages.begin(), last, is_clean)) return false;
  }
  return true;
}

// From one beginning of a page to another.
bool all_clean(std::uintptr_t begin, std::uintptr_t end) {
  const int page_map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (page_map < 0) return false;
  const bool clean = all_clean_in(page_map, begin, end);
  close(page_map);
  return clean;
}

// The same file, asked for pages that are in the process (PAGEMAP_SCAN, as linux/fs.h has it since
// 6.7): it does not look at the others.
struct PageScan {
  std::uint64_t size = sizeof(PageScan), flags = 0;
  std::uint64_t begin, end, walked = 0;
  std::uint64_t ranges, most_ranges, most_pages;
  std::uint64_t inverted = 0, all_of = 0, any_of, returned;
};
struct PageRange {
  std::uint64_t begin, end, categories;
};
constexpr auto kPageScan = _IOWR('f', 16, PageScan);
constexpr std::uint64_t kScanPresent = 1 << 3, kScanSwapped = 1 << 4;

// The whole pages inside of a piece of memory.
struct Pages {
  explicit Pages(std::span<const std::byte> memory) {
    const auto first = reinterpret_cast<std::uintptr_t>(memory.data());
    begin = (first + kPage - 1) / kPage * kPage;
    end = std::max((first + memory.size()) / kPage * kPage, begin);
  }
  bool drop() const {
    return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0;
  }

  std::uintptr_t begin, end;
};

}  // namespace

bool holds_its_file(std::span<const std::byte> memory) {
  const auto first = reinterpret_cast<std::uintptr_t>(memory.data());
  return all_clean(first / kPage * kPage, (first + memory.size() + kPage - 1) / kPage * kPage);
}

bool has_few_pages(std::span<const std::byte> memory) {
  constexpr std::uint64_t most = (1 << 20) / kPage, categories = kScanPresent | kScanSwapped;
  const int page_map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (page_map < 0) return false;
  const Pages pages(memory);
  std::array<PageRange, 64> ranges;
  PageScan scan{.begin = pages.begin,
                .end = pages.end,
                .ranges = reinterpret_cast<std::uintptr_t>(ranges.data()),
                .most_ranges = ranges.size(),
                .most_pages = most + 1,
                .any_of = categories,
                .returned = categories};
  const int found = ioctl(page_map, kPageScan, &scan);
  close(page_map);
  if (found < 0 || static_cast<std::size_t>(found) == ranges.size()) return false;
  std::uint64_t bytes = 0;
  for (int i = 0; i < found; ++i) {
    const PageRange& range = ranges[static_cast<std::size_t>(i)];
    bytes += range.end - range.begin;
  }
  return bytes <= most * kPage;
}

bool drop_clean_pages(std::span<const std::byte> memory) {
  const Pages pages(memory);
  return pages.begin != pages.end && all_clean(pages.begin, pages.end) && pages.drop();
}

void PageDropper::drop(std::vector<UnneededMemory> unneeded) {
  wait();
  unneeded_ = std::move(unneeded);
  std::erase_if(unneeded_, [](const UnneededMemory& memory) {
    if (memory.is_free || !has_few_pages(memory.bytes)) return false;
    drop_clean_pages(memory.bytes);
    return true;
  });
  next_ = 0;
  if (unneeded_.empty()) return;
  thread_.begin([this] { work(); });  // without a thread wait() does everything
}

void PageDropper::wait() {
  work();
  thread_.join();
}

void PageDropper::work() {
  for (std::size_t i = next_++; i < unneeded_.size(); i = next_++) {
    if (unneeded_[i].is_free) {
      Pages(unneeded_[i].bytes).drop();
    } else {
      drop_clean_pages(unneeded_[i].bytes);
    }
  }
}

}  // namespace tilewright::ops
