// Runs a function in a child process and decides about each of its system calls: let it pass, make
// it fail with an errno, make it do less than asked, or kill the process in front of it.
//
// By ptrace, so that the errors come from where the kernel's would, whatever library made the call.
// Used by cache_fault_test.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

namespace tilewright::testing {

struct SystemCall {
  int index = 0;  // in order, from 0
  long number = 0;
  std::array<std::uint64_t, 6> arguments = {};
};

struct Decision {
  enum Kind { pass, fail, shorten, kill } kind = pass;
  int error = 0;  // of fail
};

struct TracedRun {
  bool supported = false;  // false: this system does not let a process trace its child
  int calls = 0;
  int exit_code = -1;  // -1: the child did not exit
  int signal = 0;      // that ended it
};

// body's result is the exit code. The calls of body alone are counted.
TracedRun run_traced(const std::function<int()>& body,
                     const std::function<Decision(const SystemCall&)>& decide);

}  // namespace tilewright::testing
