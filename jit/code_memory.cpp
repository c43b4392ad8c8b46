// Executable memory: copy to an anonymous private mapping, then flip it to read-execute, once.
// See code_memory.h.
//
// Tested by code_memory_test.
#include "jit/code_memory.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "jit/base/round_up.h"

namespace tilewright::jit {
namespace {

constexpr std::size_t kEntryAlignment = 64;
constexpr int kInt3 = 0xCC;  // fills the gaps: a jump astray traps

// The words say what usually refuses, because the user can change that and nothing else.
Error refused(const char* call, int error) {
  return {
      fmt::format("no executable memory: {}: {} (SELinux execmem, PR_SET_MDWE or seccomp may "
                  "forbid it)",
                  call, std::strerror(error))};
}

}  // namespace

CodeMemory::~CodeMemory() {
  for (const Slab& slab : slabs_) munmap(slab.address, slab.size);
}

Status CodeMemory::probe() {
  constexpr std::array<std::byte, 1> kReturn = {std::byte{0xC3}};
  const std::span<const std::byte> code(kReturn);
  CodeMemory memory;
  const auto published = memory.publish(std::span(&code, 1));
  return published ? Status() : Status(published.error());
}

Result<std::vector<KernelFunction>> CodeMemory::publish(
    std::span<const std::span<const std::byte>> codes) {
  std::vector<std::size_t> offsets;
  std::size_t size = 0;
  for (std::span<const std::byte> code : codes) {
    if (code.empty()) return Error{"code memory: an empty kernel"};
    offsets.push_back(size);
    size = round_up(size + code.size(), kEntryAlignment);
  }
  std::vector<KernelFunction> entries;
  if (codes.empty()) return entries;

  size = round_up(size, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)));
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return refused("mmap", errno);
  std::memset(address, kInt3, size);
  auto* base = static_cast<std::byte*>(address);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    std::byte* entry = base + offsets[i];
    std::memcpy(entry, codes[i].data(), codes[i].size());
    entries.push_back(reinterpret_cast<KernelFunction>(entry));
  }
  if (mprotect(address, size, PROT_READ | PROT_EXEC) != 0) {
    const int error = errno;
    munmap(address, size);
    return refused("mprotect(PROT_READ | PROT_EXEC)", error);
  }
  const std::lock_guard lock(mutex_);
  slabs_.push_back({address, size});
  return entries;
}

}  // namespace tilewright::jit
