// The registry of mutexes, and what fork() does with them. See fork_mutex.h, fork_static.h.
//
// Tested by kernel_library_fault_test.
#include "jit/base/fork_mutex.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <vector>

#include "jit/base/fork_static.h"

namespace tilewright {
namespace {

struct Registry {
  std::mutex mutex;   // held during fork()
  std::mutex making;  // a ForkStatic
  std::vector<ForkMutex*> members;
};

// Never destroyed: a process may fork while it exits.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

bool try_lock_all(Registry& all) {
  if (!all.making.try_lock()) return false;
  for (std::size_t i = 0; i < all.members.size(); ++i) {
    if (all.members[i]->try_lock()) continue;
    while (i > 0) all.members[--i]->unlock();
    all.making.unlock();
    return false;
  }
  return true;
}

// All or none: threads nest these mutexes in an order that is not known here, and who holds one
// while waiting for another, or making a new one, must be able to go on.
void before_fork() {
  for (;;) {
    registry().mutex.lock();
    if (try_lock_all(registry())) return;
    registry().mutex.unlock();
    sched_yield();
  }
}

void after_fork() {
  for (ForkMutex* member : registry().members) member->unlock();
  registry().making.unlock();
  registry().mutex.unlock();
}

// When the library is loaded: a fork must find the registry made, by itself if need be.
[[maybe_unused]] const int registered = pthread_atfork(before_fork, after_fork, after_fork);

thread_local int making_depth = 0;

}  // namespace

ForkMutex::ForkMutex() {
  const std::lock_guard lock(registry().mutex);
  registry().members.push_back(this);
}

ForkMutex::~ForkMutex() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().members, this);
}

MakingForkStatic::MakingForkStatic() {
  if (making_depth++ == 0) registry().making.lock();
}

MakingForkStatic::~MakingForkStatic() {
  if (--making_depth == 0) registry().making.unlock();
}

}  // namespace tilewright
