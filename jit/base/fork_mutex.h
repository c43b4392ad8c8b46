// ForkMutex: a mutex that a child after fork() can still take.
//
// A plain mutex that another thread holds at the moment of fork() stays locked in the child for
// ever: its holder does not exist there. fork() waits until it holds every ForkMutex of the process
// and releases them on both sides, so the child also finds what they guard in a consistent state.
// The price is that fork() waits for a compilation that is under way, and that no thread may fork
// while it holds one.
//
// Thread-safe. Tested by kernel_library_fault_test.
#pragma once

#include <mutex>

namespace tilewright {

class ForkMutex {
 public:
  ForkMutex();
  ~ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  ForkMutex& operator=(const ForkMutex&) = delete;

  void lock() { mutex_.lock(); }
  bool try_lock() { return mutex_.try_lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

}  // namespace tilewright
