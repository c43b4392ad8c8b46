// Choices of speed: the tables, profiles and how they are read, and that a choice changes a
// kernel's key or leaves its bytes.
#include "ops/choices.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <regex>
#include <set>

#include "cache/store.h"
#include "graph/pipeline.h"
#include "jit/emit.h"
#include "ops/compile.h"
#include "ops/engine.h"
#include "ops/machine_profile.h"

namespace tilewright::ops {
namespace {

namespace fs = std::filesystem;

const CpuModel kMilan{"AuthenticAMD", 0x19, 0x01, 1};

TEST(ChoicesFor, ARungHasTheRuleAndEveryRow) {
  const Target rung = *Target::for_rung("avx2");
  const Decision decision = choices_for(rung.cpu, rung.isa);
  EXPECT_EQ(decision.choices, Choices{});
  const CpuModel zen3{"AuthenticAMD", 0x19, 1, 1}, zen4{"AuthenticAMD", 0x19, 0x11, 1};
  for (const CpuModel& cpu : {zen3, zen4}) {
    EXPECT_EQ(std::ranges::count(decision.others, choices_for(cpu, rung.isa).choices), 1);
  }
}

TEST(Choices, ARowIsFoundByVendorFamilyModelAndStepping) {
  const Decision milan = choices_for(kMilan, bit(Isa::avx2));
  EXPECT_EQ(milan.source, "row zen3-server");
  EXPECT_EQ(milan.choices.row_blocks(8), (std::vector<int>{6, 5, 4, 3, 2, 1}));
  const CpuModel others[] = {{"GenuineIntel", 0x19, 0x01, 1},
                             {"AuthenticAMD", 0x17, 0x01, 1},
                             {"AuthenticAMD", 0x19, 0x20, 1},
                             {"AuthenticAMD", 0x19, 0x01, 16},
                             {"", 0, 0, 0}};
  for (const CpuModel& cpu : others) {
    const Decision decision = choices_for(cpu, bit(Isa::avx2));
    EXPECT_EQ(decision.source, "rule for unknown CPUs with avx2") << print(cpu);
    EXPECT_EQ(decision.choices, Choices{});
  }
}

// A row that could not be read would be the end of every process on that CPU.
TEST(Choices, EveryRecordedRowIsValid) {
#define CPU(name, vendor, family, first, last, steppings, choices) \
  EXPECT_TRUE(changed({}, choices).ok()) << name;                  \
  EXPECT_LE(first, last) << name;                                  \
  EXPECT_NE(steppings & 0xffff, 0) << name;                        \
  EXPECT_NE(choices_for({vendor, family, last, 0}, 0).source, "") << name;
#include "ops/choices.def"
}

TEST(Choices, DefaultsAreInTheirRanges) {
  for (const ChoiceRow& row : rows({})) {
    const std::string object = "{\"" + std::string(row.name) + "\": " + row.value + "}";
    const Result<Choices> same = changed({}, object);
    ASSERT_TRUE(same.ok()) << same.error().message;
    EXPECT_EQ(*same, Choices{});
    EXPECT_FALSE(row.documentation.empty());
  }
}

TEST(Choices, ChangesAreCheckedAndNamed) {
  const Result<Choices> good =
      changed({}, R"({"prefetch": 512, "row_blocks_avx2": [6, 3, 1], "highest_isa": "avx2"})");
  ASSERT_TRUE(good.ok()) << good.error().message;
  EXPECT_EQ(good->prefetch, 512);
  EXPECT_EQ(good->row_blocks(8), (std::vector<int>{6, 3, 1}));
  EXPECT_EQ(good->row_blocks(16), Choices{}.row_blocks(16));
  EXPECT_EQ(good->highest_isa, "avx2");
  const std::pair<const char*, const char*> bad[] = {
      {"", "no JSON object"},
      {"[]", "no JSON object"},
      {"{\"prefetch\": 512", "no JSON object"},
      {R"({"prefetches": 1})", "'prefetches'"},
      {R"({"prefetch": -1})", "prefetch cannot be -1"},
      {R"({"prefetch": 1.5})", "prefetch cannot be 1.5"},
      {R"({"prefetch": 18446744073709551615})", "prefetch cannot be"},
      {R"({"highest_isa": "pdp11"})", "highest_isa cannot be"},
      {R"({"row_blocks_avx2": []})", "row_blocks_avx2 cannot be"},
      {R"({"row_blocks_avx2": [6, 4]})", "row_blocks_avx2 cannot be"},  // no remainder of 1
      {R"({"row_blocks_avx2": [4, 6, 1]})", "row_blocks_avx2 cannot be"},
      {R"({"row_blocks_avx2": [8, 1]})", "row_blocks_avx2 cannot be"},  // no registers
      {R"({"row_blocks_avx2": [6, 0, 1]})", "row_blocks_avx2 cannot be"},
      {R"({"row_blocks_avx2": "6"})", "row_blocks_avx2 cannot be"},
  };
  for (const auto& [text, reason] : bad) {
    const Result<Choices> result = changed({}, text);
    ASSERT_FALSE(result.ok()) << text;
    EXPECT_NE(result.error().message.find(reason), std::string::npos) << result.error().message;
  }
}

// --- profiles

TEST(MachineProfile, IsForOneCpuAndOneBuild) {
  const Result<std::string> text = print_profile(kMilan, R"({"few_queries": 32})", R"({"n": 1})");
  ASSERT_TRUE(text.ok()) << text.error().message;
  Choices shipped;
  shipped.prefetch = 64;
  const Result<Choices> choices = read_profile(kMilan, shipped, *text);
  ASSERT_TRUE(choices.ok()) << choices.error().message;
  EXPECT_EQ(choices->few_queries, 32);
  EXPECT_EQ(choices->prefetch, 64);
  CpuModel other = kMilan;
  other.stepping = 2;
  EXPECT_NE(read_profile(other, shipped, *text).error().message.find("another CPU"),
            std::string::npos);
  std::string older = *text;
  older.replace(older.find("\"generator\": \"") + 14, 4, "0000");
  EXPECT_NE(read_profile(kMilan, shipped, older).error().message.find("another build"),
            std::string::npos);
  for (const char* broken : {"", "{}", "[1]", R"({"tilewright": 2})", R"({"tilewright": 1})"}) {
    EXPECT_FALSE(read_profile(kMilan, shipped, broken).ok()) << broken;
  }
  std::string wrong = *text;
  wrong.replace(wrong.find("32"), 2, "-5");
  EXPECT_NE(read_profile(kMilan, shipped, wrong).error().message.find("few_queries cannot be -5"),
            std::string::npos);
  EXPECT_FALSE(print_profile(kMilan, R"({"nonsense": 1})", "{}").ok());
}

class ProfileFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "choices_test_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = directory_ / "profile.json";
    target_.isa = bit(Isa::avx2);
    target_.cpu = kMilan;
    std::ofstream(path_) << *print_profile(kMilan, R"({"few_queries": 32})", "{}");
    fs::permissions(path_, fs::perms(0600));
  }
  void TearDown() override { fs::remove_all(directory_); }

