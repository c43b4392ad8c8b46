// Tests of cache/weight_directory, weight_header and content_hash: what is saved is mapped, and
// shared; whatever is wrong with a file or the directory is a counted miss.
#include "cache/weight_directory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "cache_fixture.h"

namespace tilewright::cache {
namespace {

constexpr const char* kKey = "weight of a test";

std::vector<std::byte> make_data(std::size_t size = 3 * kWeightPage + 100) {
  std::vector<std::byte> data(size);
  std::mt19937 random(7);
  for (std::byte& byte : data) byte = static_cast<std::byte>(random());
  return data;
}

class WeightDirectoryTest : public CacheTest {
 protected:
  void SetUp() override {
    CacheTest::SetUp();
    fs::create_directory(directory());
    fs::permissions(directory(), fs::perms::owner_all);
  }
  WeightDirectory weights(Mode mode = Mode::read_write, std::uint64_t max_bytes = 0) const {
    return WeightDirectory::open(directory(), mode, max_bytes);
  }
  fs::path weight_path(const std::string& key = kKey) const {
    return fs::path(directory()) / "weights" / (key_name(generator_hash(), key) + ".weight");
  }
  void save(const std::string& key = kKey, Mode mode = Mode::read_write) const {
    weights(mode).save(key, "bf16", data_);
  }
  // The file with other bytes; its mode says that nobody should.
  void rewrite(std::span<const std::byte> bytes) const {
    fs::permissions(weight_path(), fs::perms::owner_read | fs::perms::owner_write);
    write_file(weight_path(), bytes);
  }
  void expect_miss(const std::map<std::string, std::uint64_t>& rejects, bool checked = false,
                   Mode mode = Mode::read_only) const {
    WeightDirectory directory = weights(mode);
    EXPECT_FALSE(directory.map(kKey, checked, {}).has_value());
    EXPECT_EQ(directory.counters().misses, 1u);
    EXPECT_EQ(directory.counters().rejects, rejects);
  }
  bool is_there() const {
    const auto found = weights().map(kKey, true, {});
    return found && std::ranges::equal(std::span(found->data.get(), found->bytes), data_) &&
           found->form == "bf16";
  }

