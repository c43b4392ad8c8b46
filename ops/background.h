// Background: one piece of work in a thread of its own, beside the caller's.
//
// For what a start can do while Python holds its only core. Not for the work of a step, which has
// torch's team (threads.h).
//
// Not thread-safe. A child after fork() does not have the thread: there it is forgotten. Tested by
// threads_test.
#pragma once

#include <sys/types.h>

#include <functional>
#include <thread>

namespace tilewright::ops {

class Background {
 public:
  Background() = default;
  ~Background() { join(); }
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // False, and nothing happens, if there is no thread to be had. Work that throws ends early, in
  // silence: who joins looks at what it left. REQUIRES: none was begun since the last join().
  bool begin(std::function<void()> work);
  // Whether this process began one and has not joined it.
  bool begun() const;
  // Until the work is done.
  void join();

 private:
  std::thread thread_;
  pid_t begun_by_ = 0;
};

}  // namespace tilewright::ops
