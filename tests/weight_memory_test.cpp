// Tests of ops/weight_memory: pieces are zeroed, writable and apart, from a reservation and beyond
// it; what is left of a reservation goes back; pieces outlive it.
// And of ops/clean_pages: what was read from a file goes, what was written stays.
#include "ops/weight_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <span>
#include <vector>

#include "ops/clean_pages.h"

namespace tilewright::ops {
namespace {

constexpr std::size_t kMegabyte = 1u << 20;

bool is_mapped(const void* memory) {
  unsigned char resident = 0;
  return mincore(const_cast<void*>(memory), 1, &resident) == 0;
}

void expect_zeroed_and_fill(char* memory, std::size_t bytes, char value) {
  EXPECT_TRUE(std::all_of(memory, memory + bytes, [](char c) { return c == 0; }));
  std::fill_n(memory, bytes, value);
}

TEST(WeightMemory, PiecesAreZeroedAndApart) {
  for (std::size_t reserved : {std::size_t{0}, 3 * kMegabyte, 64 * kMegabyte}) {
    WeightMemory memory;
    memory.reserve(reserved, true);
    std::vector<WeightBytes> pieces;
    const std::size_t sizes[] = {1, 4096, 100'000, 5 * kMegabyte, 2 * kMegabyte + 1, 0};
    for (std::size_t i = 0; i < std::size(sizes); ++i) {
      pieces.push_back(memory.allocate(sizes[i]));
      ASSERT_TRUE(pieces.back());
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pieces.back().get()) % 4096, 0u);
      expect_zeroed_and_fill(pieces.back().get(), sizes[i], static_cast<char>(i + 1));
    }
    memory.settle();
    for (std::size_t i = 0; i < std::size(sizes); ++i) {
      const char* piece = pieces[i].get();
      EXPECT_TRUE(std::all_of(piece, piece + sizes[i],
                              [&](char c) { return c == static_cast<char>(i + 1); }));
    }
  }
}

bool is_present(const char* memory) {
  unsigned char resident = 0;
  return mincore(const_cast<char*>(memory), 1, &resident) == 0 && (resident & 1) != 0;
}

// MADV_POPULATE_WRITE of Linux 5.14, tried on a page of its own: what is tested must not decide.
bool kernel_populates() {
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool populates = madvise(page, 4096, 23) == 0;
  munmap(page, 4096);
  return populates;
}

TEST(WeightMemory, ATwelfthIsAskedForAhead) {
  if (!kernel_populates()) GTEST_SKIP() << "this kernel has no MADV_POPULATE_WRITE";
  WeightMemory memory;
  memory.reserve(96 * kMegabyte, true);
  for (int i = 0; i < 5000 && memory.present_bytes() < 8 * kMegabyte; ++i) usleep(1000);
  EXPECT_EQ(memory.present_bytes(), 8 * kMegabyte);
  const WeightBytes piece = memory.allocate(16 * kMegabyte);
  for (std::size_t at = 0; at < 16; ++at) {
    EXPECT_EQ(is_present(piece.get() + at * kMegabyte), at < 8) << at << " MB";
  }
}

TEST(WeightMemory, NothingIsAskedForAheadUnlessSaid) {
  WeightMemory memory;
  memory.reserve(96 * kMegabyte, false);
  usleep(1000);
  EXPECT_EQ(memory.present_bytes(), 0u);
  EXPECT_EQ(memory.reserved_bytes(), 96 * kMegabyte);
  const WeightBytes piece = memory.allocate(16 * kMegabyte);
  EXPECT_FALSE(is_present(piece.get()));
  EXPECT_EQ(memory.reserved_bytes(), 80 * kMegabyte);
}

// Neither who packs at once nor who ends early waits for it, or loses what was written.
TEST(WeightMemory, AskingAheadStopsAtOnce) {
  for (int i = 0; i < 20; ++i) {
    WeightMemory memory;
    memory.reserve(1024 * kMegabyte, true);
    if (i % 2 == 0) continue;
    const WeightBytes piece = memory.allocate(kMegabyte);
    const std::size_t present = memory.present_bytes();
    usleep(1000);
    EXPECT_EQ(memory.present_bytes(), present);
    expect_zeroed_and_fill(piece.get(), kMegabyte, 'x');
  }
}

TEST(WeightMemory, WhatIsLeftGoesBack) {
  WeightMemory memory;
  memory.reserve(32 * kMegabyte, true);
  EXPECT_EQ(memory.reserved_bytes(), 32 * kMegabyte);
  WeightBytes kept = memory.allocate(4 * kMegabyte);
  const char* rest = kept.get() + 4 * kMegabyte;
  EXPECT_TRUE(is_mapped(rest));
  memory.settle();
  EXPECT_EQ(memory.reserved_bytes(), 0u);
  EXPECT_FALSE(is_mapped(rest));
  const char* piece = kept.get();
  EXPECT_TRUE(is_mapped(piece));
  kept.reset();
  EXPECT_FALSE(is_mapped(piece));
}

TEST(WeightMemory, MoreThanThereIsIsRefused) {
  WeightMemory memory;
  memory.reserve(std::size_t{1} << 60, true);
  EXPECT_FALSE(memory.allocate(std::size_t{1} << 60));
  EXPECT_TRUE(memory.allocate(100));
}

std::size_t resident_pages(const char* memory, std::size_t pages) {
  // Of this process, where mincore would tell of the file's pages in the system's cache.
  // Without a buffer: it refuses reads of anything but multiples of 8 bytes.
  std::ifstream page_map;
  page_map.rdbuf()->pubsetbuf(nullptr, 0);
  page_map.open("/proc/self/pagemap", std::ios::binary);
  std::size_t count = 0;
  for (std::size_t i = 0; i < pages; ++i) {
    std::uint64_t page = 0;
    page_map.seekg(
        static_cast<std::streamoff>((reinterpret_cast<std::uintptr_t>(memory) / 4096 + i) * 8));
    page_map.read(reinterpret_cast<char*>(&page), sizeof page);
    count += page >> 63;
  }
  return count;
}

// A file without a name, and a private mapping of all of it.
class MappedFile {
 public:
  explicit MappedFile(const std::vector<char>& content)
      : file_(std::tmpfile(), &std::fclose), bytes_(content.size()) {
    if (file_ == nullptr || std::fwrite(content.data(), 1, bytes_, file_.get()) != bytes_ ||
        std::fflush(file_.get()) != 0) {
      return;
    }
    void* mapping =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE, fileno(file_.get()), 0);
    if (mapping != MAP_FAILED) memory_ = static_cast<char*>(mapping);
  }
  ~MappedFile() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  char* memory() const { return memory_; }  // null: it could not be made

