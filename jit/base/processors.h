// Processors: which CPUs the operating system lets this process use, and how much of their time.
//
// Two limits, which may both be below what the machine has: the affinity mask (taskset, cpusets,
// a launcher that pins) and the quota of a control group (the CPU limit of a container). Threads
// beyond either only take time from each other, and at a barrier all wait for the one that the
// kernel has stopped.
//
// Thread-safe. Tested by processors_test.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>

namespace tilewright {

// A set of logical CPUs.
class ProcessorSet {
 public:
  // The affinity mask of the calling thread; CPU 0 if it cannot be read. A system call of 0.3 us.
  static ProcessorSet allowed();

  void add(std::size_t processor);  // those beyond the limit of x86 kernels are left out
  int count() const;
  bool meets(const ProcessorSet& other) const;

 private:
  std::array<std::uint64_t, 128> words_{};  // 8192, the most that an x86 kernel is built for
};

// How many CPUs' time the control groups of this process may use together, rounded up, so at least
// 1; nothing without a limit. The smallest limit from its own group up to the root counts, of
// version 2 (cpu.max) and of version 1 (cpu.cfs_quota_us over cpu.cfs_period_us). Unreadable files
// and malformed ones are no limit. root: where /proc and /sys are, for tests.
std::optional<int> read_quota(const std::filesystem::path& root);

// The same of this machine, read again when the last reading is more than a second old: a container
// can be resized while it runs, and some ten files of 10 us each are too much for each step.
std::optional<int> current_quota();

}  // namespace tilewright
