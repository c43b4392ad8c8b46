// The tracer: a child that stops before and after each system call. See system_call_trace.h.
#include "tests/system_call_trace.h"

#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>

namespace tilewright::testing {
namespace {

constexpr int kSystemCallStop = SIGTRAP | 0x80;

[[noreturn]] void run_child(const std::function<int()>& body) {
  if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
  syscall(SYS_kill, getpid(), SIGSTOP);
  _exit(body());
}

SystemCall call_of(const user_regs_struct& registers, int index) {
  return {index,
          static_cast<long>(registers.orig_rax),
          {registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9}};
}

}  // namespace

TracedRun run_traced(const std::function<int()>& body,
                     const std::function<Decision(const SystemCall&)>& decide) {
  TracedRun run;
  const pid_t child = fork();
  if (child == 0) run_child(body);
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return run;
  run.supported = true;
  ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);

  bool inside = false;                  // a call was entered and has not returned
  int error = 0;                        // what it is to return, 0: what the kernel says
  unsigned long long wanted_break = 0;  // of a brk() that fails
  int deliver = 0;
  for (;;) {
    ptrace(PTRACE_SYSCALL, child, nullptr, deliver);
    deliver = 0;
    if (waitpid(child, &status, 0) != child) return run;
    if (WIFEXITED(status)) run.exit_code = WEXITSTATUS(status);
    if (WIFSIGNALED(status)) run.signal = WTERMSIG(status);
    if (!WIFSTOPPED(status)) return run;
    if (WSTOPSIG(status) != kSystemCallStop) {
      deliver = WSTOPSIG(status);
      continue;
    }
    user_regs_struct registers;
    ptrace(PTRACE_GETREGS, child, nullptr, &registers);
    inside = !inside;
    if (!inside) {
      if (wanted_break != 0) {
        registers.rdi = wanted_break;  // a call leaves its arguments alone
        ptrace(PTRACE_SETREGS, child, nullptr, &registers);
        wanted_break = 0;
      }
      if (error != 0) {
        registers.rax = static_cast<unsigned long long>(-error);
        ptrace(PTRACE_SETREGS, child, nullptr, &registers);
      }
      error = 0;
      continue;
    }
    const SystemCall call = call_of(registers, run.calls);
    if (call.number == SYS_exit_group) continue;
    ++run.calls;
    const Decision decision = decide(call);
    if (decision.kind == Decision::kill) {
      kill(child, SIGKILL);
    } else if (decision.kind == Decision::fail && call.number == SYS_brk) {
      // It has no errors: when it fails, the break is where it was, as after brk(0). libc took an
      // error for an address, and malloc wrote there.
      wanted_break = registers.rdi;
      registers.rdi = 0;
      ptrace(PTRACE_SETREGS, child, nullptr, &registers);
    } else if (decision.kind == Decision::fail) {
      error = decision.error;
      registers.orig_rax = static_cast<unsigned long long>(-1);  // no such call: nothing happens
      ptrace(PTRACE_SETREGS, child, nullptr, &registers);
    } else if (decision.kind == Decision::shorten &&
               (call.number == SYS_read || call.number == SYS_write)) {
      registers.rdx = std::max(registers.rdx / 2, 1ull);
      ptrace(PTRACE_SETREGS, child, nullptr, &registers);
    }
  }
}

}  // namespace tilewright::testing
