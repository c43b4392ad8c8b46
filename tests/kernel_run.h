// Runs a kernel's VIR in a test: by the interpreter, or as machine code where the host can.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "jit/code_memory.h"
#include "jit/emit.h"
#include "jit/vir/vir.h"
#include "kernel_harness.h"

namespace tilewright {

enum class Engine : std::uint8_t { interpreter, machine };

// A rung with that many lanes; a higher one does not change the code.
inline Target target_with_lanes(int lanes) {
  return Target::for_rung(lanes == 16 ? "amx_bf16" : "avx2").value();
}

inline bool host_runs(int lanes) {
  return Target::host().has(lanes == 16 ? Isa::avx512 : Isa::avx2);
}

// The engines that this host has for that many lanes.
inline std::vector<Engine> engines(int lanes) {
  if (host_runs(lanes)) return {Engine::interpreter, Engine::machine};
  return {Engine::interpreter};
}

inline std::string_view name(Engine engine) {
  return engine == Engine::machine ? "machine code" : "interpreter";
}

// Every number of lanes with every engine that this host has for it: a test's parameters.
struct Machine {
  int lanes;
  Engine engine;
};

inline std::vector<Machine> machines() {
  std::vector<Machine> result;
  for (int lanes : {8, 16}) {
    for (Engine engine : engines(lanes)) result.push_back({lanes, engine});
  }
  return result;
}

inline std::string machine_name(const ::testing::TestParamInfo<Machine>& info) {
  const bool machine = info.param.engine == Engine::machine;
  return (machine ? "Machine" : "Interpreter") + std::to_string(info.param.lanes);
}

// Verifies, then runs, machine code with the checks of the ABI; a failure is the test's.
inline void run_kernel(Engine engine, const jit::vir::Function& function,
                       std::span<const std::int64_t> args) {
  const Status valid = jit::vir::verify(function);
  ASSERT_TRUE(valid.ok()) << function.name << ": " << valid.error().message << "\n"
                          << print(function);
  if (engine == Engine::interpreter) return jit::vir::interpret(function, args.data());
  const Result<jit::CodeObject> code = jit::emit(function, target_with_lanes(function.lanes));
  ASSERT_TRUE(code.ok()) << function.name << ": " << code.error().message;
  jit::CodeMemory memory;
  const std::array<std::span<const std::byte>, 1> bytes{code->bytes};
  const auto entries = memory.publish(bytes);
  ASSERT_TRUE(entries.ok()) << entries.error().message;
  const std::string broken = testing::call_checked(entries->front(), args.data());
  ASSERT_EQ(broken, "") << function.name;
}

}  // namespace tilewright
