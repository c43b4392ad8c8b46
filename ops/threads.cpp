// Threads: see threads.h. Tested by threads_test.
#include "ops/threads.h"

#include <omp.h>
#include <sched.h>

#include <chrono>

namespace tilewright::ops {
namespace {

void pause() { __builtin_ia32_pause(); }

}  // namespace

void Barrier::spin(std::uint32_t generation) const {
  using Clock = std::chrono::steady_clock;
  constexpr auto spin = std::chrono::microseconds(50);
  constexpr int pauses_per_look = 64;
  Clock::time_point deadline{};
  while (true) {
    for (int i = 0; i < pauses_per_look; ++i) {
      if (generation_.load(std::memory_order_acquire) != generation) return;
      pause();
    }
    const auto now = Clock::now();
    if (deadline == Clock::time_point{}) deadline = now + spin;
    if (now > deadline) sched_yield();
  }
}

void run_team(int threads, const std::function<void(int, int)>& body) {
  if (threads <= 1 || omp_in_parallel()) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

int default_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

}  // namespace tilewright::ops
