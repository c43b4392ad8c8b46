// See background.h. Tested by threads_test.
#include "ops/background.h"

#include <unistd.h>

#include <memory>
#include <system_error>
#include <utility>

namespace tilewright::ops {

bool Background::begin(std::function<void()> work) {
  join();
  try {
    thread_ = std::thread([work = std::move(work)] {
      try {
        work();
      } catch (...) {  // out of memory; beyond a thread's end it would end the process
      }
    });
  } catch (const std::system_error&) {
    return false;
  }
  begun_by_ = getpid();
  return true;
}

bool Background::begun() const { return thread_.joinable() && begun_by_ == getpid(); }

void Background::join() {
  if (!thread_.joinable()) return;
  if (begun_by_ == getpid()) {
    thread_.join();
  } else {
    // Another thread of this child may have got the same handle: it is neither joined nor detached.
    std::construct_at(&thread_);
  }
}

}  // namespace tilewright::ops
