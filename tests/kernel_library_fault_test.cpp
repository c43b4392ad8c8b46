// The kernels of a process under stress: many threads, fork() during emission, a cache that other
// CPUs filled, code that cannot be emitted while others wait for it.
//
// With the tsan preset the threads run under ThreadSanitizer (OpenMP plays no part here).
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <latch>
#include <thread>

#include "jit/base/fork_mutex.h"
#include "jit/base/fork_static.h"
#include "jit/base/log.h"
#include "jit/vir/builder.h"
#include "ops/kernel_library.h"
#include "tests/fault_count.h"

namespace tilewright::ops {
namespace {

namespace fs = std::filesystem;
using jit::vir::Builder;
using jit::vir::Element;
using ::tilewright::testing::cases;
using ::tilewright::testing::record_fault;

// args: x, y; y = x + constant, for one vector. Long enough that emission takes its time.
jit::vir::Function add_constant(int constant, int lanes) {
  Builder b("add_constant", lanes, 2);
  auto x = b.arg(0), y = b.arg(1);
  auto sum = b.load(Element::f32, b.at(x));
  for (int i = 0; i < constant; ++i) sum = b.vadd(sum, b.splat(1));
  b.store(Element::f32, b.at(y), sum);
  return std::move(b).finish();
}

float run(const Kernel& kernel, float value) {
  float x[16] = {value}, y[16] = {};
  const std::int64_t args[] = {argument(x), argument(y)};
  kernel.function(args);
  return y[0];
}

const Kernel* request(KernelLibrary& library, int constant) {
  const int lanes = library.target().lanes();
  return library.request("add " + std::to_string(constant),
                         [=] { return add_constant(constant, lanes); });
}

Target target_of(IsaMask isa) {
  Target target = Target::host();
  target.isa = isa;
  return target;
}

class KernelLibraryFault : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!Target::host().has(Isa::avx2)) GTEST_SKIP() << "needs AVX2";
    std::string pattern = (fs::temp_directory_path() / "tilewright-library-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    base_ = pattern;
  }
  void TearDown() override {
    std::error_code ignored;
    fs::remove_all(base_, ignored);
  }
  std::shared_ptr<cache::Store> store(const std::string& name = "cache") const {
    return std::make_shared<cache::Store>(
        cache::Store::open((base_ / name).string(), cache::Mode::read_write, 0));
  }

  fs::path base_;
};

TEST_F(KernelLibraryFault, ManyThreadsCompileTheSameAndDifferentKernels) {
  constexpr int kThreads = 32;
  const auto rounds = static_cast<int>(cases(2, 10));
  std::int64_t tried = 0;
  std::atomic<std::int64_t> wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    // Half of the threads share one library, the others only its cache.
    const auto shared_store =
        store("cache" + std::to_string(round / 2));  // every other one is warm
    KernelLibrary shared(Target::host(), shared_store);
    std::latch start(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        KernelLibrary own(Target::host(), shared_store);
        KernelLibrary& library = t % 2 == 0 ? shared : own;
        start.arrive_and_wait();
        for (int i = 0; i < 6; ++i) {
          const int constant = i % 2 == 0 ? i + 1 : 10 + 6 * t + i;  // the same, or its own
          const Kernel* kernel = request(library, constant);
          const bool flushed = library.flush().ok();
          wrong += !flushed || run(*kernel, 5) != 5 + static_cast<float>(constant);
          static_cast<void>(library.counters());
          static_cast<void>(library.kernels());
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    tried += kThreads * 6;
    wrong += static_cast<std::int64_t>(!shared_store->counters().rejects.empty());
  }
  record_fault("32 threads compile the same and different kernels", tried, wrong);
}

// A thread's kernel may be taken along by another thread's flush; if it fails there, its own flush
// says so, since nothing else stands between the thread and a call of no function.
TEST_F(KernelLibraryFault, AFailureIsToldToEveryThreadThatAsked) {
  KernelLibrary library(Target::host(), store());
  const auto bad = [] {
    jit::vir::Function function = add_constant(1, 8);
    function.code.pop_back();
    function.code.back().src[0].id = 77;  // a register that was never written
    return function;
  };
  library.request("bad", bad);
  std::thread([&] {
    library.request("bad", bad);  // it is pending already
    EXPECT_FALSE(library.flush().ok());
    EXPECT_TRUE(library.flush().ok());  // told once
  }).join();
  EXPECT_FALSE(library.flush().ok());
  EXPECT_TRUE(library.flush().ok());
}

TEST_F(KernelLibraryFault, ForkDuringEmission) {
  KernelLibrary library(Target::host(), store());
  std::atomic<bool> stop = false;
  std::atomic<int> next = 1;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      while (!stop) {
        request(library, next++ % 600 + 1);
        EXPECT_TRUE(library.flush().ok());
        log_debug("emitted");
      }
    });
  }
  std::int64_t tried = 0, wrong = 0;
  for (const std::int64_t count = cases(100, 1000); tried < count; ++tried) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);  // a deadlock ends by SIGALRM
      const Kernel* kernel = request(library, 700);
      const bool good = library.flush().ok() && run(*kernel, 5) == 705;
      log_debug("emitted in the child");
      _exit(good && library.counters().code_bytes > 0 ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    wrong += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  record_fault("fork during emission", tried, wrong);
}

