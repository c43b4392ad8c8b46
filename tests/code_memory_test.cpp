// Code memory: never writable and executable at once, usable from many threads, kept over fork(),
// and a refusal by the system is a reason, not a crash.
#include "jit/code_memory.h"

#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <string>
#include <thread>

#include "kernel_harness.h"

// Linux 6.3; older headers do not have it.
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif

namespace tilewright::jit {
namespace {

// mov rax, [rdi]; mov qword ptr [rax], value; ret
std::vector<std::byte> store_code(std::int8_t value) {
  std::vector<std::byte> code;
  for (int byte : {0x48, 0x8B, 0x07, 0x48, 0xC7, 0x00, static_cast<int>(value), 0, 0, 0, 0xC3}) {
    code.push_back(static_cast<std::byte>(byte));
  }
  return code;
}

std::int64_t call(KernelFunction kernel) {
  std::int64_t result = -1;
  const std::int64_t args[] = {reinterpret_cast<std::int64_t>(&result)};
  EXPECT_EQ(testing::call_checked(kernel, args), "");
  return result;
}

// The permissions of every mapping of this process; `of` is the one that holds an address.
std::vector<std::string> permissions(const void* of = nullptr) {
  std::vector<std::string> result;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t begin = 0, end = 0;
    char flags[8] = {};
    EXPECT_EQ(std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, flags), 3);
    const auto address = reinterpret_cast<std::uintptr_t>(of);
    if (of == nullptr || (begin <= address && address < end)) result.emplace_back(flags);
  }
  return result;
}

TEST(CodeMemory, RunsWhatItPublishes) {
  CodeMemory memory;
  const auto one = store_code(1), two = store_code(2);
  const std::array<std::span<const std::byte>, 2> codes{one, two};
  const auto entries = memory.publish(codes);
  ASSERT_TRUE(entries.ok()) << entries.error().message;
  ASSERT_EQ(entries->size(), 2u);
  EXPECT_EQ(call((*entries)[0]), 1);
  EXPECT_EQ(call((*entries)[1]), 2);
  for (KernelFunction entry : *entries) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(entry) % 64, 0u);
  }
  // An earlier kernel still runs after a later batch.
  const auto three = store_code(3);
  const std::array<std::span<const std::byte>, 1> more{three};
  EXPECT_EQ(call(memory.publish(more)->front()), 3);
  EXPECT_EQ(call((*entries)[0]), 1);
}

TEST(CodeMemory, IsNeverWritableAndExecutable) {
  CodeMemory memory;
  const auto code = store_code(4);
  const std::array<std::span<const std::byte>, 1> codes{code};
  const auto entries = memory.publish(codes);
  ASSERT_TRUE(entries.ok());
  EXPECT_EQ(call(entries->front()), 4);
  const auto own = permissions(reinterpret_cast<const void*>(entries->front()));
  ASSERT_EQ(own.size(), 1u);
  EXPECT_EQ(own.front(), "r-xp");
  for (const std::string& flags : permissions()) {
    EXPECT_FALSE(flags[1] == 'w' && flags[2] == 'x') << flags;
  }
}

TEST(CodeMemoryDeathTest, CodeCannotBeWritten) {
  CodeMemory memory;
  const auto code = store_code(5);
  const std::array<std::span<const std::byte>, 1> codes{code};
  const auto entries = memory.publish(codes);
  ASSERT_TRUE(entries.ok());
  EXPECT_DEATH(*reinterpret_cast<volatile char*>(entries->front()) = 0, "");
}

TEST(CodeMemory, NothingAndEmptyKernels) {
  CodeMemory memory;
  const auto nothing = memory.publish({});
  ASSERT_TRUE(nothing.ok());
  EXPECT_TRUE(nothing->empty());
  const std::array<std::span<const std::byte>, 1> empty{};
  EXPECT_FALSE(memory.publish(empty).ok());
}

TEST(CodeMemory, LargeBatches) {
  CodeMemory memory;
  std::vector<std::vector<std::byte>> kernels;
  std::vector<std::span<const std::byte>> codes;
  for (int i = 0; i < 1000; ++i) kernels.push_back(store_code(static_cast<std::int8_t>(i % 100)));
  for (auto& kernel : kernels) kernel.resize(200, std::byte{0xCC});
  codes.assign(kernels.begin(), kernels.end());
  const auto entries = memory.publish(codes);
  ASSERT_TRUE(entries.ok());
  for (std::size_t i = 0; i < entries->size(); ++i) {
    ASSERT_EQ(call((*entries)[i]), static_cast<std::int64_t>(i % 100));
  }
}

TEST(CodeMemory, ManyThreadsPublish) {
  CodeMemory memory;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const auto code = store_code(static_cast<std::int8_t>(t));
        const std::array<std::span<const std::byte>, 1> codes{code};
        const auto entries = memory.publish(codes);
        ASSERT_TRUE(entries.ok());
        ASSERT_EQ(call(entries->front()), t);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Runs `body` in a child; returns its exit code.
template <class Body>
int in_child(Body&& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(CodeMemory, AChildKeepsTheKernels) {
  CodeMemory memory;
  const auto code = store_code(6);
  const std::array<std::span<const std::byte>, 1> codes{code};
  const auto entries = memory.publish(codes);
  ASSERT_TRUE(entries.ok());
  EXPECT_EQ(in_child([&] {
              const auto own = memory.publish(codes);
              if (!own.ok()) return 1;
              return call(entries->front()) == 6 && call(own->front()) == 6 ? 0 : 2;
            }),
            0);
}

TEST(CodeMemory, ARefusalIsAReason) {
  constexpr int kUnsupported = 77;
  const int exit_code = in_child([] {
    if (prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0) return kUnsupported;
    CodeMemory memory;
    const auto code = store_code(7);
    const std::array<std::span<const std::byte>, 1> codes{code};
    const auto entries = memory.publish(codes);
    if (entries.ok()) return 1;
    return entries.error().message.find("executable memory") != std::string::npos ? 0 : 2;
  });
  if (exit_code == kUnsupported) GTEST_SKIP() << "this kernel has no PR_SET_MDWE (Linux 6.3)";
  EXPECT_EQ(exit_code, 0);
}

}  // namespace
}  // namespace tilewright::jit
