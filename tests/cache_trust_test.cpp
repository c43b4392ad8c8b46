// Tests of what the cache must survive: files that others could have written, links, foreign
// privileges, a full disk, killed writers, and processes that share a directory.
//
// Tested by breaking the rules: each test fails if its check is removed from cache/.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "tests/cache_fixture.h"

namespace tilewright::cache {
namespace {

constexpr uid_t kOtherUser = 1001;

// Runs body in a child process, as another user if asked; returns its exit code, or -1 if it died.
template <class Body>
int in_child(Body body, bool as_other_user = false) {
  const pid_t child = fork();
  if (child == 0) {
    if (as_other_user && (setgid(kOtherUser) != 0 || setuid(kOtherUser) != 0)) _exit(99);
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

using CacheTrustTest = CacheTest;

TEST_F(CacheTrustTest, NothingIsReadableOrWritableByOthers) {
  open().save(make_entry("linear 1x32"));
  int files = 0;
  for (const auto& item : fs::recursive_directory_iterator(base_)) {
    struct stat status;
    ASSERT_EQ(lstat(item.path().c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777, item.is_directory() ? 0700u : 0600u) << item.path();
    files += item.is_regular_file();
  }
  EXPECT_EQ(files, 1);  // no temporary file is left
}

TEST_F(CacheTrustTest, LinksAndSpecialFilesAreRejected) {
  open().save(make_entry("linear 1x32"));
  const fs::path path = path_of("linear 1x32");
  fs::rename(path, base_ / "elsewhere");
  fs::create_symlink(base_ / "elsewhere", path);
  expect_reject("linear 1x32", "symbolic link");
  fs::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  expect_reject("linear 1x32", "not a regular file");
  fs::remove(path);
  fs::create_directory(path);
  expect_reject("linear 1x32", "not a regular file");
}

TEST_F(CacheTrustTest, LinkedDirectoriesAreRejected) {
  open().save(make_entry("linear 1x32"));
  const fs::path shard = path_of("linear 1x32").parent_path();
  fs::rename(shard, base_ / "shard");
  fs::create_directory_symlink(base_ / "shard", shard);
  expect_reject("linear 1x32", "directory is a link or a file");

  fs::create_directory_symlink(directory(), base_ / "link");
  const Store store = Store::open((base_ / "link").string(), Mode::read_write, 0);
  EXPECT_NE(store.problem(), "");
}

TEST_F(CacheTrustTest, FilesThatOthersCanWriteAreRejected) {
  open().save(make_entry("linear 1x32"));
  const fs::path path = path_of("linear 1x32");
  for (mode_t mode : {0602u, 0620u, 0622u, 0666u, 0777u}) {
    ASSERT_EQ(chmod(path.c_str(), mode), 0);
    expect_reject("linear 1x32", "writable by others");
    EXPECT_TRUE(fs::exists(path));
  }
  for (mode_t mode : {0400u, 0600u, 0644u, 0755u}) {
    ASSERT_EQ(chmod(path.c_str(), mode), 0);
    EXPECT_TRUE(open().load("linear 1x32", kHost).has_value()) << std::oct << mode;
  }
}

TEST_F(CacheTrustTest, DirectoriesThatOthersCanWriteAreRejected) {
  open().save(make_entry("linear 1x32"));
  const fs::path shard = path_of("linear 1x32").parent_path();
  for (const fs::path& path : {shard, shard.parent_path()}) {
    ASSERT_EQ(chmod(path.c_str(), 0720), 0);
    expect_reject("linear 1x32", "directory writable by others");
    const std::vector<Listing> listings = open().list();  // none of its files is passed over
    ASSERT_EQ(listings.size(), 1u);
    EXPECT_EQ(listings[0].file, fs::relative(path, directory()).string());
    EXPECT_EQ(listings[0].problem, "directory writable by others");
    ASSERT_EQ(chmod(path.c_str(), 0700), 0);
  }
  for (mode_t mode : {0702u, 0720u, 0777u, 01777u}) {
    ASSERT_EQ(chmod(directory().c_str(), mode), 0);
    Store store = open();
    EXPECT_EQ(store.problem(), directory() + ": directory writable by others");
    EXPECT_FALSE(store.load("linear 1x32", kHost).has_value());
  }
}

// These need to be root, to give files away.
class CacheOwnerTest : public CacheTrustTest {
 protected:
  void SetUp() override {
    if (geteuid() != 0) GTEST_SKIP() << "needs root, to make files of another user";
    CacheTrustTest::SetUp();
    ASSERT_EQ(chmod(base_.c_str(), 0755), 0);
    open().save(make_entry("linear 1x32"));
    path_ = path_of("linear 1x32");
  }
  void give_away(const fs::path& path) {
    ASSERT_EQ(lchown(path.c_str(), kOtherUser, kOtherUser), 0);
  }
  void give_everything_away() {
    give_away(directory());
    for (const auto& item : fs::recursive_directory_iterator(directory())) give_away(item.path());
  }

  fs::path path_;
};

TEST_F(CacheOwnerTest, ForeignFilesAndDirectoriesAreRejected) {
  give_away(path_);
  expect_reject("linear 1x32", "belongs to another user");
  EXPECT_TRUE(fs::exists(path_));  // not ours to remove
  ASSERT_EQ(lchown(path_.c_str(), 0, 0), 0);
  give_away(path_.parent_path());
  expect_reject("linear 1x32", "directory belongs to another user");
  ASSERT_EQ(lchown(path_.parent_path().c_str(), 0, 0), 0);
  EXPECT_TRUE(open().load("linear 1x32", kHost).has_value());
  give_away(directory());
  EXPECT_EQ(open().problem(), directory() + ": directory belongs to another user");
}

TEST_F(CacheOwnerTest, RootsReadableCacheServesOtherUsers) {
  for (const auto& item : fs::recursive_directory_iterator(directory())) {
    ASSERT_EQ(chmod(item.path().c_str(), item.is_directory() ? 0755 : 0644), 0);
  }
  ASSERT_EQ(chmod(directory().c_str(), 0755), 0);
  const auto body = [&] {
    Store store = open();
    if (!store.load("linear 1x32", kHost).has_value()) return 1;
    if (store.problem().find("not writable") == std::string::npos) return 2;
    store.save(make_entry("linear 1x64"));
    if (store.counters().writes != 0) return 3;
    return store.load("linear 1x64", kHost).has_value() ? 4 : 0;
  };
  EXPECT_EQ(in_child(body, true), 0);
}

TEST_F(CacheOwnerTest, OwnCacheOfAnotherUserWorksForThatUser) {
  give_everything_away();
  const auto body = [&] {
    Store store = open();
    store.save(make_entry("linear 1x64"));
    return store.problem().empty() && store.load("linear 1x32", kHost).has_value() &&
                   store.load("linear 1x64", kHost).has_value()
               ? 0
               : 1;
  };
  EXPECT_EQ(in_child(body, true), 0);
}

// Without /proc a nameless file cannot be given a name: the way by rename.
TEST_F(CacheOwnerTest, KeepsEntriesWithoutProc) {
  const auto body = [&] {
    if (chroot(base_.c_str()) != 0 || chdir("/") != 0) return 97;
    Store store = Store::open("/cache", Mode::read_write, 0);
    store.save(make_entry("linear 1x64"));
    store.save(make_entry("blocked"));
    return store.counters().writes == 1 && store.counters().write_failures == 1 ? 0 : 1;
  };
  fs::create_directory(path_of("blocked").parent_path());
  ASSERT_EQ(chmod(path_of("blocked").parent_path().c_str(), 0700), 0);
  fs::create_directory(path_of("blocked"));
  EXPECT_EQ(in_child(body), 0);
  EXPECT_TRUE(open().load("linear 1x64", kHost).has_value());
  for (const auto& item : fs::recursive_directory_iterator(directory())) {
    EXPECT_FALSE(item.path().filename().string().starts_with(".")) << item.path();
  }
}

TEST_F(CacheOwnerTest, DirectoryThatCannotBeMadeIsAProblem) {
  const auto body = [&] {
    Store store = Store::open((base_ / "a" / "b").string(), Mode::read_write, 0);
    store.save(make_entry("linear 1x32"));
    return store.problem().empty() || store.load("linear 1x32", kHost).has_value() ? 1 : 0;
  };
  EXPECT_EQ(in_child(body, true), 0);
  EXPECT_FALSE(fs::exists(base_ / "a"));
}

// A copy of this test program that changes the user: the kernel sets AT_SECURE for it.
TEST_F(CacheOwnerTest, NothingIsReadWithForeignPrivileges) {
  struct statvfs file_system;
  ASSERT_EQ(statvfs(base_.c_str(), &file_system), 0);
  if ((file_system.f_flag & (ST_NOSUID | ST_NOEXEC)) != 0) {
    GTEST_SKIP() << "the temporary directory ignores set-user-ID files";
  }
  const fs::path program = base_ / "program";
  fs::copy_file("/proc/self/exe", program);
  give_everything_away();
  give_away(program);
  ASSERT_EQ(chmod(program.c_str(), 04755), 0);
  ASSERT_EQ(chmod(base_.c_str(), 0777), 0);
  const auto run = [&](const char* expected) {
    return in_child([&] {
      setenv("CACHE_TEST_DIRECTORY", directory().c_str(), 1);
      setenv("CACHE_TEST_EXPECTED", expected, 1);
      execl(program.c_str(), "program", "--gtest_filter=ForeignPrivilegesChild.*", nullptr);
      return 98;
    });
  };
  EXPECT_EQ(run("unusable"), 0);
  ASSERT_EQ(lchown(program.c_str(), 0, 0), 0);  // and without foreign privileges it reads
  ASSERT_EQ(chmod(program.c_str(), 0755), 0);
  for (const auto& item : fs::recursive_directory_iterator(directory())) {
    ASSERT_EQ(lchown(item.path().c_str(), 0, 0), 0);
  }
  ASSERT_EQ(lchown(directory().c_str(), 0, 0), 0);
  EXPECT_EQ(run("usable"), 0);
}

// The other half of NothingIsReadWithForeignPrivileges; alone it has nothing to check.
TEST(ForeignPrivilegesChild, StoreIsUnusable) {
  const char* directory = std::getenv("CACHE_TEST_DIRECTORY");
  if (directory == nullptr) return;
  const bool usable = std::string(std::getenv("CACHE_TEST_EXPECTED")) == "usable";
  setenv("HOME", "/root", 1);
  EXPECT_EQ(!default_directory().empty(), usable);
  EXPECT_EQ(!default_directory(directory).empty(), usable);
  Store store = Store::open(directory, Mode::read_write, 0);
  EXPECT_EQ(store.problem().empty(), usable) << store.problem();
  EXPECT_EQ(store.load("linear 1x32", kHost).has_value(), usable);
}

TEST_F(CacheTrustTest, FileSizeLimitIsAFailedWriteAndNotASignal) {
  const auto body = [&] {
    const rlimit limit = {100, 100};
    setrlimit(RLIMIT_FSIZE, &limit);
    Store store = open();
    store.save(make_entry("linear 1x32", 5000));
    return store.counters().write_failures == 1 ? 0 : 1;
  };
  EXPECT_EQ(in_child(body), 0);
  EXPECT_FALSE(fs::exists(path_of("linear 1x32")));
  for (const auto& item : fs::recursive_directory_iterator(directory())) {
    EXPECT_TRUE(item.is_directory()) << item.path();
  }
}

// Writers of the same keys, a reader and a pruner, all at once: a load gives the right entry or
// nothing, and nothing is ever found corrupt.
TEST_F(CacheTrustTest, ProcessesShareADirectory) {
  constexpr int kProcesses = 6, kKeys = 40, kRounds = 20;
  std::vector<pid_t> children;
  for (int process = 0; process < kProcesses; ++process) {
    const pid_t child = fork();
    if (child == 0) {
      bool good = true;
      for (int round = 0; round < kRounds; ++round) {
        Store store = open();
        if (process == 0) store.prune(0);
        for (int i = 0; i < kKeys; ++i) {
          const Entry entry =
              make_entry("kernel " + std::to_string((i * 7 + process) % kKeys), 2000);
          const std::optional<Entry> loaded = store.load(entry.key_text, kHost);
          good = good && (!loaded || *loaded == entry);
          if (!loaded) store.save(entry);
        }
        good = good && store.counters().rejects.empty();
        good = good && (process == 0 || store.counters().write_failures == 0);
      }
      _exit(good ? 0 : 1);
    }
    children.push_back(child);
  }
  for (pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  Store store = open();
  for (int i = 0; i < kKeys; ++i) store.save(make_entry("kernel " + std::to_string(i), 2000));
  for (int i = 0; i < kKeys; ++i) {
    EXPECT_TRUE(store.load("kernel " + std::to_string(i), kHost).has_value());
  }
}

// Writers are killed at random moments: what remains is whole entries.
TEST_F(CacheTrustTest, KilledWritersLeaveNothingBroken) {
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      Store store = open();
      for (int i = 0;; ++i) store.save(make_entry("kernel " + std::to_string(i % 500), 4000));
    }
    usleep(random() % 4000);
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  for (const Listing& listing : open().list()) EXPECT_EQ(listing.problem, "") << listing.file;
}

}  // namespace
}  // namespace tilewright::cache