  std::vector<std::byte> data_ = make_data();
};

// A line of the mapping that holds this address, in kB.
std::size_t smaps_value(const void* address, const std::string& field) {
  std::ifstream file("/proc/self/smaps");
  std::string line;
  bool inside = false;
  while (std::getline(file, line)) {
    std::uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      const auto at = reinterpret_cast<std::uintptr_t>(address);
      inside = begin <= at && at < end;
    } else if (inside && line.starts_with(field + ":")) {
      return std::stoul(line.substr(field.size() + 1));
    }
  }
  return 0;
}

// Runs in a child process; true if it returned true.
bool in_child(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body() ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_F(WeightDirectoryTest, WhatIsSavedIsMapped) {
  expect_miss({});
  save();
  EXPECT_TRUE(is_there());
  EXPECT_EQ(weights().counters().hits, 0u);
  EXPECT_EQ(fs::status(weight_path()).permissions(), fs::perms::owner_read);
  EXPECT_FALSE(weights().map("another key", false, {}).has_value());
}

TEST_F(WeightDirectoryTest, AMappingOutlivesItsFile) {
  save();
  const auto found = weights().map(kKey, false, {});
  ASSERT_TRUE(found);
  fs::remove(weight_path());
  EXPECT_TRUE(std::ranges::equal(std::span(found->data.get(), found->bytes), data_));
}

TEST_F(WeightDirectoryTest, AMappingCannotBeMadeWritable) {
  save();
  const auto found = weights().map(kKey, false, {});
  ASSERT_TRUE(found);
  auto* page = const_cast<std::byte*>(found->data.get());
  EXPECT_NE(mprotect(page, kWeightPage, PROT_READ | PROT_WRITE), 0);
}

TEST_F(WeightDirectoryTest, ProcessesShareThePages) {
  save();
  const auto ours = weights().map(kKey, false, {});
  ASSERT_TRUE(ours && fetch({ours->data.get(), ours->bytes}));
  EXPECT_EQ(smaps_value(ours->data.get(), "Shared_Clean"), 0u);
  EXPECT_TRUE(in_child([&] {
    // A mapping of its own, beside the inherited one.
    const auto theirs = weights().map(kKey, false, {});
    if (!theirs || !fetch({theirs->data.get(), theirs->bytes})) return false;
    return smaps_value(theirs->data.get(), "Shared_Clean") * 1024 >= data_.size() &&
           smaps_value(theirs->data.get(), "Private_Clean") * 1024 <= kWeightPage &&
           smaps_value(theirs->data.get(), "Private_Dirty") == 0;
  }));
}

TEST_F(WeightDirectoryTest, EveryFlippedBitOfAHeaderIsAMiss) {
  save();
  const std::vector<std::byte> bytes = read_file(weight_path());
  const Result<std::size_t> length = header_bytes(bytes);
  ASSERT_TRUE(length.ok());
  const std::span header = std::span(bytes).first(*length);
  ASSERT_TRUE(decode(header, bytes.size()).ok());
  for (std::size_t bit = 0; bit < 8 * header.size(); ++bit) {
    std::vector<std::byte> flipped(header.begin(), header.end());
    flipped[bit / 8] ^= std::byte{1} << bit % 8;
    ASSERT_FALSE(decode(flipped, bytes.size()).ok()) << "bit " << bit;
  }
}

TEST_F(WeightDirectoryTest, TruncatedAndExtendedFilesAreMisses) {
  save();
  const std::vector<std::byte> bytes = read_file(weight_path());
  for (std::size_t size : {std::size_t{0}, std::size_t{100}, kWeightPage - 1}) {
    rewrite(std::span(bytes).first(size));
    expect_miss({{"too short", 1}});
  }
  for (std::size_t size : {kWeightPage, bytes.size() - 1}) {
    rewrite(std::span(bytes).first(size));
    expect_miss({{"wrong length", 1}});
  }
  std::vector<std::byte> longer = bytes;
  longer.push_back({});
  rewrite(longer);
  expect_miss({{"wrong length", 1}});
}

TEST_F(WeightDirectoryTest, ACorruptFileMakesWayForAGoodOne) {
  save();
  std::vector<std::byte> bytes = read_file(weight_path());
  bytes[100] ^= std::byte{1};
  rewrite(bytes);
  expect_miss({{"wrong digest", 1}}, false, Mode::read_write);
  EXPECT_FALSE(fs::exists(weight_path()));
  save();
  EXPECT_TRUE(is_there());
}

TEST_F(WeightDirectoryTest, AlteredDataIsFoundWhereItIsChecked) {
  save();
  std::vector<std::byte> bytes = read_file(weight_path());
  bytes.back() ^= std::byte{1};
  rewrite(bytes);
  EXPECT_EQ(weights().list(false).at(0).problem, "");
  EXPECT_EQ(weights().list(true).at(0).problem, "wrong content");
  expect_miss({{"wrong content", 1}}, true);
}

TEST_F(WeightDirectoryTest, WhatTheCallerCannotUseIsAMiss) {
  save();
  WeightDirectory directory = weights();
  EXPECT_FALSE(directory.map(kKey, false, [](const MappedWeight&) { return false; }).has_value());
  EXPECT_EQ(directory.counters().rejects.at("not usable"), 1u);
}

TEST_F(WeightDirectoryTest, FilesThatOthersCouldHaveMadeAreMisses) {
  save();
  const std::vector<std::byte> bytes = read_file(weight_path());
  ASSERT_EQ(chmod(weight_path().c_str(), 0420), 0);
  expect_miss({{"writable by others", 1}});
  fs::remove(weight_path());
  const fs::path elsewhere = base_ / "elsewhere";
  write_file(elsewhere, bytes);
  fs::create_symlink(elsewhere, weight_path());
  expect_miss({{"symbolic link", 1}});
  fs::remove(weight_path());
  ASSERT_EQ(mkfifo(weight_path().c_str(), 0600), 0);
  expect_miss({{"not a regular file", 1}});
  fs::remove(weight_path());
  ASSERT_EQ(chmod((fs::path(directory()) / "weights").c_str(), 0770), 0);
  expect_miss({{"directory writable by others", 1}});
  const std::vector<WeightListing> listings = weights().list(false);
  ASSERT_EQ(listings.size(), 1u);
  EXPECT_EQ(listings[0].file + ": " + listings[0].problem, "weights: directory writable by others");
}

TEST_F(WeightDirectoryTest, AFileOfAnotherOwnerIsAMiss) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  save();
  ASSERT_EQ(chown(weight_path().c_str(), 12345, 12345), 0);
  expect_miss({{"belongs to another user", 1}});
}

TEST_F(WeightDirectoryTest, ARenamedFileAndAnotherBuildsAreMisses) {
  save("another key");
  fs::rename(weight_path("another key"), weight_path());
  expect_miss({{"other key", 1}});
  EXPECT_EQ(weights().list(false).at(0).problem, "other key");
  fs::remove(weight_path());
  WeightDirectory::open(directory(), Mode::read_write, 0, "other build").save(kKey, "bf16", data_);
  expect_miss({});
  EXPECT_FALSE(weights().list(true).at(0).current);
}

TEST_F(WeightDirectoryTest, ModesOfTheCache) {
  save(kKey, Mode::read_only);
  save(kKey, Mode::off);
  EXPECT_FALSE(fs::exists(weight_path()));
  EXPECT_FALSE(weights(Mode::read_only).secret(true).has_value());
  save();
  EXPECT_TRUE(weights(Mode::read_only).map(kKey, false, {}).has_value());
  EXPECT_FALSE(weights(Mode::off).map(kKey, false, {}).has_value());
}

TEST_F(WeightDirectoryTest, AReadOnlyDirectoryIsAFailedWrite) {
  if (geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  ASSERT_EQ(chmod(directory().c_str(), 0500), 0);
  WeightDirectory directory = weights();
  directory.save(kKey, "bf16", data_);
  EXPECT_EQ(directory.counters().write_failures, 1u);
  EXPECT_EQ(directory.counters().write_problem, "directory mkdir: EACCES");
}

TEST_F(WeightDirectoryTest, AFullDiskIsAFailedWrite) {
  EXPECT_TRUE(in_child([&] {
    const rlimit limit = {2 * kWeightPage, 2 * kWeightPage};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return false;
    WeightDirectory directory = weights();
    directory.save(kKey, "bf16", data_);
    return directory.counters().write_failures == 1 &&
           directory.counters().write_problem == "fallocate: EFBIG";
  }));
  EXPECT_FALSE(fs::exists(weight_path()));
}

TEST_F(WeightDirectoryTest, OnlyUnusedWeightsMakeRoom) {
  const std::uint64_t one = 5 * kWeightPage;  // a file of data_
  const auto make_old = [&](const std::string& key, int days) {
    const timespec then = {time(nullptr) - days * 24 * 3600, 0};
    const timespec times[2] = {then, then};
    ASSERT_EQ(utimensat(AT_FDCWD, weight_path(key).c_str(), times, 0), 0);
  };
  write_file(fs::path(directory()) / "kernel", std::vector<std::byte>(kWeightPage));
  for (const char* key : {"a", "b", "c"}) save(key);
  WeightDirectory small = weights(Mode::read_write, 3 * one + kWeightPage);
  small.save("d", "bf16", data_);
  EXPECT_EQ(small.counters().write_failures, 1u);
  EXPECT_EQ(small.counters().write_problem,
            "the cache would be larger than TILEWRIGHT_CACHE_MAX_SIZE");
  make_old("a", 2);
  make_old("b", 3);
  // Used now, so the oldest no longer.
  EXPECT_TRUE(small.map("b", false, {}).has_value());
  small.save("d", "bf16", data_);
  EXPECT_EQ(small.counters().writes, 1u);
  EXPECT_FALSE(fs::exists(weight_path("a")));
  for (const char* key : {"b", "c", "d"}) EXPECT_TRUE(fs::exists(weight_path(key))) << key;
}

TEST_F(WeightDirectoryTest, AnUnusableDirectoryMisses) {
  ASSERT_EQ(chmod(directory().c_str(), 0777), 0);
  save();
  EXPECT_FALSE(weights().map(kKey, false, {}).has_value());
  EXPECT_FALSE(weights().secret(true).has_value());
  EXPECT_FALSE(WeightDirectory::open("", Mode::read_write, 0).map(kKey, false, {}).has_value());
}

TEST_F(WeightDirectoryTest, ADirectoryHasOneSecret) {
  EXPECT_FALSE(weights().secret(false).has_value());
  const auto secret = weights().secret(true);
  ASSERT_TRUE(secret.has_value());
  EXPECT_EQ(weights().secret(true), secret);
  EXPECT_EQ(weights(Mode::read_only).secret(false), secret);
  EXPECT_EQ(fs::status(fs::path(directory()) / "weights.secret").permissions(),
            fs::perms::owner_read);
  EXPECT_NE(*secret, ContentSecret{});
}

TEST(ContentHash, DependsOnEveryByteAndOnTheSecret) {
  std::vector<std::byte> data = make_data(1000);
  ContentSecret secret{}, other{};
  std::mt19937 random(8);
  for (std::byte& byte : secret) byte = static_cast<std::byte>(random());
  for (std::byte& byte : other) byte = static_cast<std::byte>(random());
  const ContentHash hash = content_hash(data, secret);
  EXPECT_EQ(content_hash(data, secret), hash);
  EXPECT_NE(content_hash(data, other), hash);
  EXPECT_NE(content_hash(data), hash);
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] ^= std::byte{1};
    EXPECT_NE(content_hash(data, secret), hash) << i;
    data[i] ^= std::byte{1};
  }
  // XXH3-128 of no bytes, from the sanity tests of xxHash: 99aa06d3014798d8 6001c324468d497f.
  const ContentHash empty = content_hash({});
  EXPECT_EQ(std::to_integer<int>(empty[0]), 0x99);
  EXPECT_EQ(std::to_integer<int>(empty[15]), 0x7f);
}

}  // namespace
}  // namespace tilewright::cache
