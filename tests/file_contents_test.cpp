// Tests of cache/file_contents: hashes of parts of files come back for the same state of the same
// file only, from an unbroken record under the same secret; every kind of write is another state.
#include "cache/file_contents.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <thread>

#include "cache/trusted_file.h"
#include "cache_fixture.h"

namespace tilewright::cache {
namespace {

using std::chrono::seconds;

ContentSecret secret_of(std::byte value) {
  ContentSecret secret;
  secret.fill(value);
  return secret;
}

const ContentSecret kOwn = secret_of(std::byte{7});
const FileState kState{1, 2, 3000, 4, 5};
const FilePart kPart{10, 20};
const ContentHash kHash{std::byte{0xab}, std::byte{1}};

TEST(FileContentsTest, FindsWhatItWasTold) {
  FileContents contents;
  contents.add(kState, kPart, kHash);
  contents.add(kState, {30, 40}, {});
  contents.add({9, 9, 9, -9, 9}, kPart, {});
  const FileContents again = FileContents::parse(contents.text(kOwn), kOwn);
  EXPECT_EQ(again.find(kState, kPart), kHash);
  EXPECT_EQ(again.find(kState, {30, 40}), ContentHash{});
  EXPECT_EQ(again.find({9, 9, 9, -9, 9}, kPart), ContentHash{});
  EXPECT_FALSE(again.find(kState, {10, 21}));
  EXPECT_FALSE(again.find({1, 2, 3000, 4, 6}, kPart));
  EXPECT_FALSE(again.find({1, 2, 3000, 5, 5}, kPart));
  EXPECT_FALSE(again.find({1, 2, 3001, 4, 5}, kPart));
  EXPECT_FALSE(again.find({1, 3, 3000, 4, 5}, kPart));
  EXPECT_FALSE(again.find({2, 2, 3000, 4, 5}, kPart));
  EXPECT_EQ(again.text(kOwn), contents.text(kOwn));
}

TEST(FileContentsTest, ForgetsFormerStatesAndTheOldestFiles) {
  FileContents contents;
  contents.add(kState, kPart, kHash);
  contents.add({1, 2, 3000, 6, 7}, kPart, {});
  EXPECT_FALSE(contents.find(kState, kPart));
  for (std::uint64_t inode = 1000; inode < 1256; ++inode) contents.add({1, inode}, kPart, kHash);
  EXPECT_FALSE(contents.find({1, 2, 3000, 6, 7}, kPart));
  EXPECT_EQ(contents.find({1, 1000}, kPart), kHash);
}

TEST(FileContentsTest, NothingIsFoundInABrokenRecord) {
  FileContents contents;
  contents.add(kState, kPart, kHash);
  const std::string good = contents.text(kOwn);
  ASSERT_TRUE(FileContents::parse(good, kOwn).find(kState, kPart));
  const auto is_empty = [](const std::string& text, const ContentSecret& secret) {
    return FileContents::parse(text, secret).text(kOwn) == FileContents().text(kOwn);
  };
  EXPECT_TRUE(is_empty(good, secret_of(std::byte{8})));
  for (std::size_t i = 0; i < good.size(); ++i) {
    EXPECT_TRUE(is_empty(good.substr(0, i), kOwn));
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      EXPECT_TRUE(is_empty(bad, kOwn)) << i << ' ' << bit;
    }
  }
}

class FileStateTest : public CacheTest {
 protected:
  void SetUp() override {
    CacheTest::SetUp();
    write_file(path(), std::vector<std::byte>(10000));
    file_ = FileDescriptor(::open(path().c_str(), O_RDWR));
    if (!state_of(file_.get())) {
      GTEST_SKIP() << "the temporary directory is on no file system that notes every change";
    }
    state_ = *state_of(file_.get());
    // Times of change are as fine as the kernel's tick.
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  fs::path path() const { return base_ / "checkpoint"; }
  FileState now() const { return *state_of(file_.get()); }

  FileDescriptor file_;
  FileState state_;
};

TEST_F(FileStateTest, StaysWhileOthersRead) {
  EXPECT_EQ(read_file(path()).size(), 10000U);
  EXPECT_EQ(now(), state_);
  EXPECT_EQ(lasting_state(file_.get(), seconds(0)), state_);
}

TEST_F(FileStateTest, AYoungFileHasNoLastingOne) {
  EXPECT_FALSE(lasting_state(file_.get(), seconds(60)));
}

TEST_F(FileStateTest, IsAnotherAfterAWrite) {
  ASSERT_EQ(pwrite(file_.get(), "x", 1, 5000), 1);
  EXPECT_NE(now(), state_);
}

TEST_F(FileStateTest, IsAnotherWhenTheTimeOfTheWriteWasSetBack) {
  struct stat before;
  ASSERT_EQ(fstat(file_.get(), &before), 0);
  ASSERT_EQ(pwrite(file_.get(), "x", 1, 5000), 1);
  const timespec times[2] = {before.st_atim, before.st_mtim};
  ASSERT_EQ(futimens(file_.get(), times), 0);
  EXPECT_EQ(now().modified, state_.modified);
  EXPECT_NE(now(), state_);
}

// Without the way to the disk, the second write to a dirty page would leave no trace.
TEST_F(FileStateTest, IsAnotherAfterAWriteToMemory) {
  void* memory = mmap(nullptr, 10000, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* bytes = static_cast<volatile char*>(memory);
  bytes[100] = 'a';
  const auto lasting = lasting_state(file_.get(), seconds(0));
  ASSERT_TRUE(lasting);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  bytes[100] = 'b';
  EXPECT_NE(now(), *lasting);
  munmap(memory, 10000);
}

TEST_F(FileStateTest, NoneOfWhatIsNoFile) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  EXPECT_FALSE(state_of(ends[0]));
  close(ends[0]);
  close(ends[1]);
  const FileDescriptor folder(::open(base_.c_str(), O_RDONLY | O_DIRECTORY));
  EXPECT_FALSE(state_of(folder.get()));
  const FileDescriptor process(::open("/proc/self/maps", O_RDONLY));
  EXPECT_FALSE(state_of(process.get()));
}

}  // namespace
}  // namespace tilewright::cache
