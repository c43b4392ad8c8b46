// Guarded operands and the checked call. See kernel_harness.h.
//
// Tested by emit_test.
#include "kernel_harness.h"

#include <cpuid.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <mutex>

namespace tilewright::testing {
namespace {

// Little-endian 0x7ff1 pairs: a signalling NaN as f16 and (as the high half) as bf16 and f32, and
// as f64.
constexpr std::array kCanary = {std::byte{0xf1}, std::byte{0x7f}};

void fill(std::span<std::byte> bytes) {
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = kCanary[i % 2];
}

std::size_t page_size() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

GuardedBuffer::GuardedBuffer(std::size_t size, Flush flush) : size_(size) {
  const std::size_t page = page_size();
  inner_size_ = (size + page - 1) / page * page;
  void* mapping =
      mmap(nullptr, inner_size_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) std::abort();
  mapping_ = static_cast<std::byte*>(mapping);
  std::byte* inner = mapping_ + page;
  if (inner_size_ > 0 && mprotect(inner, inner_size_, PROT_READ | PROT_WRITE) != 0) std::abort();
  data_ = flush == Flush::start ? inner : inner + inner_size_ - size;
  fill({inner, inner_size_});
}

GuardedBuffer::~GuardedBuffer() { munmap(mapping_, inner_size_ + 2 * page_size()); }

void GuardedBuffer::fill_with_canary() { fill({data_, size_}); }

void GuardedBuffer::protect_read_only() {
  if (mprotect(mapping_ + page_size(), inner_size_, PROT_READ) != 0) std::abort();
}

std::span<std::byte> GuardedBuffer::slack() const {
  std::byte* inner = mapping_ + page_size();
  if (data_ == inner) return {inner + size_, inner_size_ - size_};
  return {inner, inner_size_ - size_};
}

bool GuardedBuffer::slack_intact() const {
  const std::byte* inner = mapping_ + page_size();
  for (const std::byte& byte : slack()) {
    if (byte != kCanary[static_cast<std::size_t>(&byte - inner) % 2]) return false;
  }
  return true;
}

namespace {

constexpr std::size_t kRegisters = 6;
constexpr std::array<const char*, kRegisters> kNames = {"rbx", "rbp", "r12", "r13", "r14", "r15"};

// What the trampoline below reads and writes; the offsets are written out there.
struct CallRecord {
  std::uint64_t rsp_before = 0;                         // 0
  jit::KernelFunction kernel = nullptr;                 // 8
  const std::int64_t* args = nullptr;                   // 16
  std::array<std::uint64_t, kRegisters> canaries = {};  // 24: set before the call
  std::array<std::uint64_t, kRegisters> after = {};     // 72
  std::uint64_t rsp_after = 0;                          // 120
  std::uint64_t flags = 0;                              // 128
  std::uint32_t mxcsr_before = 0, mxcsr_after = 0;      // 136, 140
  std::uint64_t has_xinuse = 0;                         // 144: in: whether xgetbv(1) exists
  std::uint64_t xinuse = 0;                             // 152
  std::array<std::uint64_t, 32> upper_halves = {};      // 160: ymm0 to ymm15
};
static_assert(offsetof(CallRecord, upper_halves) == 160);

}  // namespace

extern "C" {
// The record of the call that is running: after the call, no register can be trusted to hold it.
CallRecord* tilewright_call_record;
void tilewright_call_recorded(CallRecord* record);
}

asm(R"(
.intel_syntax noprefix
.text
tilewright_call_recorded:
  push rbx
  push rbp
  push r12
  push r13
  push r14
  push r15
  sub rsp, 8
  mov rax, qword ptr tilewright_call_record@GOTPCREL[rip]
  mov [rax], rdi
  mov [rdi], rsp
  stmxcsr [rdi + 136]
  .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  vpcmpeqd xmm\n, xmm\n, xmm\n
  .endr
  vzeroupper
  mov rbx, [rdi + 24]
  mov rbp, [rdi + 32]
  mov r12, [rdi + 40]
  mov r13, [rdi + 48]
  mov r14, [rdi + 56]
  mov r15, [rdi + 64]
  mov rax, [rdi + 8]
  mov rdi, [rdi + 16]
  call rax
  mov rax, qword ptr tilewright_call_record@GOTPCREL[rip]
  mov rax, [rax]
  mov [rax + 72], rbx
  mov [rax + 80], rbp
  mov [rax + 88], r12
  mov [rax + 96], r13
  mov [rax + 104], r14
  mov [rax + 112], r15
  mov [rax + 120], rsp
  mov rsp, [rax]
  pushfq
  pop rcx
  mov [rax + 128], rcx
  cld
  stmxcsr [rax + 140]
  ldmxcsr [rax + 136]
  mov r8, rax
  cmp qword ptr [r8 + 144], 0
  je 1f
  mov ecx, 1
  xgetbv
  mov [r8 + 152], eax
1:
  .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
  vextractf128 [r8 + 160 + 16 * \n], ymm\n, 1
  .endr
  vzeroupper
  add rsp, 8
  pop r15
  pop r14
  pop r13
  pop r12
  pop rbp
  pop rbx
  ret
.att_syntax
)");

namespace {

constexpr std::uint64_t kDirectionFlag = 1u << 10;
constexpr std::uint32_t kMxcsrStatus = 0x3f;  // exception flags: a kernel may set them
constexpr std::uint64_t kUpperHalvesInUse = 1u << 2;

bool has_xgetbv_1() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(0xd, 1, &a, &b, &c, &d) != 0 && (a & (1u << 2)) != 0;
}

CallRecord record_call(jit::KernelFunction kernel, const std::int64_t* args, bool xinuse) {
  static std::mutex mutex;  // tilewright_call_record is one variable
  const std::lock_guard lock(mutex);
  CallRecord record;
  record.kernel = kernel;
  record.args = args;
  record.has_xinuse = xinuse;
  for (std::size_t i = 0; i < kRegisters; ++i) record.canaries[i] = 0x5afe0000c0ffee00u + i;
  tilewright_call_recorded(&record);
  return record;
}

void return_at_once(const std::int64_t*) {}

// XINUSE is exact on some machines and always set on others: ask with a function that does nothing.
bool xinuse_is_usable() {
  static const bool usable = has_xgetbv_1() && (record_call(&return_at_once, nullptr, true).xinuse &
                                                kUpperHalvesInUse) == 0;
  return usable;
}

}  // namespace

std::string call_checked(jit::KernelFunction kernel, const std::int64_t* args) {
  const CallRecord record = record_call(kernel, args, xinuse_is_usable());
  std::string broken;
  const auto report = [&](std::string_view what) {
    broken += fmt::format("{}{}", broken.empty() ? "" : ", ", what);
  };
  for (std::size_t i = 0; i < kRegisters; ++i) {
    if (record.after[i] != record.canaries[i]) report(kNames[i]);
  }
  if (record.rsp_after != record.rsp_before) report("rsp");
  if ((record.flags & kDirectionFlag) != 0) report("direction flag");
  if (((record.mxcsr_before ^ record.mxcsr_after) & ~kMxcsrStatus) != 0) report("mxcsr");
  bool dirty = (record.xinuse & kUpperHalvesInUse) != 0;
  for (std::uint64_t half : record.upper_halves) dirty |= half != 0;
  if (dirty) report("upper halves (vzeroupper)");
  return broken;
}

}  // namespace tilewright::testing
