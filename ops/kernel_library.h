// KernelLibrary: every kernel of the process, by key: in memory, else from the cache on disk, else
// emitted now.
//
// The key text is the kernel's printed specification and the ISA it was allowed; cache::Store adds
// the generator's hash. request() only notes what is needed; flush() loads or emits all of it and
// publishes it in one slab of executable memory.
//
// Thread-safe, and usable in a child after fork(). Tested by kernel_library_test and
// kernel_library_fault_test.
#pragma once

#include <bit>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cache/store.h"
#include "jit/base/fork_mutex.h"
#include "jit/base/result.h"
#include "jit/base/target.h"
#include "jit/code_memory.h"
#include "jit/emit.h"

namespace tilewright::ops {

struct Kernel {
  std::string key;
  std::string name;                        // as perf and gdb show it
  jit::KernelFunction function = nullptr;  // set by flush()
  IsaMask required_isa = 0;
  bool loaded = false;  // from the cache; otherwise emitted
};

// An address, as kernels take it among their arguments.
inline std::int64_t argument(const void* address) { return std::bit_cast<std::int64_t>(address); }

struct KernelCounters {
  std::uint64_t emitted = 0, loaded = 0, code_bytes = 0;
  std::uint64_t check_failures = 0;  // loaded code that was not what is emitted now
  double emit_seconds = 0, load_seconds = 0;
};

class KernelLibrary {
 public:
  KernelLibrary(Target target, std::shared_ptr<cache::Store> store, bool check_cache = false);

  // Sees every entry that is emitted, with the VIR that it was made of. Before the first request.
  void observe(std::function<void(const cache::Entry&)> observer) {
    observer_ = std::move(observer);
  }

  // Asked before a kernel that the cache lacks is emitted; one that it refuses is left out and is
  // no error, so that prewarming gets past it. Before the first request.
  void admit(std::function<bool(const Kernel&)> admission) { admission_ = std::move(admission); }

  const Target& target() const { return target_; }

  // The kernel of this specification. Its function is null until the next flush(). The pointer is
  // stable. build is called at most once, in flush(), and only if the cache has no such kernel.
  const Kernel* request(const std::string& specification,
                        std::function<jit::vir::Function()> build);
  // Error: a kernel that this thread requested could not be emitted or published, by this call or
  // by that of another thread, and why; the others are there.
  Status flush();

  KernelCounters counters() const;
  std::vector<Kernel> kernels() const;  // a copy, in order of request

 private:
  struct Pending {
    Kernel* kernel;
    std::function<jit::vir::Function()> build;
    std::vector<std::thread::id> requesters;
  };

  // These hold the mutex.
  void flush_pending(std::vector<std::string>& warnings);
  void abandon(const Pending& item, const std::string& problem);

  Target target_;
  std::shared_ptr<cache::Store> store_;
  bool check_cache_;
  std::function<void(const cache::Entry&)> observer_;
  std::function<bool(const Kernel&)> admission_;
  mutable ForkMutex mutex_;
  std::map<std::string, std::unique_ptr<Kernel>, std::less<>> kernels_;
  std::vector<std::unique_ptr<Kernel>> abandoned_;
  std::vector<Kernel*> order_;
  std::vector<Pending> pending_;
  std::map<std::thread::id, std::string> problems_;  // not yet told to these threads
  jit::CodeMemory memory_;
  KernelCounters counters_;
};

}  // namespace tilewright::ops
