// Tests of jit/base: Result, the ISA ladder and probe, the environment table, the log.
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "jit/base/cpu_features.h"
#include "jit/base/env.h"
#include "jit/base/log.h"
#include "jit/base/result.h"
#include "jit/base/round_up.h"
#include "jit/base/target.h"

namespace tilewright {
namespace {

TEST(RoundUp, GivesTheNextMultiple) {
  static_assert(round_up(0, 64) == 0 && round_up(1, 64) == 64 && round_up(64, 64) == 64);
  static_assert(round_up(std::int64_t{1} << 40, 3) % 3 == 0);
  EXPECT_EQ(round_up(std::size_t{65}, 64), 128u);
}

TEST(Result, HoldsAValueOrAnError) {
  Result<std::unique_ptr<int>> good = std::make_unique<int>(3);
  ASSERT_TRUE(good.ok());
  EXPECT_EQ(**good, 3);
  const std::unique_ptr<int> moved = std::move(good).value();
  EXPECT_EQ(*moved, 3);
  const Result<int> bad = Error{"why"};
  EXPECT_FALSE(bad);
  EXPECT_EQ(bad.error().message, "why");
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(Status(Error{"why"}).error().message, "why");
}

// --- the probe: feature words written down from the manuals' bit positions, CPU by CPU.

constexpr std::uint32_t bits(std::initializer_list<int> positions) {
  std::uint32_t word = 0;
  for (int position : positions) word |= 1u << position;
  return word;
}

CpuFeatureWords zen3() {
  CpuFeatureWords w;
  w.leaf1_ecx = bits({12 /*FMA*/, 27 /*OSXSAVE*/, 28 /*AVX*/, 29 /*F16C*/});
  w.leaf7_ebx = bits({3 /*BMI1*/, 5 /*AVX2*/, 8 /*BMI2*/});
  w.xcr0 = 0x7;
  return w;
}

CpuFeatureWords skylake_server() {
  CpuFeatureWords w = zen3();
  w.leaf7_ebx |= bits({16 /*F*/, 17 /*DQ*/, 28 /*CD*/, 30 /*BW*/, 31 /*VL*/});
  w.xcr0 = 0xe7;
  return w;
}

CpuFeatureWords sapphire_rapids() {
  CpuFeatureWords w = skylake_server();
  w.leaf7_ecx |= bits({11 /*VNNI*/});
  w.leaf7_edx |= bits({22 /*AMX-BF16*/, 23 /*FP16*/, 24 /*AMX-TILE*/, 25 /*AMX-INT8*/});
  w.leaf7_1_eax |= bits({4 /*AVX-VNNI*/, 5 /*BF16*/});
  w.xcr0 = 0x600e7;
  w.amx_permitted = true;
  return w;
}

IsaMask rung(std::string_view name) { return Target::ladder(name).value(); }

TEST(CpuProbe, KnowsRealCpus) {
  EXPECT_EQ(isa_from({}), 0u);
  EXPECT_EQ(isa_mask_name(isa_from(zen3())), "avx2");
  EXPECT_EQ(isa_mask_name(isa_from(skylake_server())), "avx2+avx512");
  EXPECT_EQ(isa_from(sapphire_rapids()), rung("amx_int8"));

  CpuFeatureWords alder_lake = zen3();
  alder_lake.leaf7_1_eax = bits({4});
  EXPECT_EQ(isa_mask_name(isa_from(alder_lake)), "avx2+avx_vnni");

  CpuFeatureWords granite_rapids = sapphire_rapids();
  granite_rapids.leaf7_1_eax |= bits({21 /*AMX-FP16*/});
  EXPECT_EQ(isa_from(granite_rapids), rung("amx_fp16"));

  CpuFeatureWords zen4 = skylake_server();
  zen4.leaf7_ecx = bits({11});
  zen4.leaf7_1_eax = bits({5});
  EXPECT_EQ(isa_mask_name(isa_from(zen4)), "avx2+avx512+avx512_vnni+avx512_bf16");
}

TEST(CpuProbe, EveryPartOfTheFloorIsNeeded) {
  for (int position : {12, 27, 28, 29}) {
    CpuFeatureWords w = sapphire_rapids();
    w.leaf1_ecx &= ~bits({position});
    EXPECT_EQ(isa_from(w), 0u) << "leaf 1 ecx bit " << position;
  }
  for (int position : {3, 5, 8}) {
    CpuFeatureWords w = sapphire_rapids();
    w.leaf7_ebx &= ~bits({position});
    EXPECT_EQ(isa_from(w), 0u) << "leaf 7 ebx bit " << position;
  }
  CpuFeatureWords no_ymm = sapphire_rapids();
  no_ymm.xcr0 = 0x3;
  EXPECT_EQ(isa_from(no_ymm), 0u);
}

TEST(CpuProbe, TheSystemMustSaveTheRegisters) {
  CpuFeatureWords no_zmm = sapphire_rapids();
  no_zmm.xcr0 = 0x60007;
  EXPECT_EQ(isa_mask_name(isa_from(no_zmm)), "avx2+avx_vnni");

  CpuFeatureWords no_tiles = sapphire_rapids();
  no_tiles.xcr0 = 0xe7;
  EXPECT_EQ(isa_from(no_tiles), rung("avx512_fp16"));

  CpuFeatureWords no_permission = sapphire_rapids();
  no_permission.amx_permitted = false;
  EXPECT_EQ(isa_from(no_permission), rung("avx512_fp16"));

  CpuFeatureWords no_vl = sapphire_rapids();  // Knights Landing has F without VL
  no_vl.leaf7_ebx &= ~bits({31});
  EXPECT_EQ(isa_mask_name(isa_from(no_vl)), "avx2+avx_vnni");
}

TEST(Target, LadderIncludesTheEarlierRungs) {
  const std::vector<std::string_view> names = {"avx2",        "avx_vnni",    "avx512",
                                               "avx512_vnni", "avx512_bf16", "avx512_fp16",
                                               "amx_bf16",    "amx_int8",    "amx_fp16"};
  IsaMask previous = 0;
  for (std::string_view name : names) {
    const IsaMask mask = rung(name);
    EXPECT_EQ(mask & previous, previous) << name;
    EXPECT_EQ(__builtin_popcount(mask), __builtin_popcount(previous) + 1) << name;
    previous = mask;
  }
  EXPECT_EQ(isa_mask_name(rung("avx512")), "avx2+avx_vnni+avx512");
  EXPECT_EQ(isa_mask_name(0), "none");
}

// CPUs with AVX-512 have AVX-VNNI or not; their code is the same, so kernels must be, too.
TEST(Target, CodeForAvx512DoesNotDependOnAvxVnni) {
  const auto code_isa = [](IsaMask isa) {
    Target target;
    target.isa = isa;
    return target.for_code().isa;
  };
  EXPECT_EQ(code_isa(rung("avx512_bf16")), rung("avx512_bf16") & ~bit(Isa::avx_vnni));
  EXPECT_EQ(code_isa(rung("avx512_bf16") & ~bit(Isa::avx_vnni)), code_isa(rung("avx512_bf16")));
  EXPECT_EQ(code_isa(rung("avx_vnni")), rung("avx_vnni"));
}

TEST(Target, LadderTakesOneDnnSpellings) {
  EXPECT_EQ(rung("avx2_vnni"), rung("avx_vnni"));
  EXPECT_EQ(rung("AVX512_CORE"), rung("avx512"));
  EXPECT_EQ(rung("avx512_core_vnni"), rung("avx512_vnni"));
  EXPECT_EQ(rung("avx512_core_bf16"), rung("avx512_bf16"));
  EXPECT_EQ(rung("avx512_core_fp16"), rung("avx512_fp16"));
  EXPECT_EQ(rung("avx512_core_amx"), rung("amx_int8"));
  EXPECT_EQ(rung("avx512_core_amx_fp16"), rung("amx_fp16"));
  EXPECT_EQ(rung("all"), rung("amx_fp16"));
}

TEST(Target, UnknownRungNamesTheValidOnes) {
  for (std::string_view wrong : {"", "nonsense", "avx", "avx2 "}) {
    const Result<IsaMask> result = Target::ladder(wrong);
    ASSERT_FALSE(result.ok()) << wrong;
    EXPECT_NE(result.error().message.find("avx512_bf16"), std::string::npos);
  }
  EXPECT_FALSE(Target::host().capped("nonsense").ok());
  EXPECT_FALSE(Target::for_rung("nonsense").ok());
}

TEST(Target, CapNeverAddsAndForRungNeverAsksTheHost) {
  Target skylake;
  skylake.isa = isa_from(skylake_server());
  EXPECT_EQ(skylake.capped("avx2")->isa, bit(Isa::avx2));
  EXPECT_EQ(skylake.capped("amx_fp16")->isa, skylake.isa);
  EXPECT_EQ(skylake.capped("avx2")->lanes(), 8);
  EXPECT_EQ(skylake.lanes(), 16);
  EXPECT_EQ(Target::for_rung("avx512_bf16")->isa, rung("avx512_bf16"));
  EXPECT_EQ(Target::for_rung("amx_int8")->isa, rung("amx_int8"));
}

TEST(Target, HostIsPlausible) {
  const Target& host = Target::host();
  EXPECT_FALSE(host.cpu.vendor.empty());
  EXPECT_GE(host.cores, 1);
  EXPECT_GE(host.l1d_bytes, 8 << 10);
  EXPECT_LE(host.l1d_bytes, 1 << 20);
  EXPECT_GE(host.l2_bytes, 128 << 10);
  // The compiler's own probe is the second opinion.
  EXPECT_EQ(host.has(Isa::avx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  EXPECT_EQ(host.has(Isa::avx512),
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
}

// --- the environment

Environment parse(const std::map<std::string, std::string>& values) {
  return parse_environment([&](const char* name) -> const char* {
    const auto found = values.find(name);
    return found == values.end() ? nullptr : found->second.c_str();
  });
}

TEST(Environment, DefaultsHold) {
  const Environment e = parse({});
  EXPECT_TRUE(e.problems.empty());
  EXPECT_EQ(e.max_cpu_isa, "all");
  EXPECT_EQ(e.cache, CacheMode::read_write);
  EXPECT_EQ(e.cache_dir, "");
  EXPECT_EQ(e.cache_max_bytes, std::uint64_t{8} << 30);
  EXPECT_EQ(e.num_threads, 0);
  EXPECT_EQ(e.pass_limit, -1);
  EXPECT_TRUE(e.dump.empty());
  EXPECT_TRUE(e.disable.empty());
  EXPECT_FALSE(e.strict);
}

TEST(Environment, EveryVariableIsRead) {
  const Environment e = parse({{"TILEWRIGHT_MAX_CPU_ISA", "avx512_core_bf16"},
                               {"TILEWRIGHT_CACHE", "ro"},
                               {"TILEWRIGHT_CACHE_DIR", "/a"},
                               {"TILEWRIGHT_CACHE_MAX_SIZE", "3M"},
                               {"TILEWRIGHT_CACHE_CHECK", "1"},
                               {"TILEWRIGHT_CACHE_PACK", "/p"},
                               {"TILEWRIGHT_NUM_THREADS", "7"},
                               {"TILEWRIGHT_VERBOSE", "2"},
                               {"TILEWRIGHT_DUMP", "vir,code"},
                               {"TILEWRIGHT_DUMP_DIR", "/d"},
                               {"TILEWRIGHT_JIT_PROFILE", "perf"},
                               {"TILEWRIGHT_STRICT", "1"},
                               {"TILEWRIGHT_DISABLE", "linear,norm"},
                               {"TILEWRIGHT_FALLBACK", "onednn"},
                               {"TILEWRIGHT_PASS_LIMIT", "4"},
                               {"TILEWRIGHT_WEIGHTS", "exact"},
                               {"TILEWRIGHT_PACKING", "first"},
                               {"TILEWRIGHT_FP32", "amx"},
                               {"TILEWRIGHT_KV_CACHE", "int8"},
                               {"TILEWRIGHT_PROFILE", "/m.json"},
                               {"TILEWRIGHT_RUN_DTYPE", "bfloat16"}});
  EXPECT_TRUE(e.problems.empty());
  EXPECT_EQ(e.max_cpu_isa, "avx512_core_bf16");
  EXPECT_EQ(e.cache, CacheMode::read_only);
  EXPECT_EQ(e.cache_dir, "/a");
  EXPECT_EQ(e.cache_max_bytes, 3u << 20);
  EXPECT_TRUE(e.cache_check);
  EXPECT_EQ(e.cache_pack, "/p");
  EXPECT_EQ(e.num_threads, 7);
  EXPECT_EQ(e.verbose, 2);
  EXPECT_TRUE(e.dump.contains("vir"));
  EXPECT_FALSE(e.dump.contains("graph"));
  EXPECT_EQ(e.dump_dir, "/d");
  EXPECT_EQ(e.jit_profile, JitProfile::perf);
  EXPECT_TRUE(e.strict);
  EXPECT_TRUE(e.disable.contains("norm"));
  EXPECT_FALSE(e.disable.contains("softmax"));
  EXPECT_EQ(e.fallback, Fallback::onednn);
  EXPECT_EQ(e.pass_limit, 4);
  EXPECT_EQ(e.weights, WeightMode::exact);
  EXPECT_EQ(e.packing, Packing::first);
  EXPECT_EQ(e.fp32, Fp32Mode::amx);
  EXPECT_EQ(e.kv_cache, KvCacheMode::int8);
  EXPECT_EQ(e.machine_profile, "/m.json");
  EXPECT_EQ(e.run_dtype, "bfloat16");
  EXPECT_TRUE(parse({{"TILEWRIGHT_DISABLE", "1"}}).disable.contains("anything"));
}

TEST(Environment, ABadValueIsAProblemAndTheDefaultHolds) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"MAX_CPU_ISA", "nonsense"},
      {"CACHE", "yes"},
      {"CACHE_MAX_SIZE", "1T"},
      {"CACHE_MAX_SIZE", "G"},
      {"CACHE_MAX_SIZE", "-1"},
      {"CACHE_MAX_SIZE", "99999999999999999999"},
      {"CACHE_CHECK", "true"},
      {"NUM_THREADS", "-1"},
      {"NUM_THREADS", "2x"},
      {"NUM_THREADS", "100000"},
      {"VERBOSE", "3"},
      {"DUMP", "graphs"},
      {"DUMP", "vir,,code"},
      {"JIT_PROFILE", "gprof"},
      {"STRICT", "2"},
      {"FALLBACK", "mkl"},
      {"PASS_LIMIT", "-2"},
      {"WEIGHTS", "int8"},
      {"PACKING", "never"},
      {"FP32", "tf32"},
      {"KV_CACHE", "bf16"},
      {"PROFILE", "profile.json"},
      {"RUN_DTYPE", "int8"},
  };
  for (const auto& [name, value] : cases) {
    const Environment e = parse({{"TILEWRIGHT_" + name, value}});
    ASSERT_EQ(e.problems.size(), 1u) << name << "=" << value;
    EXPECT_NE(e.problems[0].find("TILEWRIGHT_" + name + "=" + value), std::string::npos);
    Environment defaults = parse({});
    EXPECT_EQ(e.max_cpu_isa, defaults.max_cpu_isa);
    EXPECT_EQ(e.cache, defaults.cache);
    EXPECT_EQ(e.cache_max_bytes, defaults.cache_max_bytes);
    EXPECT_EQ(e.num_threads, defaults.num_threads);
    EXPECT_EQ(e.verbose, defaults.verbose);
    EXPECT_TRUE(e.dump.empty());
    EXPECT_EQ(e.packing, defaults.packing);
    EXPECT_EQ(e.fp32, defaults.fp32);
    EXPECT_EQ(e.kv_cache, defaults.kv_cache);
  }
  const Environment isa = parse({{"TILEWRIGHT_MAX_CPU_ISA", "nonsense"}});
  EXPECT_NE(isa.problems[0].find("avx2, avx_vnni, avx512,"), std::string::npos);
}

TEST(Environment, TheTableIsCompleteAndDefaultsAreValid) {
  std::set<std::string_view> names;
  for (const Variable& variable : variables()) {
    EXPECT_TRUE(names.insert(variable.name).second) << variable.name;
    EXPECT_FALSE(variable.documentation.empty());
    EXPECT_FALSE(variable.values.empty());
    Environment e;
    EXPECT_TRUE(variable.read(variable.default_value, e)) << variable.name;
  }
  EXPECT_EQ(names.size(), 22u);
}

TEST(Environment, ATypingErrorIsReported) {
  const std::vector<std::string_view> entries = {"PATH=/bin", "TILEWRIGHT_CACHE=rw",
                                                 "TILEWRIGHT_MAX_CPU_IAS=avx2"};
  const std::vector<std::string> messages = unknown_variables(entries);
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0], "TILEWRIGHT_MAX_CPU_IAS is not a variable of Tilewright; ignored");
}

