// ForkStatic: the one object of its kind in a process, made by its first use and never destroyed.
//
// A `static` within a function would be that too. But a child of a fork() that comes while another
// thread makes it waits for that thread for ever: there is no such thread in the child. Here fork()
// waits until nothing is being made.
//
// Thread-safe. Makers may use other ForkStatics, and must not wait for another thread that may: no
// log, whose sink may wait for Python's lock, and no pthread_atfork(), which may wait for the
// fork() that waits for them. Tested by kernel_library_fault_test.
#pragma once

#include <atomic>

namespace tilewright {

// While one lives no other thread makes a ForkStatic, and none forks.
class MakingForkStatic {
 public:
  MakingForkStatic();
  ~MakingForkStatic();
  MakingForkStatic(const MakingForkStatic&) = delete;
  MakingForkStatic& operator=(const MakingForkStatic&) = delete;
};

// To be used as `static constinit ForkStatic<T> object;`.
template <class T>
class ForkStatic {
 public:
  constexpr ForkStatic() = default;
  ForkStatic(const ForkStatic&) = delete;
  ForkStatic& operator=(const ForkStatic&) = delete;

  T& get() {
    return get([] { return T(); });
  }
  // make() -> T, called once.
  template <class Make>
  T& get(const Make& make) {
    if (T* const made = object_.load(std::memory_order_acquire)) return *made;
    const MakingForkStatic making;
    if (T* const made = object_.load(std::memory_order_relaxed)) return *made;
    T* const made = new T(make());
    object_.store(made, std::memory_order_release);
    return *made;
  }

 private:
  std::atomic<T*> object_{nullptr};
};

}  // namespace tilewright