 private:
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  std::size_t bytes_;
  char* memory_ = nullptr;
};

TEST(CleanPages, GoUnlessSomethingWasWritten) {
  constexpr std::size_t pages = 40, bytes = pages * 4096;
  const MappedFile file(std::vector<char>(bytes, 'a'));
  char* memory = file.memory();
  ASSERT_NE(memory, nullptr);
  const auto drop = [&](std::size_t begin, std::size_t size) {
    return drop_clean_pages(std::as_bytes(std::span(memory + begin, size)));
  };
  const auto touch = [&] { return std::count(memory, memory + bytes, 'a'); };

  ASSERT_EQ(touch(), bytes);
  ASSERT_EQ(resident_pages(memory, pages), pages);
  EXPECT_TRUE(drop(10, bytes - 10));  // the first page is not all of it
  EXPECT_EQ(resident_pages(memory, pages), 1u);
  EXPECT_EQ(touch(), bytes);
  EXPECT_FALSE(drop(10, 4000));

  memory[20 * 4096] = 'b';
  EXPECT_FALSE(drop(0, bytes));
  EXPECT_EQ(memory[20 * 4096], 'b');
  EXPECT_TRUE(drop(0, 20 * 4096));
  EXPECT_EQ(touch(), bytes - 1);
}

TEST(CleanPages, AreCounted) {
  constexpr std::size_t pages = 1024, bytes = pages * 4096;
  const MappedFile file((std::vector<char>(bytes)));
  char* memory = file.memory();
  ASSERT_NE(memory, nullptr);
  const auto few = [&](std::size_t begin, std::size_t size) {
    return has_few_pages(std::as_bytes(std::span(memory + begin, size)));
  };
  if (!few(0, bytes)) GTEST_SKIP() << "this kernel has no PAGEMAP_SCAN";
  std::fill(memory, memory + 256 * 4096, 'a');
  EXPECT_TRUE(few(0, bytes)) << "a megabyte";
  memory[700 * 4096] = 'a';
  EXPECT_FALSE(few(0, bytes)) << "a page more";
  EXPECT_TRUE(few(0, 700 * 4096 + 4000)) << "whole pages count";
  for (std::size_t page = 300; page < 430; page += 2) memory[page * 4096] = 'a';
  EXPECT_FALSE(few(300 * 4096, 130 * 4096)) << "too scattered to tell";
}