  Decision decision() const { return decide(target_, path_.string()); }
  void expect_unused(const char* reason) const {
    const Decision shipped = decision();
    EXPECT_EQ(shipped.choices, choices_for(kMilan, target_.isa).choices);
    EXPECT_EQ(shipped.source, "row zen3-server");
    EXPECT_NE(shipped.problem.find(reason), std::string::npos) << shipped.problem;
    EXPECT_NE(shipped.problem.find(path_.string()), std::string::npos) << shipped.problem;
  }

  fs::path directory_, path_;
  Target target_;
};

TEST_F(ProfileFile, IsReadAndNamed) {
  EXPECT_EQ(decision().choices.few_queries, 32);
  EXPECT_EQ(decision().source, "profile " + path_.string());
  EXPECT_EQ(decision().problem, "");
  EXPECT_EQ(decide(target_, "off").source, "row zen3-server");
}

TEST_F(ProfileFile, OfAnotherCpuIsNotUsed) {
  std::ofstream(path_) << *print_profile({"GenuineIntel", 6, 0x8f, 8}, "{}", "{}");
  expect_unused("another CPU: GenuineIntel 6/143/8, not AuthenticAMD 25/1/1");
}

TEST_F(ProfileFile, ThatOthersCouldHaveWrittenIsNotUsed) {
  ASSERT_EQ(chmod(path_.c_str(), 0622), 0);
  expect_unused("writable by others");
  ASSERT_EQ(chmod(path_.c_str(), 0600), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0777), 0);
  expect_unused("directory writable by others");
  ASSERT_EQ(chmod(directory_.c_str(), 0700), 0);
  fs::rename(path_, directory_ / "elsewhere");
  fs::create_symlink(directory_ / "elsewhere", path_);
  expect_unused("symbolic link");
}

TEST_F(ProfileFile, ThatWasNamedMustBeThere) {
  fs::remove(path_);
  expect_unused("ENOENT");
}

TEST_F(ProfileFile, OfTheUserMayBeAbsent) {
  setenv("XDG_CONFIG_HOME", directory_.c_str(), 1);
  EXPECT_EQ(default_profile_path(), (directory_ / "tilewright/profile.json").string());
  EXPECT_EQ(decide(target_, "").problem, "");
  ASSERT_EQ(mkdir((directory_ / "tilewright").c_str(), 0700), 0);
  EXPECT_EQ(decide(target_, "").problem, "");
  fs::rename(path_, default_profile_path());
  EXPECT_EQ(decide(target_, "").choices.few_queries, 32);
  unsetenv("XDG_CONFIG_HOME");
}

