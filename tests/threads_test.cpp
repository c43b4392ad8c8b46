// Threads: the barrier orders steps, teams cover all work, shares partition exactly; work in the
// background is done when it was joined.
#include "ops/threads.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <new>
#include <thread>
#include <vector>

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
