// Threads: the OpenMP team that the process already has, and the barrier between the steps of a
// program.
//
// torch's ATen runs on libgomp; this library links the same SONAME, so both share one pool of
// workers and none of ours is ever created beside it. One parallel region covers all consecutive
// steps; between them threads meet at a spinning barrier (a region per op would cost microseconds
// each, hundreds of times per token).
//
// Tested by threads_test.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace tilewright::ops {

// A sense-reversing barrier. Spins for about 50 microseconds, then yields: on shared virtual CPUs
// an unbounded spin could hold the very core that the late thread needs.
class Barrier {
 public:
  // All `threads` threads of the team call wait(). The last to arrive calls alone() before any of
  // them returns: what it writes, all see.
  template <class Alone>
  void wait(int threads, const Alone& alone) {
    const std::uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads) return spin(generation);
    alone();
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
  }

 private:
  void spin(std::uint32_t generation) const;

  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> generation_{0};
};

// Runs body(thread, threads) on a team of at most `threads`; the calling thread is thread 0. Called
// inside another parallel region, or with threads == 1, it runs on the caller alone.
void run_team(int threads, const std::function<void(int thread, int threads)>& body);

// The size of the team that OpenMP would use by default (torch.set_num_threads governs it too).
int default_threads();

// [begin, end) of `count` work items for one thread of a team: contiguous, balanced.
struct WorkRange {
  std::int64_t begin, end;
};
inline WorkRange share(std::int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace tilewright::ops
