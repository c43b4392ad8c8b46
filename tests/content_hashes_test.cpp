// Tests of ops/content_hashes: one hash for one content, whoever computes it and when; a thread
// that is not waited for is no harm; a child after fork() hashes for itself.
#include "ops/content_hashes.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <random>
#include <vector>

namespace tilewright::ops {
namespace {

using Block = ContentHashes::Block;

class ContentHashesTest : public testing::Test {
 protected:
  ContentHashesTest() {
    std::mt19937 random(7);
    for (std::byte& byte : memory_) byte = static_cast<std::byte>(random());
    for (std::byte& byte : secret_) byte = static_cast<std::byte>(random());
    std::size_t at = 0;
    for (std::size_t size : {1u << 20, 0u, 1u, 5'000'000u, (1u << 20) + 1, 100u, 12'000'000u}) {
      blocks_.push_back(Block(memory_).subspan(at, size));
      at += size;
    }
    for (Block block : blocks_) expected_.push_back(ContentHashes({block}, secret_).all()[0]);
  }

  std::vector<std::byte> memory_ = std::vector<std::byte>(20u << 20);
  cache::ContentSecret secret_{};
  std::vector<Block> blocks_;
  std::vector<cache::ContentHash> expected_;
};

TEST_F(ContentHashesTest, AreThoseOfEachAlone) {
  EXPECT_EQ(ContentHashes(blocks_, secret_).all(), expected_);
  EXPECT_TRUE(ContentHashes({}, secret_).all().empty());
  EXPECT_NE(expected_[0], expected_[3]);
  memory_[0] ^= std::byte{1};
  EXPECT_NE(ContentHashes(blocks_, secret_).all()[0], expected_[0]);
  memory_[0] ^= std::byte{1};
  secret_[100] ^= std::byte{1};
  EXPECT_NE(ContentHashes(blocks_, secret_).all()[0], expected_[0]);
}

TEST_F(ContentHashesTest, BegunAheadTheyAreTheSame) {
  for (int round = 0; round < 20; ++round) {
    ContentHashes hashes(blocks_, secret_);
    hashes.begin();
    if (round % 2 == 1) usleep(static_cast<useconds_t>(100 * round));
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      if (blocks_[i].empty()) continue;
      EXPECT_EQ(hashes.find(blocks_[i]), expected_[i]);
    }
    EXPECT_FALSE(hashes.find(blocks_[0].subspan(1)));
    EXPECT_FALSE(hashes.find(blocks_[0].first(7)));
  }
}

TEST_F(ContentHashesTest, NobodyNeedsToWait) {
  for (int round = 0; round < 20; ++round) ContentHashes(blocks_, secret_).begin();
}

TEST_F(ContentHashesTest, AChildHashesForItself) {
  // Less than a team shares: GNU's OpenMP, and with it torch, has no team in a child.
  blocks_ = {blocks_[0], blocks_[3]};
  expected_ = {expected_[0], expected_[3]};
  ContentHashes hashes(blocks_, secret_);
  hashes.begin();
  const pid_t child = fork();
  if (child == 0) _exit(hashes.all() == expected_ ? 0 : 1);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(hashes.all(), expected_);
}

}  // namespace
}  // namespace tilewright::ops