// --- the log

class LogTest : public testing::Test {
 protected:
  void TearDown() override {
    set_log_sink({});
    set_log_level(LogLevel::warning);
  }
};

TEST_F(LogTest, LevelsFilter) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, std::string_view message) { lines.emplace_back(message); });
  set_log_level(LogLevel::warning);
  log_warning("w");
  log_info("i");
  log_debug("d");
  EXPECT_EQ(lines, (std::vector<std::string>{"w"}));
  set_log_level(LogLevel::info);
  log_info("i");
  log_debug("d");
  EXPECT_EQ(lines, (std::vector<std::string>{"w", "i"}));
  set_log_level(LogLevel::debug);
  log_debug("d");
  EXPECT_EQ(lines.back(), "d");
}

TEST_F(LogTest, TheDefaultSinkIsStderrWithAPrefix) {
  testing::internal::CaptureStderr();
  log_warning("something");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "tilewright: something\n");
}

TEST_F(LogTest, ASinkMayBeReplacedWhileOthersLog) {
  std::atomic<int> count = 0;
  set_log_sink([&](LogLevel, std::string_view) { ++count; });
  std::thread writer([] {
    for (int i = 0; i < 2000; ++i) log_warning("x");
  });
  for (int i = 0; i < 200; ++i) set_log_sink([&](LogLevel, std::string_view) { ++count; });
  // A sink may log: no lock is held while it runs.
  set_log_sink([&](LogLevel level, std::string_view) {
    ++count;
    if (level == LogLevel::warning) set_log_level(LogLevel::warning);
  });
  writer.join();
  log_warning("y");
  EXPECT_GT(count, 0);
}

}  // namespace
}  // namespace tilewright
