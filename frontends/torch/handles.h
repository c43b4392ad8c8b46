// Handles: numbers for objects of the core, which torch's operators can pass on where they could
// not pass a pointer that outlives its object.
//
// Thread-safe. Tested by tests/python/test_operators.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "jit/base/fork_mutex.h"

namespace tilewright {

// A number whose object is gone finds nothing.
template <class T>
class Handles {
 public:
  std::int64_t add(const std::shared_ptr<T>& object) {
    std::lock_guard lock(mutex_);
    objects_.emplace(++last_, object);
    return last_;
  }
  void remove(std::int64_t handle) {
    std::lock_guard lock(mutex_);
    objects_.erase(handle);
  }
  std::shared_ptr<T> find(std::int64_t handle) const {
    std::lock_guard lock(mutex_);
    auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second.lock();
  }

 private:
  mutable ForkMutex mutex_;
  std::int64_t last_ = 0;
  std::map<std::int64_t, std::weak_ptr<T>> objects_;
};

// An object of the core with its number.
template <class T>
struct Handled : T {
  using T::T;
  ~Handled() { handles.remove(handle); }
  Handled(const Handled&) = delete;
  Handled& operator=(const Handled&) = delete;

  template <class... Arguments>
  static std::shared_ptr<Handled> make(Arguments&&... arguments) {
    auto made = std::make_shared<Handled>(std::forward<Arguments>(arguments)...);
    made->handle = handles.add(made);
    return made;
  }

  std::int64_t handle = 0;
  static inline Handles<Handled> handles;
};

}  // namespace tilewright
