// Tests of ops/weight_memory: pieces are zeroed, writable and apart, from a reservation and beyond
// it; what is left of a reservation goes back; pieces outlive it.
#include "ops/weight_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

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
    memory.reserve(reserved);
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

TEST(WeightMemory, FetchesOnlySoFarAhead) {
  WeightMemory memory;
  const std::size_t bytes = 400 * kMegabyte, lead = WeightMemory::lead(bytes);
  ASSERT_LT(lead + 64 * kMegabyte, bytes);
  memory.reserve(bytes);
  WeightBytes first = memory.allocate(4 * kMegabyte);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const char* far = first.get() + 4 * kMegabyte + lead + 32 * kMegabyte;
  unsigned char resident = 0;
  ASSERT_EQ(mincore(const_cast<char*>(far), 1, &resident), 0);
  EXPECT_EQ(resident & 1, 0);
}

TEST(WeightMemory, WhatIsLeftGoesBack) {
  WeightMemory memory;
  memory.reserve(32 * kMegabyte);
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
  memory.reserve(std::size_t{1} << 60);
  EXPECT_FALSE(memory.allocate(std::size_t{1} << 60));
  EXPECT_TRUE(memory.allocate(100));
}

}  // namespace
}  // namespace tilewright::ops
