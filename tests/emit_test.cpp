// Emitted code against the interpreter: every op, random programs that spill, and the promises of
// emit.h and assembler.h (determinism, position independence, refusals).
#include "jit/emit.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <thread>

#include "jit/code_memory.h"
#include "jit/emission.h"
#include "jit/inspect.h"
#include "jit/vir/builder.h"
#include "kernel_harness.h"
#include "vir_case.h"

namespace tilewright::jit {
namespace {

using testing::call_checked;
using testing::GuardedBuffer;
using testing::VirCase;
using testing::VirCaseResult;

Target rung(std::string_view name) { return Target::for_rung(name).value(); }
Target target_for(int lanes) { return rung(lanes == 16 ? "amx_bf16" : "avx2"); }

#define SKIP_WITHOUT_ISA(lanes)                                                      \
  if ((lanes) == 16 && !Target::host().has(Isa::avx512)) {                           \
    GTEST_SKIP() << "this host has no AVX-512; tests/python/test_avx512_machine.py " \
                    "executes these bytes";                                          \
  }

// What a kernel did to its memory, run between guard pages.
VirCaseResult run_native(const VirCase& vir_case, const CodeObject& code,
                         GuardedBuffer::Flush flush) {
  CodeMemory memory;
  const std::array<std::span<const std::byte>, 1> codes{code.bytes};
  const auto entries = memory.publish(codes);
  EXPECT_TRUE(entries.ok());
  GuardedBuffer input(vir_case.input.size(), flush), area(vir_case.area.size(), flush),
      output(vir_case.output_size, flush);
  std::memcpy(input.data(), vir_case.input.data(), input.size());
  std::memcpy(area.data(), vir_case.area.data(), area.size());
  input.protect_read_only();
  const std::int64_t args[] = {input.address(), area.address(), output.address()};
  EXPECT_EQ(call_checked(entries->front(), args), "") << vir_case.name;
  EXPECT_TRUE(area.slack_intact()) << vir_case.name;
  EXPECT_TRUE(output.slack_intact()) << vir_case.name;
  const auto bytes = [](const GuardedBuffer& buffer) {
    return std::vector<std::byte>(buffer.data(), buffer.data() + buffer.size());
  };
  return {bytes(area), bytes(output)};
}

void expect_equal(const VirCase& vir_case) {
  const Status valid = verify(vir_case.function);
  ASSERT_TRUE(valid.ok()) << valid.error().message << "\n" << print(vir_case.function);
  const Result<CodeObject> code = emit(vir_case.function, target_for(vir_case.function.lanes));
  ASSERT_TRUE(code.ok()) << code.error().message;
  const VirCaseResult expected = interpret_case(vir_case);
  for (auto flush : {GuardedBuffer::Flush::end, GuardedBuffer::Flush::start}) {
    const std::string found = difference(vir_case, expected, run_native(vir_case, *code, flush));
    ASSERT_EQ(found, "") << vir_case.name << "\n" << print(vir_case.function);
  }
}

class EveryOp : public ::testing::TestWithParam<int> {};

TEST_P(EveryOp, DoesWhatTheInterpreterDoes) {
  SKIP_WITHOUT_ISA(GetParam());
  const Target& host = Target::host();
  for (const VirCase& vir_case : testing::op_cases(GetParam(), 4)) {
    if (vir_case.name.starts_with("vdpbf16") && !host.has(Isa::avx512_bf16)) continue;
    if (vir_case.name.starts_with("vdpbytes") && !host.has(Isa::avx512_vnni)) continue;
    if (vir_case.function.tile_count > 0 && !host.has(Isa::amx_bf16)) continue;
    expect_equal(vir_case);
    if (HasFatalFailure()) return;
  }
}

TEST_P(EveryOp, CasesCoverTheTable) {
  const std::vector<VirCase> cases = testing::op_cases(GetParam(), 1);
  const auto covered = [&](std::string_view op) {
    return std::any_of(cases.begin(), cases.end(), [&](const VirCase& vir_case) {
      const auto& code = vir_case.function.code;
      return std::any_of(code.begin(), code.end(),
                         [&](const auto& in) { return vir::op_name(in.op) == op; }) &&
             vir_case.name.starts_with(op);
    });
  };
#define VIR_OP(name, signature)                                                             \
  {                                                                                         \
    const std::string_view op = vir::op_name(vir::Op::name);                                \
    const bool structure = op == "loop" || op == "endloop" || op == "if" || op == "else" || \
                           op == "endif" || op == "garg";                                   \
    const bool wide_only = op == "vscalef" || op.starts_with("vdp") || op.starts_with('t'); \
    if (!structure && (GetParam() == 16 || !wide_only)) {                                   \
      EXPECT_TRUE(covered(op)) << op;                                                       \
    }                                                                                       \
  }
#include "jit/vir/op_list.def"
#undef VIR_OP
}

TEST_P(EveryOp, RandomProgramsWithoutPressure) {
  SKIP_WITHOUT_ISA(GetParam());
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    expect_equal(testing::random_program(seed, GetParam(), 3, 40));
    if (HasFatalFailure()) return;
  }
}

TEST_P(EveryOp, RandomProgramsThatSpill) {
  SKIP_WITHOUT_ISA(GetParam());
  for (std::uint64_t seed = 1000; seed < 1300; ++seed) {
    const VirCase vir_case = testing::random_program(seed, GetParam(), 40, 200);
    const Result<CodeObject> code = emit(vir_case.function, target_for(GetParam()));
    ASSERT_TRUE(code.ok()) << code.error().message;
    EXPECT_GT(code->spills, 40);
    expect_equal(vir_case);
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Lanes, EveryOp, ::testing::Values(8, 16),
                         [](const auto& info) { return info.param == 16 ? "16" : "8"; });

// --- loops and ifs, counted

// Counts how often a loop of `n` runs, with an if on the way.
TEST(Structure, LoopsAndIfs) {
  vir::Builder b("count", 8, 3);
  const vir::Reg n = b.arg(0), odd = b.arg(1), out = b.arg(2);
  const vir::Reg count = b.constant(0), branches = b.constant(0);
  b.loop(n, [&] {
    b.add_to(count, 1);
    b.if_nonzero(
        odd, [&] { b.add_to(branches, 10); }, [&] { b.add_to(branches, 1); });
  });
  b.store_gpr(vir::Element::i64, b.at(out), count);
  b.store_gpr(vir::Element::i64, b.at(out, 8), branches);
  b.store_gpr(vir::Element::i64, b.at(out, 16), n);
  const Result<CodeObject> code = emit(std::move(b).finish(), rung("avx2"));
  ASSERT_TRUE(code.ok()) << code.error().message;
  CodeMemory memory;
  const std::array<std::span<const std::byte>, 1> codes{code->bytes};
  const auto entries = memory.publish(codes);
  ASSERT_TRUE(entries.ok());
  for (std::int64_t n_value : {-5, 0, 1, 7}) {
    for (std::int64_t odd_value : {0, 1}) {
      std::int64_t results[3] = {-1, -1, -1};
      const std::int64_t args[] = {n_value, odd_value, reinterpret_cast<std::int64_t>(results)};
      EXPECT_EQ(call_checked(entries->front(), args), "");
      const std::int64_t runs = std::max<std::int64_t>(n_value, 0);
      EXPECT_EQ(results[0], runs);
      EXPECT_EQ(results[1], runs * (odd_value != 0 ? 10 : 1));
      EXPECT_EQ(results[2], std::min<std::int64_t>(n_value, 0));
    }
  }
}

// --- determinism

std::vector<std::byte> emit_bytes(const vir::Function& function) {
  Result<CodeObject> code = emit(function, target_for(function.lanes));
  EXPECT_TRUE(code.ok());
  return std::move(code->bytes);
}

std::vector<vir::Function> sample_functions() {
  std::vector<vir::Function> functions;
  for (int lanes : {8, 16}) {
    for (VirCase& vir_case : testing::op_cases(lanes, 1)) {
      functions.push_back(std::move(vir_case.function));
    }
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      functions.push_back(testing::random_program(seed, lanes, 40, 300).function);
    }
  }
  return functions;
}

TEST(Determinism, BytesDoNotDependOnTheBase) {
  constexpr std::size_t kSize = 1 << 20;
  const auto map = [&](std::uintptr_t hint) {
    void* address = mmap(reinterpret_cast<void*>(hint), kSize, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    EXPECT_NE(address, MAP_FAILED);
    return std::span<std::byte>(static_cast<std::byte*>(address), kSize);
  };
  const std::span<std::byte> low = map(0x10000000), high = map(0x7e1234567000);
  for (const vir::Function& function : sample_functions()) {
    const Target target = target_for(function.lanes);
    const auto first = emission::emit_in(function, target, low);
    const auto second = emission::emit_in(function, target, high);
    ASSERT_TRUE(first.ok() && second.ok());
    ASSERT_EQ(first->bytes, second->bytes) << print(function);
    ASSERT_EQ(first->bytes, emit_bytes(function)) << print(function);
  }
  munmap(low.data(), kSize);
  munmap(high.data(), kSize);
}

TEST(Determinism, ThreadsEmitTheSameBytes) {
  const std::vector<vir::Function> functions = sample_functions();
  std::vector<std::vector<std::byte>> results[2];
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (const vir::Function& function : functions) result.push_back(emit_bytes(function));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(results[0], results[1]);
}

// This program again (see main), with its own address space layout: a hash of all sample bytes.
std::string bytes_hash() {
  std::uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const vir::Function& function : sample_functions()) {
    for (std::byte byte : emit_bytes(function)) {
      hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3u;
    }
  }
  return std::to_string(hash);
}

TEST(Determinism, ProcessesEmitTheSameBytes) {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  ASSERT_GT(length, 0);
  const std::string command = std::string(path, static_cast<std::size_t>(length)) + " --bytes-hash";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  char text[64] = {};
  ASSERT_NE(fgets(text, sizeof text, pipe), nullptr);
  EXPECT_EQ(pclose(pipe), 0);
  EXPECT_EQ(std::string(text), bytes_hash() + "\n");
}

// --- refusals

vir::Function dot_function(bool bytes = false) {
  vir::Builder b("dot", 16, 0);
  const vir::Reg w = b.zero(), a = b.zero();
  bytes ? b.dot_bytes(w, a, a) : b.dot_bf16(w, a, a);
  return std::move(b).finish();
}

TEST(Refusals, NameTheIsa) {
  const Result<CodeObject> wide = emit(dot_function(), rung("avx2"));
  ASSERT_FALSE(wide.ok());
  EXPECT_NE(wide.error().message.find("avx512"), std::string::npos) << wide.error().message;
  const Result<CodeObject> dot = emit(dot_function(), rung("avx512"));
  ASSERT_FALSE(dot.ok());
  EXPECT_NE(dot.error().message.find("avx512_bf16"), std::string::npos) << dot.error().message;
  EXPECT_TRUE(emit(dot_function(), rung("avx512_bf16")).ok());
  const Result<CodeObject> bytes = emit(dot_function(true), rung("avx512"));
  ASSERT_FALSE(bytes.ok());
  EXPECT_NE(bytes.error().message.find("avx512_vnni"), std::string::npos) << bytes.error().message;
  EXPECT_TRUE(emit(dot_function(true), rung("avx512_vnni")).ok());
}

vir::Function tile_function(int tiles) {
  vir::Builder b("tiles", 16, 1);
  const vir::Reg memory = b.arg(0), stride = b.constant(64);
  b.save_tiles(b.at(memory));
  b.configure_tiles();
  std::vector<vir::Reg> zeros;
  for (int i = 0; i < tiles; ++i) zeros.push_back(b.tile_zero());
  for (vir::Reg zero : zeros) b.tile_store(b.at(memory, 64), stride, zero);
  b.restore_tiles(b.at(memory));
  return std::move(b).finish();
}

TEST(Refusals, TilesAreNotSpilled) {
  EXPECT_TRUE(emit(tile_function(8), rung("amx_bf16")).ok());
  const Result<CodeObject> nine = emit(tile_function(9), rung("amx_bf16"));
  ASSERT_FALSE(nine.ok());
  EXPECT_EQ(nine.error().message, "emit tiles: it needs more than 8 tiles");
  const Result<CodeObject> lower = emit(tile_function(1), rung("avx512_fp16"));
  ASSERT_FALSE(lower.ok());
  EXPECT_NE(lower.error().message.find("amx_bf16"), std::string::npos) << lower.error().message;
}

TEST(Refusals, InvalidFunctions) {
  vir::Function function;
  function.name = "bad";
  function.gpr_count = 1;
  function.code.push_back(
      {.op = vir::Op::gmov, .dst = {vir::Kind::gpr, 0}, .src = {}, .address = {}});
  EXPECT_FALSE(emit(function, rung("avx2")).ok());
}

TEST(RequiredIsa, IsWhatWasEmitted) {
  const auto isa_of = [](const vir::Function& function) {
    return emit(function, rung("amx_int8")).value().required_isa;
  };
  vir::Builder scalar("scalar", 16, 1);
  scalar.arg(0);
  EXPECT_EQ(isa_of(std::move(scalar).finish()), 0u);
  vir::Builder narrow("narrow", 8, 0);
  narrow.splat(1.0f);
  EXPECT_EQ(isa_of(std::move(narrow).finish()), bit(Isa::avx2));
  vir::Builder wide("wide", 16, 0);
  wide.splat(1.0f);
  EXPECT_EQ(isa_of(std::move(wide).finish()), bit(Isa::avx2) | bit(Isa::avx512));
  EXPECT_EQ(isa_of(dot_function()), bit(Isa::avx2) | bit(Isa::avx512) | bit(Isa::avx512_bf16));
  EXPECT_EQ(isa_of(dot_function(true)), bit(Isa::avx2) | bit(Isa::avx512) | bit(Isa::avx512_vnni));
  EXPECT_EQ(isa_of(tile_function(1)), bit(Isa::amx_bf16));
}

TEST(BigFunctions, GrowTheBuffer) {
  vir::Builder b("big", 8, 1);
  const vir::Reg sum = b.arg(0);
  for (int i = 0; i < 30000; ++i) b.add_to(sum, 1000 + i);
  const Result<CodeObject> code = emit(std::move(b).finish(), rung("avx2"));
  ASSERT_TRUE(code.ok()) << code.error().message;
  EXPECT_GT(code->code_size, 64u << 10);
}

// --- what is not spilled

// A 4 x 3 block of accumulators with a broadcast and three panels uses 16 vectors exactly.
TEST(Spills, AGemmBlockHasNone) {
  vir::Builder b("block", 8, 4);
  const vir::Reg a = b.arg(0), panel = b.arg(1), k = b.arg(2), y = b.arg(3);
  std::vector<vir::Reg> accumulators;
  for (int i = 0; i < 12; ++i) accumulators.push_back(b.zero());
  b.loop(k, [&] {
    std::vector<vir::Reg> columns;
    for (int j = 0; j < 3; ++j) columns.push_back(b.load(vir::Element::f32, b.at(panel, 32 * j)));
    for (int i = 0; i < 4; ++i) {
      const vir::Reg x = b.broadcast(vir::Element::f32, b.at(a, 4 * i));
      for (std::size_t j = 0; j < 3; ++j) {
        b.fma(accumulators[3 * static_cast<std::size_t>(i) + j], x, columns[j]);
      }
    }
    b.add_to(a, 16);
    b.add_to(panel, 96);
  });
  for (int i = 0; i < 12; ++i) {
    b.store(vir::Element::f32, b.at(y, 32 * i), accumulators[static_cast<std::size_t>(i)]);
  }
  const Result<CodeObject> code = emit(std::move(b).finish(), rung("avx2"));
  ASSERT_TRUE(code.ok());
  EXPECT_EQ(code->spills, 0);
  EXPECT_EQ(code->inner_loop_spills, 0);
}

// --- the harness finds what it is there to find

std::string broken_by(std::initializer_list<int> code) {
  std::vector<std::byte> bytes;
  for (int byte : code) bytes.push_back(static_cast<std::byte>(byte));
  CodeMemory memory;
  const std::array<std::span<const std::byte>, 1> codes{bytes};
  return call_checked(memory.publish(codes)->front(), nullptr);
}

TEST(Harness, FindsBrokenPromises) {
  EXPECT_EQ(broken_by({0xC3}), "");
  EXPECT_EQ(broken_by({0x31, 0xDB, 0xC3}), "rbx");                          // xor ebx, ebx
  EXPECT_EQ(broken_by({0x31, 0xED, 0xC3}), "rbp");                          // xor ebp, ebp
  EXPECT_EQ(broken_by({0x45, 0x31, 0xE4, 0xC3}), "r12");                    // xor r12d, r12d
  EXPECT_EQ(broken_by({0x45, 0x31, 0xFF, 0xC3}), "r15");                    // xor r15d, r15d
  EXPECT_EQ(broken_by({0x58, 0x48, 0x83, 0xEC, 0x08, 0x50, 0xC3}), "rsp");  // returns 8 too low
  EXPECT_EQ(broken_by({0xFD, 0xC3}), "direction flag");                     // std
  // push 0x9f80; ldmxcsr [rsp]; pop rax: flushes denormals
  EXPECT_EQ(broken_by({0x68, 0x80, 0x9F, 0, 0, 0x0F, 0xAE, 0x14, 0x24, 0x58, 0xC3}), "mxcsr");
  // vcmpps ymm0, ymm0, ymm0, true: all ones, and no vzeroupper
  EXPECT_EQ(broken_by({0xC5, 0xFC, 0xC2, 0xC0, 0x0F, 0xC3}), "upper halves (vzeroupper)");
}

TEST(HarnessDeathTest, OperandsAreGuarded) {
  GuardedBuffer at_end(5), at_start(5, GuardedBuffer::Flush::start);
  EXPECT_DEATH(const_cast<volatile std::byte*>(at_end.data())[5] = std::byte{1}, "");
  EXPECT_DEATH(const_cast<volatile std::byte*>(at_start.data())[-1] = std::byte{1}, "");
  EXPECT_TRUE(at_end.slack_intact());
  at_end.data()[-1] = std::byte{0};
  EXPECT_FALSE(at_end.slack_intact());
}

// --- inspection

TEST(Disassemble, NamesLabelsAndConstants) {
  vir::Builder b("axpy", 8, 3);
  const vir::Reg x = b.arg(0), n = b.arg(2);
  const vir::Reg c = b.splat(2.5f);
  b.loop(n, [&] {
    b.store(vir::Element::f32, b.at(x), c);
    b.add_to(x, 32);
  });
  const CodeObject code = emit(std::move(b).finish(), rung("avx2")).value();
  const Result<std::string> text = disassemble(std::span(code.bytes).first(code.code_size));
  ASSERT_TRUE(text.ok()) << text.error().message;
  EXPECT_TRUE(text->starts_with("endbr64\n")) << *text;
  EXPECT_NE(text->find("vbroadcastss ymm0,DWORD PTR [0x40]\n"), std::string::npos) << *text;
  EXPECT_NE(text->find("L0:\n"), std::string::npos) << *text;
  EXPECT_NE(text->find("jg L0\n"), std::string::npos) << *text;
  EXPECT_NE(text->find("jle L1\n"), std::string::npos) << *text;
}

TEST(PerfMap, AppendsALine) {
  const std::string path = "/tmp/perf-" + std::to_string(getpid()) + ".map";
  unlink(path.c_str());
  ASSERT_TRUE(write_perf_map("kernel one", &path, 64).ok());
  ASSERT_TRUE(write_perf_map("kernel two", &path, 32).ok());
  FILE* file = fopen(path.c_str(), "r");
  ASSERT_NE(file, nullptr);
  char text[256] = {};
  const std::size_t size = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  EXPECT_GT(size, 0u);
  EXPECT_NE(std::string(text).find(" 40 kernel one\n"), std::string::npos) << text;
  EXPECT_NE(std::string(text).find(" 20 kernel two\n"), std::string::npos) << text;
  unlink(path.c_str());
  // Never through a link that somebody else put there.
  ASSERT_EQ(symlink("/tmp/tilewright-no-such-file", path.c_str()), 0);
  EXPECT_FALSE(write_perf_map("kernel", &path, 64).ok());
  unlink(path.c_str());
}

}  // namespace
}  // namespace tilewright::jit

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--bytes-hash") {
    std::puts(tilewright::jit::bytes_hash().c_str());
    return 0;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
