// The registry of mutexes, and what fork() does with them. See fork_mutex.h.
//
// Tested by kernel_library_fault_test.
#include "jit/base/fork_mutex.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <vector>

namespace tilewright {
namespace {

struct Registry {
  std::mutex mutex;  // held during fork()
  std::vector<ForkMutex*> members;
};

// Never destroyed: a process may fork while it exits.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

bool try_lock_all(const std::vector<ForkMutex*>& members) {
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (members[i]->try_lock()) continue;
    while (i > 0) members[--i]->unlock();
    return false;
  }
  return true;
}

// All or none: threads nest these mutexes in an order that is not known here, and who holds one
// while waiting for another, or making a new one, must be able to go on.
void before_fork() {
  for (;;) {
    registry().mutex.lock();
    if (try_lock_all(registry().members)) return;
    registry().mutex.unlock();
    sched_yield();
  }
}

void after_fork() {
  for (ForkMutex* member : registry().members) member->unlock();
  registry().mutex.unlock();
}

}  // namespace

ForkMutex::ForkMutex() {
  static const int registered = pthread_atfork(before_fork, after_fork, after_fork);
  static_cast<void>(registered);
  const std::lock_guard lock(registry().mutex);
  registry().members.push_back(this);
}

ForkMutex::~ForkMutex() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().members, this);
}

}  // namespace tilewright
