// Threads: see threads.h. Tested by threads_test.
#include "ops/threads.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "jit/base/env.h"
#include "jit/base/fork_static.h"
#include "jit/base/processors.h"

namespace tilewright::ops {
namespace {

void pause() { __builtin_ia32_pause(); }

// OpenMP may have bound its threads to places (OMP_PROC_BIND, OMP_PLACES), the first one to a
// single CPU: then the places say where a team may run, and the mask of the caller nothing.
ProcessorSet places() {
  ProcessorSet set;
  std::vector<int> processors;
  for (int place = 0; place < omp_get_num_places(); ++place) {
    processors.resize(static_cast<std::size_t>(omp_get_place_num_procs(place)));
    omp_get_place_proc_ids(place, processors.data());
    for (int processor : processors) set.add(static_cast<std::size_t>(processor));
  }
  return set;
}

ProcessorSet processors_of_caller() {
  static constinit ForkStatic<const ProcessorSet> known;
  const ProcessorSet& bound = known.get(places);  // fixed when OpenMP starts
  return bound.count() > 0 ? bound : ProcessorSet::allowed();
}

// A caller that has a team or waits for one. It lives on that caller's stack.
struct Team {
  explicit Team(int thread_count) : threads(thread_count), processors(processors_of_caller()) {
    const int count = processors.count();
    room = std::min(count, current_quota().value_or(count));
  }

  int threads;
  ProcessorSet processors;
  int room;  // CPUs of them that the quota allows at once
};

// The teams of this process, in the order of arrival. Allocates for more of them than ever before.
class TeamQueue {
 public:
  // Waits until there is room. All teams before this one count, those that wait, too, so that a
  // large one is not passed by small ones for ever.
  void enter(const Team& team) {
    std::unique_lock lock(mutex_);
    teams_.push_back(&team);
    left_.wait(lock, [&] { return has_room(team); });
  }

  void leave(const Team& team) {
    {
      const std::lock_guard lock(mutex_);
      std::erase(teams_, &team);
    }
    left_.notify_all();
  }

 private:
  bool has_room(const Team& team) const {  // a team alone always has
    int before = 0;
    for (const Team* other : teams_) {
      if (other == &team) break;
      if (other->processors.meets(team.processors)) before += other->threads;
    }
    return before == 0 || before + team.threads <= team.room;
  }

  std::mutex mutex_;
  std::condition_variable left_;
  std::vector<const Team*> teams_;
};

// Never destroyed, because a thread may compute while the process exits.
constinit std::atomic<TeamQueue*> queue{nullptr};

// A child after fork() has none of the threads that are in its parent's queue, so it begins
// another.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { queue = nullptr; });

TeamQueue& team_queue() {
  if (TeamQueue* const made = queue) return *made;
  auto fresh = std::make_unique<TeamQueue>();
  TeamQueue* first = nullptr;
  return queue.compare_exchange_strong(first, fresh.get()) ? *fresh.release() : *first;
}

class PlaceInQueue {
 public:
  explicit PlaceInQueue(int threads) : team_(threads) { queue_.enter(team_); }
  ~PlaceInQueue() { queue_.leave(team_); }
  PlaceInQueue(const PlaceInQueue&) = delete;
  PlaceInQueue& operator=(const PlaceInQueue&) = delete;

 private:
  TeamQueue& queue_ = team_queue();
  const Team team_;
};

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
  const PlaceInQueue place(threads);
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

int ThreadLimits::threads() const {
  if (setting > 0) return setting;
  return std::max(std::min({asked, affinity, quota.value_or(asked)}), 1);
}

std::string_view ThreadLimits::decided_by() const {
  if (setting > 0) return "setting";
  if (threads() >= asked) return "torch";
  return threads() == affinity ? "affinity" : "quota";
}

ThreadLimits thread_limits(int asked) {
  return {environment().num_threads, asked, processors_of_caller().count(), current_quota()};
}

int default_threads() {
  return omp_in_parallel() ? 1 : thread_limits(omp_get_max_threads()).threads();
}

}  // namespace tilewright::ops