// --- choices and kernels

// Emitted code by key, of a graph with every kind of kernel that a choice reaches.
std::map<std::string, std::vector<std::byte>> kernels(const Choices& choices, const char* rung) {
  const char* text =
      "graph g(%x: f32[s, 64], %h: bf16[s, 64], %q: f32[1, 2, t, 16], %k: f32[1, 1, t, 16],"
      " %p: bf16[1, 2, t, 64], %c: cache<bf16, 2 x 64>) -> (f32[s, 32], bf16[s, 32],"
      " f32[1, 2, t, 16], bf16[1, 2, t, 64], bf16[1, 2, t, 64]) {\n"
      "  %w = const \"w\" : f32[32, 64]\n"
      "  %v = const \"v\" : bf16[32, 64]\n"
      "  %y = linear(%x, %w)\n"
      "  %z = linear(%h, %v)\n"
      "  %a = attention(%q, %k, %k) {causal = true, scale = 1.0}\n"
      "  %b = attention(%p, %p, %p) {causal = true, scale = 1.0}\n"
      "  %kv = kv_append(%c, %p, %p)\n"
      "  %d = attention(%p, %kv) {causal = true, scale = 1.0}\n"
      "  return %y, %z, %a, %b, %d\n"
      "}\n";
  std::vector<float> w(32 * 64, 0.1f);  // not exact in 16 bits
  std::vector<std::uint16_t> v(32 * 64, 0x3f80);
  const std::map<std::string, TensorView> constants = {
      {"w", {w.data(), graph::DataType::f32, {32, 64}}},
      {"v", {v.data(), graph::DataType::bf16, {32, 64}}}};
  const Target target = *Target::for_rung(rung);
  Result<graph::Graph> graph = graph::parse(text);
  EXPECT_TRUE(graph.ok()) << graph.error().message;
  Result<graph::Graph> optimized = graph::optimize(std::move(*graph), target);
  EXPECT_TRUE(optimized.ok()) << optimized.error().message;
  auto store = std::make_shared<cache::Store>(cache::Store::open("", cache::Mode::off, 0));
  auto library = std::make_shared<KernelLibrary>(target, store);
  std::map<std::string, std::vector<std::byte>> result;
  library->observe([&](const cache::Entry& entry) { result[entry.key_text] = entry.code; });
  CompileOptions options;
  options.choices = choices;
  Result<Program> program =
      compile(*optimized, constants, target, options, library, std::make_shared<WeightStore>());
  EXPECT_TRUE(program.ok()) << program.error().message;
  EXPECT_TRUE(program->prepare().ok());
  return result;
}

// What is prewarmed for a rung must be all that a CPU of any row asks for.
TEST(Choices, ARungHasTheCodeOfEveryRow) {
  std::vector<std::string> rows = {"{}"};
#define CPU(name, vendor, family, first, last, steppings, choices) rows.emplace_back(choices);
#include "ops/choices.def"
  for (const char* rung : {"avx2", "avx512", "amx_bf16"}) {
    const Target target = *Target::for_rung(rung);
    const Decision decision = choices_for(target.cpu, target.isa);
    auto all = kernels(decision.choices, rung);
    for (const Choices& choices : decision.others) all.merge(kernels(choices, rung));
    for (const std::string& row : rows) {
      for (const auto& [key, code] : kernels(*changed({}, row), rung)) {
        EXPECT_TRUE(all.contains(key)) << rung << " " << row << "\n" << key;
      }
    }
  }
}

bool is_any_key(const std::map<std::string, std::vector<std::byte>>& kernels,
                const std::regex& pattern) {
  return std::ranges::any_of(
      kernels, [&](const auto& kernel) { return std::regex_search(kernel.first, pattern); });
}

// Not two of them, each of which would read the weights.
TEST(Choices, AnyNumberOfRowsBelowManyHasOneKernel) {
  const auto made = kernels({}, "avx2");  // blocks of 6, 4, 2 and 1, many from 24 rows on
  for (const auto& [rows, rest] : {std::pair(1, 0),
                                   {2, 0},
                                   {2, 1},
                                   {4, 0},
                                   {4, 1},
                                   {6, 0},
                                   {6, 1},
                                   {6, 2},
                                   {6, 3},
                                   {6, 4},
                                   {6, 5}}) {
    const std::string end = rest > 0 ? " rest=" + std::to_string(rest) : "";
    EXPECT_TRUE(is_any_key(made, std::regex("linear lanes=8 rows=" + std::to_string(rows) +
                                            " .*prefetch=[0-9]+( streams=2)?" + end + "\\b")))
        << rows << " + " << rest;
  }
  EXPECT_FALSE(is_any_key(made, std::regex("rows=4 .*rest=2")));  // 6 rows are a block
}