// With the pages of a file that few were read of, which are dropped at once.
TEST(CleanPages, FewAreDroppedAtOnce) {
  constexpr std::size_t pages = 64, bytes = pages * 4096;
  const MappedFile file((std::vector<char>(bytes)));
  char* memory = file.memory();
  ASSERT_NE(memory, nullptr);
  EXPECT_EQ(std::count(memory, memory + bytes, 'a'), 0);
  ASSERT_EQ(resident_pages(memory, pages), pages);
  const bool few = has_few_pages(std::as_bytes(std::span(memory, bytes)));
  std::vector<char> freed(bytes, 'a');
  PageDropper dropper;
  dropper.drop(
      {{std::as_bytes(std::span(memory, bytes)), false}, {std::as_bytes(std::span(freed)), true}});
  if (few) {
    EXPECT_EQ(resident_pages(memory, pages), 0u) << "by the caller, which waits for nobody";
  }
  dropper.wait();
  EXPECT_EQ(resident_pages(memory, pages), 0u);
  EXPECT_LT(std::count(freed.begin(), freed.end(), 'a'), 2 * 4096);
}

TEST(CleanPages, FreedMemoryGoesWholePagesOnly) {
  constexpr std::size_t pages = 64;
  std::vector<std::vector<char>> memory(9, std::vector<char>(pages * 4096, 'a'));
  std::vector<UnneededMemory> unneeded;
  for (std::size_t i = 0; i < memory.size(); ++i) {
    unneeded.push_back({std::as_bytes(std::span(memory[i]).subspan(10)), i % 2 == 0});
  }
  {
    PageDropper dropper;
    dropper.drop({unneeded.begin(), unneeded.begin() + 4});
    dropper.drop({unneeded.begin() + 4, unneeded.begin() + 6});
    dropper.wait();
    dropper.wait();
    dropper.drop({unneeded.begin() + 6, unneeded.end()});
    dropper.drop({});
  }
  for (std::size_t i = 0; i < memory.size(); ++i) {
    const auto left = static_cast<std::size_t>(std::count(memory[i].begin(), memory[i].end(), 'a'));
    // What shares a page with others stays.
    EXPECT_EQ(left, i % 2 == 0 ? memory[i].size() - (pages - 1) * 4096 : memory[i].size()) << i;
  }
}

TEST(CleanPages, AnonymousMemoryStays) {
  std::vector<char> memory(1 << 20, 'a');
  EXPECT_FALSE(drop_clean_pages(std::as_bytes(std::span(memory))));
  EXPECT_EQ(std::count(memory.begin(), memory.end(), 'a'), 1 << 20);
}

}  // namespace
}  // namespace tilewright::ops
