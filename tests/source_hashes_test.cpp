// Tests of ops/source_hashes and ops/mapped_files: a second process reads nothing of a file that
// the first one hashed, and everything that anybody wrote: to the file, or to its own memory.
#include "ops/source_hashes.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <random>
#include <thread>
#include <vector>

#include "cache_fixture.h"
#include "ops/clean_pages.h"

namespace tilewright::ops {
namespace {

using Block = SourceHashes::Block;
using cache::Mode;
constexpr SourceHashes::Options kAtOnce{.read_all = false, .age = std::chrono::seconds(0)};

class SourceHashesTest : public cache::CacheTest {
 protected:
  static constexpr std::size_t kBytes = 3'000'000;

  void SetUp() override {
    CacheTest::SetUp();
    cache::fs::create_directory(directory());
    cache::fs::permissions(directory(), cache::fs::perms::owner_all);
    std::mt19937 random(7);
    values_.resize(kBytes);
    for (std::byte& byte : values_) byte = static_cast<std::byte>(random());
    cache::write_file(path(), values_);
    directory_.emplace(cache::WeightDirectory::open(directory(), Mode::read_write, 0));
    ASSERT_TRUE(directory_->secret(true));
    map();
    const cache::FileDescriptor file(::open(path().c_str(), O_RDONLY));
    if (!cache::state_of(file.get())) {
      GTEST_SKIP() << "the temporary directory is on no file system that notes every change";
    }
    tick();
  }
  void TearDown() override { munmap(memory_, kBytes); }

  // As a process that loads the checkpoint.
  void map() {
    if (memory_ != nullptr) munmap(memory_, kBytes);
    const cache::FileDescriptor file(::open(path().c_str(), O_RDONLY));
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.get(), 0);
    ASSERT_NE(memory, MAP_FAILED);
    memory_ = static_cast<std::byte*>(memory);
  }
  // Times of change are as fine as the kernel's tick.
  static void tick() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

  cache::fs::path path() const { return base_ / "a checkpoint"; }
  std::vector<Block> blocks() const {
    const Block all(memory_, kBytes);
    return {all.subspan(8, 1'000'000), all.subspan(1'000'008, 1'999'992), Block(values_)};
  }
  // How many blocks were known; all hashes are right, and what can be is learned.
  std::size_t look(SourceHashes::Options options = kAtOnce) {
    SourceHashes hashes(blocks(), *directory_, options);
    for (Block block : blocks()) {
      EXPECT_EQ(hashes.find(block), ContentHashes({block}, *directory_->secret(false)).all()[0]);
    }
    EXPECT_FALSE(hashes.find(blocks()[0].subspan(1)));
    hashes.learn();
    return hashes.known();
  }

  std::vector<std::byte> values_;
  std::optional<cache::WeightDirectory> directory_;
  std::byte* memory_ = nullptr;
};

TEST_F(SourceHashesTest, AFileIsReadOnce) {
  EXPECT_EQ(look(), 0U);
  EXPECT_EQ(look(), 2U);  // the third block is memory of nobody's file
  map();
  EXPECT_EQ(look(), 2U);
  EXPECT_EQ(look({.read_all = true}), 0U);
}

TEST_F(SourceHashesTest, WhoWaitsLearnsToo) {
  SourceHashes(blocks(), *directory_, kAtOnce).wait();
  EXPECT_EQ(look(), 2U);
}

TEST_F(SourceHashesTest, NothingIsLearnedOfHalfTheWork) {
  SourceHashes(blocks(), *directory_, kAtOnce).learn();
  EXPECT_EQ(look(), 0U);
}

TEST_F(SourceHashesTest, AYoungFileIsNotLearned) {
  EXPECT_EQ(look({}), 0U);
  EXPECT_EQ(look({}), 0U);
}

TEST_F(SourceHashesTest, AReadOnlyCacheLearnsNothingAndKnowsWhatOthersLearned) {
  const auto read_only = [&] {
    return cache::WeightDirectory::open(directory(), Mode::read_only, 0);
  };
  directory_.emplace(read_only());
  EXPECT_EQ(look(), 0U);
  EXPECT_EQ(look(), 0U);
  directory_.emplace(cache::WeightDirectory::open(directory(), Mode::read_write, 0));
  look();
  directory_.emplace(read_only());
  EXPECT_EQ(look(), 2U);
}

TEST_F(SourceHashesTest, WhatWasWrittenToMemoryIsRead) {
  look();
  memory_[2'500'000] ^= std::byte{1};
  EXPECT_FALSE(holds_its_file(blocks()[1]));
  EXPECT_TRUE(holds_its_file(blocks()[0]));
  EXPECT_EQ(look(), 1U);
  EXPECT_EQ(look(), 1U);  // and nothing was learned of it
  map();
  EXPECT_EQ(look(), 2U);
}

TEST_F(SourceHashesTest, WhatWasWrittenToMemoryIsNotLearned) {
  memory_[0] ^= std::byte{1};  // a page that the first block only touches
  look();
  map();
  EXPECT_EQ(look(), 1U);
}

TEST_F(SourceHashesTest, AFileThatWasWrittenIsRead) {
  look();
  const cache::FileDescriptor file(::open(path().c_str(), O_WRONLY));
  ASSERT_EQ(pwrite(file.get(), "x", 1, 77), 1);
  EXPECT_EQ(look(), 0U);
  EXPECT_EQ(look(), 2U);
}

TEST_F(SourceHashesTest, AFileInAnothersPlaceIsRead) {
  look();
  const cache::fs::path other = base_ / "other";
  std::vector<std::byte> changed = values_;
  changed[2'000'000] ^= std::byte{1};
  cache::write_file(other, changed);
  cache::fs::rename(other, path());
  EXPECT_EQ(look(), 0U);  // what is mapped is no longer the file of this name
  map();
  EXPECT_EQ(look(), 0U);
}

TEST_F(SourceHashesTest, ARecordThatIsBrokenOrGoneIsNoHarm) {
  look();
  const cache::fs::path record = directory() + "/weights.sources";
  std::vector<std::byte> bytes = cache::read_file(record);
  bytes[bytes.size() / 2] ^= std::byte{1};
  cache::write_file(record, bytes);
  EXPECT_EQ(look(), 0U);
  EXPECT_EQ(look(), 2U);
  cache::fs::remove(record);
  EXPECT_EQ(look(), 0U);
  EXPECT_EQ(look(), 2U);
}

TEST_F(SourceHashesTest, ARecordOfAnotherSecretIsNone) {
  look();
  cache::fs::remove(directory() + "/weights.secret");
  directory_.emplace(cache::WeightDirectory::open(directory(), Mode::read_write, 0));
  ASSERT_TRUE(directory_->secret(true));
  EXPECT_EQ(look(), 0U);
}

TEST_F(SourceHashesTest, OnlyMappingsOfFilesHaveAPlace) {
  MappedFiles files = MappedFiles::read();
  const auto place = files.find(blocks()[1]);
  ASSERT_TRUE(place);
  EXPECT_EQ(place->part, (cache::FilePart{1'000'008, 1'999'992}));
  EXPECT_FALSE(files.find(values_));
  EXPECT_FALSE(files.find(Block(memory_ + kBytes - 10, 5000)));  // beyond the last page
  void* anonymous = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT_FALSE(MappedFiles::read().find(Block(static_cast<std::byte*>(anonymous), 4096)));
  munmap(anonymous, 4096);
  cache::fs::remove(path());
  EXPECT_FALSE(MappedFiles::read().find(blocks()[1]));
}

}  // namespace
}  // namespace tilewright::ops
