// The cache under faults: writers killed at every system call and at any time, every system call
// failing, hostile files swapped in while it loads, many processes at once.
//
// Tested by breaking the rules: an entry written in place is found torn, a reader that follows
// links accepts what it must not.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <numeric>

#include "cache/weight_directory.h"
#include "tests/cache_fixture.h"
#include "tests/fault_count.h"
#include "tests/system_call_trace.h"

namespace tilewright::cache {
namespace {

using ::tilewright::testing::cases;
using ::tilewright::testing::Decision;
using ::tilewright::testing::is_campaign;
using ::tilewright::testing::record_fault;
using ::tilewright::testing::run_traced;
using ::tilewright::testing::SystemCall;
using ::tilewright::testing::TracedRun;

constexpr Decision kPass = {};

// A file system without O_TMPFILE: the entry is then published by a name and a rename.
bool is_nameless_open(const SystemCall& call) {
  return call.number == SYS_openat && (call.arguments[2] & O_TMPFILE) == O_TMPFILE;
}

// Changes if a descriptor was left open.
int lowest_free_descriptor() {
  const int descriptor = fcntl(STDERR_FILENO, F_DUPFD, 3);
  close(descriptor);
  return descriptor;
}

// What a process does with the cache, each a way through its system calls. The result is the exit
// code: 0 is right, whatever failed underneath.
struct Operation {
  const char* name;
  bool by_rename;                  // O_TMPFILE is refused
  std::function<int(Store&)> run;  // in a store that was opened before
};

class CacheFaultTest : public CacheTest {
 protected:
  // Large enough that its buffers are memory mappings of their own, which can fail.
  const Entry entry_ = make_entry("linear 1x32", 140'000);
  const Entry broken_ = make_entry("broken");
  const Entry fresh_ = make_entry("fresh", 3000);
  const Entry kept_ = make_entry("kept", 3000);  // its code stands for a weight's data

  WeightDirectory keep_weights() const {
    return WeightDirectory::open(directory(), Mode::read_write, 0);
  }

  std::vector<Operation> operations() const {
    const auto save = [this](Store& store) {
      store.save(fresh_);
      return store.counters().writes + store.counters().write_failures == 1 ? 0 : 1;
    };
    return {
        {"open", false,
         [this](Store&) {
           Store store = open();
           const auto loaded = store.load(entry_.key_text, kHost);
           return !loaded || *loaded == entry_ ? 0 : 1;
         }},
        {"load", false,
         [this](Store& store) {
           const auto loaded = store.load(entry_.key_text, kHost);
           if (loaded && *loaded != entry_) return 1;
           return store.counters().hits + store.counters().misses == 1 ? 0 : 2;
         }},
        {"load of a broken file", false,
         [this](Store& store) { return store.load(broken_.key_text, kHost) ? 1 : 0; }},
        {"save", false, save},
        {"save by rename", true, save},
        {"keep a weight", false,
         [this](Store&) {
           WeightDirectory weights = keep_weights();
           weights.save(entry_.key_text, "bf16", entry_.code);
           const WeightCounters counters = weights.counters();
           return counters.writes + counters.write_failures <= 1 ? 0 : 1;
         }},
        {"find a weight", false,
         [this](Store&) {
           const auto found = keep_weights().map(kept_.key_text, true, {});
           return !found ||
                          std::ranges::equal(std::span(found->data.get(), found->bytes), kept_.code)
                      ? 0
                      : 1;
         }},
        {"prune", false, [](Store& store) { return store.prune(0) <= 2 ? 0 : 1; }},
    };
  }

  // The directory as every operation finds it: one good entry, one broken file, one weight.
  void fill() const {
    std::error_code ignored;
    fs::remove_all(directory(), ignored);
    Store store = open();
    store.save(entry_);
    store.save(broken_);
    keep_weights().save(kept_.key_text, "bf16", kept_.code);
    fs::resize_file(path_of(broken_.key_text), 150);
  }

  // What must hold after any fault: whatever is loaded is right, and no key is stuck.
  bool is_sound() const {
    Store store = open();
    for (const Listing& listing : store.list()) {
      if (!listing.problem.empty() && listing.file.find(broken_key()) == std::string::npos) {
        return false;
      }
    }
    for (const WeightListing& listing : keep_weights().list(true)) {
      if (!listing.problem.empty()) return false;
    }
    for (const Entry* entry : {&entry_, &fresh_, &broken_}) {
      if (const auto loaded = store.load(entry->key_text, kHost); loaded && *loaded != *entry) {
        return false;
      }
      store.save(*entry);
      if (!store.load(entry->key_text, kHost)) return false;
    }
    return true;
  }
  std::string broken_key() const { return key_name(generator_hash(), broken_.key_text); }

  bool can_trace() const {
    return run_traced([] { return 0; }, [](const SystemCall&) { return kPass; }).supported;
  }

  // Runs an operation with `decide`, on top of what the operation itself refuses.
  TracedRun run(const Operation& operation,
                const std::function<Decision(const SystemCall&)>& decide) const {
    Store store = open();
    return run_traced(
        [&] {
          const int before = lowest_free_descriptor();
          const int result = operation.run(store);
          return lowest_free_descriptor() == before ? result : 3;
        },
        [&](const SystemCall& call) -> Decision {
          if (operation.by_rename && is_nameless_open(call)) return {Decision::fail, EOPNOTSUPP};
          if (call.number == SYS_fcntl) return kPass;  // ours, of lowest_free_descriptor
          return decide(call);
        });
  }
  std::vector<SystemCall> calls_of(const Operation& operation) const {
    std::vector<SystemCall> calls;
    fill();
    run(operation, [&](const SystemCall& call) {
      calls.push_back(call);
      return kPass;
    });
    return calls;
  }
};

TEST_F(CacheFaultTest, KilledAtEverySystemCall) {
  if (!can_trace()) GTEST_SKIP() << "this system does not let a process trace its child";
  std::int64_t tried = 0, wrong = 0;
  for (const Operation& operation : operations()) {
    for (const SystemCall& target : calls_of(operation)) {
      fill();
      const TracedRun killed = run(operation, [&](const SystemCall& call) -> Decision {
        return {call.index == target.index ? Decision::kill : Decision::pass};
      });
      ++tried;
      // Memory may need a call less than the first time, and then the last is not reached.
      const bool ended = killed.signal == SIGKILL || killed.exit_code == 0;
      const bool sound = ended && is_sound();
      wrong += !sound;
      EXPECT_TRUE(sound) << operation.name << ", call " << target.index << ", signal "
                         << killed.signal;
    }
  }
  // The file of a writer by rename is what remains: an hour later, pruning removes it.
  std::int64_t left = 0;
  Store store = open();
  for (const auto& item : fs::recursive_directory_iterator(directory())) {
    const timespec times[2] = {{1000000, 0}, {1000000, 0}};
    if (item.is_regular_file()) utimensat(AT_FDCWD, item.path().c_str(), times, 0);
  }
  store.prune(0);
  for (const auto& item : fs::recursive_directory_iterator(fs::path(directory()) / "objects")) {
    left += item.is_regular_file();
  }
  EXPECT_EQ(left, 0);
  record_fault("kill -9 at every system call", tried, wrong + left);
}

constexpr int kErrors[] = {ENOSPC, EDQUOT, EIO,    EACCES, EPERM, EROFS,  EMFILE, ENFILE,
                           ENOMEM, EINTR,  ESTALE, EBUSY,  EFBIG, ENOENT, EXDEV};

// The allocator's calls say ENOMEM only, and are not the cache's.
bool is_of_memory(const SystemCall& call) {
  return call.number == SYS_brk || call.number == SYS_mmap || call.number == SYS_munmap ||
         call.number == SYS_mprotect || call.number == SYS_madvise;
}

TEST_F(CacheFaultTest, EverySystemCallFails) {
  if (!can_trace()) GTEST_SKIP() << "this system does not let a process trace its child";
  std::int64_t tried = 0, wrong = 0;
  for (const Operation& operation : operations()) {
    for (const SystemCall& target : calls_of(operation)) {
      const auto check = [&](const std::string& what, const auto& decide) {
        fill();
        bool keeps = false;  // a close() that did not happen leaves its descriptor
        const TracedRun result = run(operation, [&](const SystemCall& call) {
          const Decision decision = decide(call);
          keeps = keeps || (decision.kind == Decision::fail && call.number == SYS_close);
          return decision;
        });
        ++tried;
        const bool leaks = result.exit_code == 3 && keeps;
        const bool right = result.exit_code == 0 || leaks;
        wrong += !right || !is_sound();
        EXPECT_TRUE(right) << operation.name << ", call " << target.index << " (number "
                           << target.number << ") " << what << ": exit code " << result.exit_code
                           << ", signal " << result.signal;
      };
      for (const int error : kErrors) {
        if (is_of_memory(target) && error != ENOMEM) continue;
        const std::string name = strerrorname_np(error);
        check(name, [&](const SystemCall& call) -> Decision {
          return call.index == target.index ? Decision{Decision::fail, error} : kPass;
        });
        if (!is_campaign() || error == EINTR) continue;
        check(name + " from here on", [&](const SystemCall& call) -> Decision {
          if (call.index < target.index || call.number == SYS_close) return kPass;
          return {Decision::fail, error};
        });
      }
      check("does less", [&](const SystemCall& call) -> Decision {
        return {call.index == target.index ? Decision::shorten : Decision::pass};
      });
    }
  }
  record_fault("every system call x 15 errors", tried, wrong);
}

// Groups of writers of the same keys, killed at any moment.
TEST_F(CacheFaultTest, KilledAtAnyTime) {
  constexpr int kWriters = 4, kKeys = 40;
  std::vector<Entry> entries;
  for (int i = 0; i < kKeys; ++i)
    entries.push_back(make_entry("kernel " + std::to_string(i), 4000));
  std::mt19937 random(7);
  std::int64_t killed = 0, wrong = 0;
  for (const std::int64_t count = cases(1000, 10'000); killed < count;) {
    std::vector<pid_t> writers;
    for (int writer = 0; writer < kWriters; ++writer) {
      const pid_t child = fork();
      if (child == 0) {
        Store store = open();
        for (int i = writer;; ++i) {
          store.save(entries[static_cast<std::size_t>(i % kKeys)]);
          if (i % 7 == 0) store.remove(entries[static_cast<std::size_t>(i % kKeys)].key_text);
          if (i % 100 == 99) store.prune(0);
        }
      }
      writers.push_back(child);
    }
    for (const pid_t writer : writers) {
      usleep(random() % 500);
      kill(writer, SIGKILL);
      waitpid(writer, nullptr, 0);
      ++killed;
    }
    if (killed % 100 != 0) continue;
    for (const Listing& listing : open().list()) wrong += !listing.problem.empty();
  }
  Store store = open();
  for (const Entry& entry : entries) {
    store.save(entry);
    const std::optional<Entry> loaded = store.load(entry.key_text, kHost);
    wrong += !loaded || *loaded != entry;  // a stuck key
  }
  record_fault("kill -9 at any time", killed, wrong);
}

// Hostile files and directories, in and out of place while entries are loaded.
class CacheSwapTest : public CacheTest {
 protected:
  void SetUp() override {
    CacheTest::SetUp();
    open().save(good_);
    path_ = path_of(good_.key_text);
    // Whole, for this key, with a right digest: only where it comes from is wrong.
    hostile_.code.assign(300, std::byte{0xcc});
    hostile_file_ = base_ / "hostile" / path_.filename();
    fs::create_directory(hostile_file_.parent_path());
    write_file(hostile_file_, *encode(hostile_, generator_hash()));
    chmod(hostile_file_.c_str(), 0600);
    if (geteuid() == 0) {
      foreign_file_ = base_ / "foreign";
      write_file(foreign_file_, *encode(hostile_, generator_hash()));
      EXPECT_EQ(chown(foreign_file_.c_str(), 1001, 1001), 0);
    }
  }

  // Puts something under the entry's name by a rename, as an attacker would.
  void place(int kind) const {
    const std::string name = path_.string(), aside = (base_ / "aside").string();
    const std::string shard = path_.parent_path().string(), away = (base_ / "away").string();
    unlink(aside.c_str());
    switch (kind) {
      case 0:
        if (symlink(hostile_file_.c_str(), aside.c_str()) == 0) rename(aside.c_str(), name.c_str());
        break;
      case 1:
        if (mkfifo(aside.c_str(), 0600) == 0) rename(aside.c_str(), name.c_str());
        break;
      case 2:
        unlink(name.c_str());
        mkdir(name.c_str(), 0700);
        rmdir(name.c_str());
        break;
      case 3:  // the whole directory
        if (rename(shard.c_str(), away.c_str()) == 0) {
          if (symlink(hostile_file_.parent_path().c_str(), shard.c_str()) == 0) {
            unlink(shard.c_str());
          }
          rename(away.c_str(), shard.c_str());
        }
        break;
      case 4:  // a hard link to what another user owns
        if (!foreign_file_.empty() && link(foreign_file_.c_str(), aside.c_str()) == 0) {
          rename(aside.c_str(), name.c_str());
        }
        break;
      default:  // of another user, then back
        if (!foreign_file_.empty()) {
          write_file(aside, *encode(hostile_, generator_hash()));
          if (chown(aside.c_str(), 1001, 1001) == 0) rename(aside.c_str(), name.c_str());
        }
    }
    unlink(aside.c_str());
    write_file(aside, *encode(good_, generator_hash()));
    chmod(aside.c_str(), 0600);
    rename(aside.c_str(), name.c_str());
  }

  const Entry good_ = make_entry("linear 1x32", 300);
  Entry hostile_ = good_;
  fs::path path_, hostile_file_, foreign_file_;
};

TEST_F(CacheSwapTest, NothingHostileIsAccepted) {
  const pid_t swapper = fork();
  if (swapper == 0) {
    for (int i = 0;; ++i) place(i % 6);
  }
  std::int64_t tried = 0, wrong = 0;
  Store store = open();
  for (const std::int64_t count = cases(20'000, 500'000); tried < count; ++tried) {
    const std::optional<Entry> loaded = store.load(good_.key_text, kHost);
    wrong += loaded && *loaded != good_;
  }
  kill(swapper, SIGKILL);
  waitpid(swapper, nullptr, 0);
  const Counters counters = store.counters();
  EXPECT_GT(counters.hits, 0u);
  EXPECT_TRUE(counters.rejects.contains("symbolic link"));
  EXPECT_TRUE(counters.rejects.contains("not a regular file"));
  EXPECT_EQ(counters.rejects.contains("belongs to another user"), geteuid() == 0);
  record_fault("links, FIFOs, directories, owners swapped in while loading", tried, wrong);
}

// Processes that load or make the same kernels, each in its own order.
TEST_F(CacheFaultTest, ManyProcessesShareADirectory) {
  const auto processes = static_cast<int>(cases(16, 64));
  const auto kernels = static_cast<std::size_t>(cases(500, 2000));
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < kernels; ++i) {
    entries.push_back(make_entry("kernel " + std::to_string(i), 2000));
  }
  std::vector<pid_t> children;
  for (int process = 0; process < processes; ++process) {
    const pid_t child = fork();
    if (child == 0) {
      std::vector<std::size_t> order(kernels);
      std::iota(order.begin(), order.end(), std::size_t{0});
      std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(process)));
      Store store = open();
      bool good = true;
      for (std::size_t index : order) {
        const std::optional<Entry> loaded = store.load(entries[index].key_text, kHost);
        good = good && (!loaded || *loaded == entries[index]);
        if (!loaded) store.save(entries[index]);
      }
      const Counters counters = store.counters();
      _exit(good && counters.rejects.empty() && counters.write_failures == 0 ? 0 : 1);
    }
    children.push_back(child);
  }
  std::int64_t wrong = 0;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    wrong += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  }
  Store store = open();
  for (const Entry& entry : entries) {
    const std::optional<Entry> loaded = store.load(entry.key_text, kHost);
    wrong += !loaded || *loaded != entry;
  }
  wrong += static_cast<std::int64_t>(store.list().size() != kernels);
  record_fault(std::to_string(processes) + " processes x " + std::to_string(kernels) + " kernels",
               processes * static_cast<std::int64_t>(kernels), wrong);
}

}  // namespace
}  // namespace tilewright::cache
