// Threads: the OpenMP team that the process already has, and the barrier between the steps of a
// program.
//
// torch's ATen runs on libgomp; this library links the same SONAME, so both share one pool of
// workers and none of ours is ever created beside it. One parallel region covers all consecutive
// steps; between them threads meet at a spinning barrier (a region per op would cost microseconds
// each, hundreds of times per token).
//
// Where a weight's pages are. share() gives thread t of a team the same panels when a weight is
// packed and when it is read, and packing touches the pages first (weights.cpp), so with as many
// threads they lie on the NUMA node of the CPU that thread t ran on. That it stays there is the
// launcher's business (OMP_PROC_BIND), as the threads are OpenMP's; which node that is, getcpu()
// says and no partition repeats. Not so: pages shared by the ends of two shares (huge ones, so up
// to 2 MB of each), pieces that a neighbour takes (tails.h), weights mapped from disk, and a team
// of another size than the one that packed. Nobody has measured it on two nodes.
//
// Tested by threads_test, first touch by weights_test.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>

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
//
// Teams of several callers do not share CPUs: one waits, in the order of arrival, while those
// before it whose affinity masks meet its own leave it too few of them.
void run_team(int threads, const std::function<void(int thread, int threads)>& body);

// How many threads a team should have, and why.
struct ThreadLimits {
  int setting = 0;           // TILEWRIGHT_NUM_THREADS: overrules the rest; 0: not set
  int asked = 1;             // by the caller: torch.get_num_threads()
  int affinity = 1;          // CPUs that the calling thread may run on
  std::optional<int> quota;  // of the control groups

  int threads() const;                  // the smallest of the last three, or the setting
  std::string_view decided_by() const;  // "setting", "torch", "affinity" or "quota"
};

// As of now, but for the quota, which may be a second old: each step may ask.
ThreadLimits thread_limits(int asked);

// The size of a team where nobody asks for one: OpenMP's own (torch.set_num_threads governs it
// too), limited so; 1 in a team.
int default_threads();

// [begin, end) of `count` work items for one thread of a team: contiguous, balanced.
struct WorkRange {
  std::int64_t begin, end;
};
inline WorkRange share(std::int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace tilewright::ops
