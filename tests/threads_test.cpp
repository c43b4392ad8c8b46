// Threads: the barrier orders steps, teams cover all work, shares partition exactly; work in the
// background is done when it was joined.
#include "ops/threads.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <new>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "jit/base/processors.h"
#include "ops/background.h"
#include "ops/read_bandwidth.h"

namespace tilewright::ops {
namespace {

TEST(Threads, SharesPartitionTheWork) {
  for (std::int64_t count : {0, 1, 2, 7, 100}) {
    for (int threads : {1, 2, 3, 5, 16}) {
      std::int64_t next = 0;
      for (int thread = 0; thread < threads; ++thread) {
        const WorkRange range = share(count, thread, threads);
        EXPECT_EQ(range.begin, next);
        next = range.end;
      }
      EXPECT_EQ(next, count);
    }
  }
}

TEST(Threads, BarrierSeparatesSteps) {
  constexpr int steps = 2000;
  std::vector<std::atomic<int>> done(steps);
  std::atomic<bool> early{false};
  int alone = 0;  // no atomic: one thread at a time, seen by all
  Barrier barrier;
  run_team(3, [&](int, int threads) {
    for (int step = 0; step < steps; ++step) {
      done[static_cast<std::size_t>(step)].fetch_add(1);
      barrier.wait(threads, [&] {
        if (done[static_cast<std::size_t>(step)].load() != threads) early = true;
        alone += 1;
      });
      if (done[static_cast<std::size_t>(step)].load() != threads || alone != step + 1) early = true;
    }
  });
  EXPECT_FALSE(early);
}

TEST(Threads, NestedTeamsRunOnTheCaller) {
  std::atomic<int> inner{0}, wide{0};
  run_team(2, [&](int, int) {
    run_team(2, [&](int thread, int threads) {
      inner.fetch_add(1);
      if (thread != 0 || threads != 1) wide.fetch_add(1);
    });
  });
  EXPECT_GE(inner.load(), 1);
  EXPECT_EQ(wide.load(), 0);
}

TEST(ThreadLimits, TheSmallestDecides) {
  const auto of = [](int setting, int asked, int affinity, std::optional<int> quota) {
    const ThreadLimits limits{setting, asked, affinity, quota};
    return std::pair(limits.threads(), limits.decided_by());
  };
  using Decision = std::pair<int, std::string_view>;
  EXPECT_EQ(of(0, 4, 8, std::nullopt), Decision(4, "torch"));
  EXPECT_EQ(of(0, 8, 8, 8), Decision(8, "torch"));
  EXPECT_EQ(of(0, 64, 8, std::nullopt), Decision(8, "affinity"));
  EXPECT_EQ(of(0, 64, 8, 9), Decision(8, "affinity"));
  EXPECT_EQ(of(0, 64, 8, 2), Decision(2, "quota"));
  EXPECT_EQ(of(16, 64, 8, 2), Decision(16, "setting"));
  EXPECT_EQ(of(0, 0, 8, 2).first, 1);
}

// Runs work on a thread that may use CPU 0 only, so that this one's mask stays.
void on_one_processor(const std::function<void()>& work) {
  std::thread([&] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    work();
  }).join();
}

TEST(ThreadLimits, FollowTheMaskOfTheCallingThread) {
  EXPECT_EQ(thread_limits(1000).affinity, ProcessorSet::allowed().count());
  on_one_processor([] {
    EXPECT_EQ(thread_limits(1000).affinity, 1);
    EXPECT_EQ(thread_limits(1000).threads(), 1);
    EXPECT_EQ(default_threads(), 1);
  });
}

// Each caller needs all CPUs, and all have them in common.
TEST(Threads, CallersThatShareProcessorsQueue) {
  const int threads = std::max(ProcessorSet::allowed().count(), 2);
  std::atomic<int> inside{0}, most{0}, ran{0};
  const auto call = [&] {
    for (int i = 0; i < 25; ++i) {
      run_team(threads, [&](int thread, int) {
        if (thread != 0) return;
        const int now = inside.fetch_add(1) + 1;
        most = std::max(most.load(), now);
        std::this_thread::yield();
        inside.fetch_sub(1);
        ran.fetch_add(1);
      });
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(call);
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(most.load(), 1);
  EXPECT_EQ(ran.load(), 100);
}

// Here because a queue that never moves on would hang it: teams whose masks do not meet run beside
// each other, each waiting for the other inside.
TEST(Threads, CallersOnOtherProcessorsDoNotQueue) {
  const ProcessorSet all = ProcessorSet::allowed();
  if (all.count() < 2) GTEST_SKIP() << "this machine, or this process's mask, has one CPU only";
  std::atomic<int> inside{0};
  const auto call = [&](std::size_t processor) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0) return;
    run_team(2, [&](int thread, int) {
      if (thread != 0) return;
      inside.fetch_add(1);
      while (inside.load() < 2) std::this_thread::yield();
    });
  };
  std::thread first(call, 0), second(call, 1);
  first.join();
  second.join();
  EXPECT_EQ(inside.load(), 2);
}

// The thread that holds a place in the queue does not exist in the child.
TEST(Threads, AChildBeginsItsOwnQueue) {
  std::atomic<bool> inside{false}, goes_on{true};
  std::thread holder([&] {
    run_team(2, [&](int thread, int) {
      if (thread != 0) return;
      inside = true;
      while (goes_on) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    bool done = false;
    // A team of its own: OpenMP of the parent's main thread may have had workers.
    std::thread([&] { run_team(2, [&](int thread, int) { done = done || thread == 0; }); }).join();
    _exit(done ? 0 : 1);
  }
  goes_on = false;
  holder.join();
  int status = 1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(Background, WorksUntilItIsJoined) {
  int sum = 0;
  {
    Background work;
    work.join();
    EXPECT_FALSE(work.begun());
    ASSERT_TRUE(work.begin([&] { sum += 1; }));
    EXPECT_TRUE(work.begun());
    work.join();
    EXPECT_FALSE(work.begun());
    EXPECT_EQ(sum, 1);
    ASSERT_TRUE(work.begin([&] { sum += 2; }));
  }
  EXPECT_EQ(sum, 3);
}

TEST(Background, AChildForgetsIt) {
  Background work;
  std::atomic<bool> goes_on = true;
  ASSERT_TRUE(work.begin([&] {
    while (goes_on) std::this_thread::yield();
  }));
  const pid_t child = fork();
  if (child == 0) {
    const bool known = work.begun();
    work.join();  // would wait for ever
    bool done = false;
    const bool begins = work.begin([&] { done = true; });
    work.join();
    _exit(!known && begins && done ? 0 : 1);
  }
  goes_on = false;
  int status = 1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(Background, WorkThatThrowsEndsNothingElse) {
  Background work;
  ASSERT_TRUE(work.begin([] { throw std::bad_alloc(); }));
  work.join();
  EXPECT_FALSE(work.begun());
}

// Between what the slowest memory and the fastest cache could do.
TEST(ReadBandwidth, IsPlausible) {
  const double bandwidth = read_bandwidth(2);
  EXPECT_GT(bandwidth, 1e8);
  EXPECT_LT(bandwidth, 1e13);
}

}  // namespace
}  // namespace tilewright::ops