TEST(Choices, AttentionOfBf16IsByDotsWhereThoseAreFast) {
  const std::regex by_dots("attention lanes=16 .*input=bf16 .* dots");
  EXPECT_TRUE(is_any_key(kernels({}, "avx512_bf16"), by_dots));
  EXPECT_FALSE(is_any_key(kernels({}, "avx512"), by_dots));
}

// For a rung an engine compiles once for each of them.
TEST(Choices, AnEngineForARungAsksForTheKernelsOfAllRows) {
  Result<Engine> engine = Engine::open("avx512", "");
  ASSERT_TRUE(engine.ok()) << engine.error().message;
  const char* text =
      "graph g(%x: f32[s, 64]) -> (f32[s, 32]) {\n"
      "  %w = const \"w\" : f32[32, 64]\n  %y = linear(%x, %w)\n  return %y\n}\n";
  std::vector<float> w(32 * 64, 0.1f);
  const std::map<std::string, TensorView> constants = {
      {"w", {w.data(), graph::DataType::f32, {32, 64}}}};
  Result<Program> program = engine->compile(text, constants, std::make_shared<WeightStore>());
  ASSERT_TRUE(program.ok()) << program.error().message;
  ASSERT_TRUE(program->prepare().ok());
  std::set<bool> far;  // whether four rows ask for weights 8 KB ahead
  for (const Kernel& kernel : engine->kernels()->kernels()) {
    if (kernel.key.find(" rows=4 ") == std::string::npos) continue;
    far.insert(kernel.key.find("prefetch=8192") != std::string::npos);
  }
  EXPECT_EQ(far, (std::set<bool>{false, true}));
}

// What the cache rests on: whatever row, profile or build of choices made a kernel, its key says
// which bytes it has.
TEST(Choices, AnotherChoiceGivesAnotherKeyOrTheSameBytes) {
  const char* changes[] = {
      R"({"row_blocks_avx2": [6, 3, 1], "row_blocks_avx512": [12, 6, 3, 1]})",
      R"({"many_blocks": 7})",
      R"({"pack_panels": 1})",
      R"({"packed_x_bytes": 65536})",
      R"({"fewest_chunk_rows": 12})",
      R"({"most_chunk_rows": 24})",
      R"({"prefetch": 512})",
      R"({"prefetch_f16": 512})",
      R"({"prefetch_near": 1536})",
      R"({"prefetch_block": 512})",
      R"({"prefetch_row": 512})",
      R"({"streams_row": 1})",
      R"({"prefetch_twelve_bits": 0, "twelve_bits_from": 0})",
      R"({"twelve_bits_from": 0})",
      R"({"twelve_bits_percent": 75, "twelve_bits_from": 0})",
      R"({"prefetch_keys_level": 1})",
      R"({"prefetch_only_jumps": 1})",
      R"({"few_queries": 3})",
      R"({"fp32_products": 6})",
  };
  const std::set<std::string> in_code = {
      "row_blocks_avx2",     "prefetch",           "prefetch_block",       "prefetch_row",
      "prefetch_near",       "streams_row",        "prefetch_twelve_bits", "twelve_bits_from",
      "prefetch_keys_level", "prefetch_only_jumps"};
  for (const ChoiceRow& row : rows({})) {
    const bool is_tried = std::ranges::any_of(changes, [&](std::string_view change) {
      return change.find('"' + std::string(row.name) + '"') != std::string_view::npos;
    });
    // highest_isa is a rung, which is in every key.
    EXPECT_TRUE(is_tried || row.name == "highest_isa") << row.name << ": add it to `changes`";
  }
  for (const std::string rung : {"avx2", "avx512", "amx_bf16"}) {
    std::map<std::string, std::vector<std::byte>> known = kernels({}, rung.c_str());
    const auto shipped = known;
    EXPECT_GT(shipped.size(), 8u);
    for (const char* change : changes) {
      const Result<Choices> choices = changed({}, change);
      ASSERT_TRUE(choices.ok()) << choices.error().message;
      const auto made = kernels(*choices, rung.c_str());
      for (const auto& [key, code] : made) {
        const auto [found, is_new] = known.try_emplace(key, code);
        EXPECT_EQ(found->second, code) << change << "\n" << key;
      }
      const std::string text = change;
      const std::string first = text.substr(2, text.find('"', 2) - 2);
      const bool reaches =
          in_code.contains(first) || (first == "fp32_products" && rung == "amx_bf16");
      EXPECT_EQ(made != shipped, reaches) << rung << " " << change;
    }
  }
}

}  // namespace
}  // namespace tilewright::ops