// Mutexes that are nested in both orders, and one that is held for long: fork() waits, no more.
TEST(ForkMutexTest, ForkTakesAllOrNone) {
  ForkMutex a, b;
  std::atomic<bool> stop = false;
  const auto nest = [&](ForkMutex& outer, ForkMutex& inner) {
    while (!stop) {
      {
        const std::lock_guard one(outer);
        if (inner.try_lock()) inner.unlock();
      }
      // Or there would hardly be a moment at which fork() finds both free.
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  };
  std::thread first([&] { nest(a, b); }), second([&] { nest(b, a); });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      const std::scoped_lock both(a, b);
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status));
  }
  stop = true;
  first.join();
  second.join();
}

// Nested ones, that a thread is still making when another one forks.
TEST(ForkStaticTest, ForkWaitsForItsMaker) {
  static constinit ForkStatic<int> inner, outer;
  std::latch began(1);
  const auto make_outer = [&](bool slowly) {
    return outer.get([&] {
      const int made = inner.get([] { return 6; }) + 1;
      began.count_down(slowly ? 1 : 0);
      if (slowly) std::this_thread::sleep_for(std::chrono::milliseconds(50));
      return made;
    });
  };
  std::thread maker([&] { make_outer(true); });
  began.wait();
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    _exit(make_outer(false));
  }
  int status = 0;
  waitpid(child, &status, 0);
  maker.join();
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

// What twelve kinds of CPU offer, from Haswell to Granite Rapids, and two that do not exist.
std::vector<IsaMask> cpus() {
  const IsaMask avx2 = bit(Isa::avx2), avx512 = bit(Isa::avx512), vnni = bit(Isa::avx512_vnni);
  std::vector<IsaMask> masks = {avx2, avx2 | avx512, avx2 | avx512 | vnni,
                                avx2 | avx512 | vnni | bit(Isa::avx512_bf16)};
  for (const char* rung : {"avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_fp16",
                           "amx_bf16", "amx_int8", "amx_fp16"}) {
    masks.push_back(*Target::ladder(rung));
  }
  return masks;
}

TEST_F(KernelLibraryFault, EntriesOfOtherCpus) {
  const std::vector<IsaMask> masks = cpus();
  std::int64_t tried = 0, wrong = 0;
  for (const IsaMask writer : masks) {
    for (const IsaMask reader : masks) {
      ++tried;
      const std::string name = std::to_string(writer) + "-" + std::to_string(reader);
      const auto shared = store(name);
      KernelLibrary theirs(target_of(writer), shared), ours(target_of(reader), shared);
      const Kernel* made = request(theirs, 3);
      ASSERT_TRUE(theirs.flush().ok());

      // Their file under our name, as if a cache was copied together wrongly; and an entry that
      // claims our key but needs their CPU.
      const std::string our_key = "add 3\nisa " + isa_mask_name(reader) + "\n";
      const auto path = [&](const std::string& key_text) {
        const std::string key = cache::key_name(cache::generator_hash(), key_text);
        return base_ / name / "objects" / key.substr(0, 2) / (key + ".kernel");
      };
      if (writer != reader) {
        fs::create_directories(path(our_key).parent_path());
        fs::permissions(path(our_key).parent_path(), fs::perms::owner_all);
        fs::copy_file(path(made->key), path(our_key));
        wrong += static_cast<std::int64_t>(shared->load(our_key, reader).has_value());
      }
      cache::Entry claims{"claims", "claims", writer, std::vector<std::byte>(16), {}};
      shared->save(claims);
      const bool subset = (writer & ~reader) == 0;
      wrong += static_cast<std::int64_t>(shared->load("claims", reader).has_value() != subset);

      const Kernel* kernel = request(ours, 3);
      ASSERT_TRUE(ours.flush().ok());
      wrong += static_cast<std::int64_t>((kernel->required_isa & ~reader) != 0);
      wrong += static_cast<std::int64_t>(kernel->loaded != (writer == reader));
      if ((reader & ~Target::host().isa) == 0) wrong += run(*kernel, 5) != 8;
    }
  }
  record_fault("entries of other CPUs, pairs", tried, wrong);
}

TEST_F(KernelLibraryFault, EntriesOfOtherBuilds) {
  std::int64_t tried = 0, wrong = 0;
  const std::string path = (base_ / "cache").string();
  for (int build = 0; build < 12; ++build) {
    const auto open = [&](int of) {
      return std::make_shared<cache::Store>(
          cache::Store::open(path, cache::Mode::read_write, 0, "build " + std::to_string(of)));
    };
    for (int other = 0; other < 12; ++other) {
      KernelLibrary library(Target::host(), open(other));
      // The same specification stands for other code in each build.
      const Kernel* kernel = library.request("add", [&] { return add_constant(other + 1, 8); });
      ASSERT_TRUE(library.flush().ok());
      wrong += run(*kernel, 5) != 6 + static_cast<float>(other);
      wrong += static_cast<std::int64_t>(kernel->loaded != (build > 0));
      ++tried;
    }
  }
  record_fault("entries of other builds, pairs", tried, wrong);
}

}  // namespace
}  // namespace tilewright::ops
