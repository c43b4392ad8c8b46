// emit_dump: emitted bytes for tools that are not C++, one JSON object per line.
//
//   emit_dump files RUNG FILE...        each VIR file, emitted for the rung
//   emit_dump cases LANES ROUNDS        every case of vir_case.h, with memory before and after
//   emit_dump random LANES COUNT REGISTERS   random programs, likewise
//
// Fields: name, rung, isa (what the code declares to need), code (hex: instructions, then padding
// and constants), code_size (of the instructions), spills; for cases input, area, output_size,
// expected_area, expected_output, float_result. Tested by tests/python/test_isa_escape.py and
// test_avx512_machine.py, which read it.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <string_view>

#include "jit/emit.h"
#include "vir_case.h"

namespace tilewright {
namespace {

[[noreturn]] void fail(std::string_view message) {
  fmt::print(stderr, "emit_dump: {}\n", message);
  std::exit(2);
}

std::string hex(std::span<const std::byte> bytes) {
  std::string text;
  for (std::byte byte : bytes) text += fmt::format("{:02x}", static_cast<unsigned>(byte));
  return text;
}

// The members of the object that describe the code.
std::string code_members(const jit::vir::Function& function, std::string_view rung) {
  const Result<Target> target = Target::for_rung(rung);
  if (!target.ok()) fail(target.error().message);
  const Result<jit::CodeObject> code = jit::emit(function, *target);
  if (!code.ok()) fail(code.error().message);
  return fmt::format(
      R"("name": "{}", "rung": "{}", "isa": "{}", "code": "{}", "code_size": {}, "spills": {})",
      code->name, rung, isa_mask_name(code->required_isa), hex(code->bytes), code->code_size,
      code->spills);
}

void dump_case(const testing::VirCase& vir_case) {
  const testing::VirCaseResult expected = testing::interpret_case(vir_case);
  const char* rung = vir_case.function.lanes == 16 ? "amx_bf16" : "avx2";
  fmt::print(R"({{{}, "input": "{}", "area": "{}", "output_size": {}, "expected_area": "{}", )"
             R"("expected_output": "{}", "float_result": {}}})"
             "\n",
             code_members(vir_case.function, rung), hex(vir_case.input), hex(vir_case.area),
             vir_case.output_size, hex(expected.area), hex(expected.output), vir_case.float_result);
}

void dump_file(const char* path, std::string_view rung) {
  std::ifstream stream(path);
  if (!stream) fail(fmt::format("cannot read {}", path));
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  const Result<jit::vir::Function> function = jit::vir::parse(text);
  if (!function.ok()) fail(fmt::format("{}: {}", path, function.error().message));
  fmt::print("{{{}}}\n", code_members(*function, rung));
}

int run(std::span<char*> args) {
  const std::string_view command = args.size() > 1 ? args[1] : "";
  if (command == "files" && args.size() > 2) {
    for (char* path : args.subspan(3)) dump_file(path, args[2]);
    return 0;
  }
  if (command == "cases" && args.size() == 4) {
    for (const auto& vir_case : testing::op_cases(std::atoi(args[2]), std::atoi(args[3]))) {
      dump_case(vir_case);
    }
    return 0;
  }
  if (command == "random" && args.size() == 5) {
    for (int seed = 0; seed < std::atoi(args[3]); ++seed) {
      dump_case(testing::random_program(static_cast<std::uint64_t>(seed), std::atoi(args[2]),
                                        std::atoi(args[4]), 100));
    }
    return 0;
  }
  fail("usage: files RUNG FILE... | cases LANES ROUNDS | random LANES COUNT REGISTERS");
}

}  // namespace
}  // namespace tilewright

int main(int argc, char** argv) { return tilewright::run({argv, static_cast<std::size_t>(argc)}); }
