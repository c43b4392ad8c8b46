// Same key, same bytes: what the kernel cache rests on. Every environment variable, at every value
// that could matter, gives kernels of other keys or of the same bytes, for this machine and for
// rungs above it. Choices of speed (TILEWRIGHT_PROFILE's content) have choices_test.
//
// A process reads its environment once, so each setting has a process of its own; the variables
// that change nothing are set together, which shows as much in a third of the time. A variable
// without a row in settings() fails the test. Tested by leaving a field out of a kernel's
// specification.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cache/sha256.h"
#include "jit/base/env.h"
#include "ops/engine.h"
#include "ops/machine_profile.h"
#include "ops/scalar_type.h"
#include "tests/llama_graph.h"

namespace tilewright::ops {
namespace {

namespace fs = std::filesystem;

enum class Reach {
  nothing,  // no kernel is another one
  kernels,  // at least one of the values asks for other kernels
  machine,  // as the machine has it
};

struct Setting {
  std::vector<std::string> values;
  Reach reach = Reach::nothing;
};

// By variable. `folder` holds what some of them name.
std::map<std::string, Setting> settings(const fs::path& folder) {
  const std::string profile = (folder / "profile.json").string();
  const std::string other = (folder / "other").string();
  return {
      {"MAX_CPU_ISA", {{"avx2", "avx_vnni", "avx512", "amx_bf16"}, Reach::machine}},
      {"CACHE", {{"rw", "ro", "off"}}},
      {"CACHE_DIR", {{other}}},
      {"CACHE_MAX_SIZE", {{"0", "1K", "1G"}}},
      {"CACHE_CHECK", {{"1"}}},
      {"CACHE_WEIGHTS", {{"on", "off"}}},
      {"CACHE_PACK", {{other}}},
      {"NUM_THREADS", {{"1", "2", "7"}}},
      {"VERBOSE", {{"2", "profile"}}},
      {"DUMP", {{"1"}}},
      {"DUMP_DIR", {{other}}},
      {"JIT_PROFILE", {{"gdb", "vtune"}}},
      {"STRICT", {{"1"}}},
      {"DISABLE", {{"linear", "attention", "1"}, Reach::kernels}},
      {"FALLBACK", {{"onednn"}}},
      {"PASS_LIMIT", {{"0", "3", "6", "9"}, Reach::kernels}},
      {"WEIGHTS", {{"compact", "exact", "plain"}, Reach::kernels}},
      {"PACKING", {{"first"}}},  // decides when the front end compiles
      {"RUN_DTYPE", {{"bfloat16"}}},
      {"FP32", {{"fma", "amx"}, Reach::kernels}},
      {"KV_CACHE", {{"int8"}}},  // decides about the front end's graphs
      {"PROFILE", {{profile, "off"}, Reach::kernels}},
  };
}

struct Constants {
  std::map<std::string, std::vector<std::byte>> bytes;
  std::map<std::string, TensorView> views;
};

// Every value fits bf16, so that all ways to store a weight are open.
Constants constants_of(const LlamaText& llama, graph::DataType dtype) {
  Constants constants;
  std::mt19937 random(3);
  std::normal_distribution<double> normal(0, 0.2);
  for (const auto& [name, shape] : llama.constants) {
    const graph::DataType type = name == "inv_freq" ? graph::DataType::f32 : dtype;
    std::int64_t count = 1;
    for (std::int64_t size : shape) count *= size;
    const auto width = static_cast<std::size_t>(graph::size_in_bytes(type));
    std::vector<std::byte>& bytes = constants.bytes[name];
    bytes.resize(static_cast<std::size_t>(count) * width);
    for (std::size_t at = 0; at < bytes.size(); at += width) {
      std::uint16_t bf16 = 0;
      write_scalar(graph::DataType::bf16, &bf16, normal(random));
      write_scalar(type, &bytes[at], read_scalar(graph::DataType::bf16, &bf16));
    }
    constants.views[name] = {bytes.data(), type, shape};
  }
  return constants;
}

using Kernels = std::map<std::string, std::string>;  // code's digest by key text's

void emit_decoder(const std::string& rung, graph::DataType dtype, std::FILE* to,
                  const std::string& choices = "") {
  Result<Engine> engine = Engine::open(rung, choices);
  if (!engine) return;
  engine->kernels()->observe([to](const cache::Entry& entry) {
    fmt::print(to, "{} {}\n", cache::hex(cache::sha256(entry.key_text)),
               cache::hex(cache::sha256(entry.code)));
  });
  const LlamaShape shape{.layers = 1,
                         .hidden = 128,
                         .heads = 4,
                         .kv_heads = 2,
                         .head_dim = 32,
                         .intermediate = 128,
                         .vocabulary = 64};
  const LlamaText llama = llama_graph(shape, true, std::string(graph::name(dtype)));
  const Constants constants = constants_of(llama, dtype);
  Result<Program> program =
      engine->compile(llama.text, constants.views, std::make_shared<WeightStore>());
  if (program) static_cast<void>(program->prepare());
}

using Variables = std::map<std::string, std::string>;

std::string text(const Variables& variables) {
  std::string result;
  for (const auto& [name, value] : variables) result += fmt::format("{}={} ", name, value);
  return result;
}

// What a process with these variables emits by emit(to).
template <class Emit>
Kernels kernels_of(const Variables& variables, const fs::path& folder, Emit&& emit) {
  std::array<int, 2> ends = {};
  EXPECT_EQ(pipe(ends.data()), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    setenv("TILEWRIGHT_CACHE_DIR", (folder / "cache").c_str(), 1);
    setenv("XDG_CONFIG_HOME", folder.c_str(), 1);  // no profile of the user's
    for (const auto& [name, value] : variables) {
      setenv(("TILEWRIGHT_" + name).c_str(), value.c_str(), 1);
    }
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
    std::FILE* to = fdopen(ends[1], "w");
    emit(to);
    std::fflush(to);
    _exit(environment().problems.empty() ? 0 : 1);
  }
  close(ends[1]);
  std::FILE* from = fdopen(ends[0], "r");
  Kernels kernels;
  std::array<char, 65> key, code;
  while (std::fscanf(from, "%64s %64s", key.data(), code.data()) == 2) {
    kernels[key.data()] = code.data();
  }
  std::fclose(from);
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << text(variables);
  return kernels;
}

Kernels kernels_with(const Variables& variables, const fs::path& folder) {
  return kernels_of(variables, folder, [](std::FILE* to) {
    emit_decoder("", graph::DataType::f32, to);
    emit_decoder("amx_bf16", graph::DataType::f32, to);
    emit_decoder("avx512_bf16", graph::DataType::bf16, to);
  });
}

fs::path new_folder() {
  std::string pattern = testing::TempDir() + "kernel_key_XXXXXX";
  EXPECT_NE(mkdtemp(pattern.data()), nullptr);
  return pattern;
}

// FP32: auto follows the table of choices, the others do not.
TEST(KernelKey, Fp32ByTilesIsWhatTheTableOrTheUserSays) {
  const fs::path folder = new_folder();
  const auto emitted = [&](const char* setting, const char* choices) {
    return kernels_of({{"FP32", setting}}, folder, [choices](std::FILE* to) {
      emit_decoder("amx_bf16", graph::DataType::f32, to, choices);
    });
  };
  const Kernels without = emitted("auto", R"({"fp32_products": 0})");
  const Kernels tiled = emitted("auto", R"({"fp32_products": 3})");
  EXPECT_GT(without.size(), 10u);
  EXPECT_GT(tiled.size(), without.size());
  EXPECT_EQ(emitted("auto", "{}"), without) << "nothing was timed";
  EXPECT_EQ(emitted("fma", R"({"fp32_products": 3})"), without);
  EXPECT_EQ(emitted("amx", R"({"fp32_products": 0})"), tiled);
  fs::remove_all(folder);
}

TEST(KernelKey, EveryVariableChangesTheKeyOrLeavesTheBytes) {
  const fs::path folder = new_folder();
  const fs::path profile = folder / "profile.json";
  std::ofstream(profile) << *print_profile(Target::host().cpu, R"({"prefetch": 512})", "{}");
  fs::permissions(profile, fs::perms(0600));

  const std::map<std::string, Setting> rows = settings(folder);
  std::set<std::string> known;
  for (const Variable& variable : variables()) {
    known.insert(std::string(variable.name));
    EXPECT_TRUE(rows.contains(std::string(variable.name)))
        << variable.name << ": say in settings() which of its values matter";
  }
  int runs = 0;
  const auto emitted = [&](const Variables& variables) {
    fs::remove_all(folder / "other");  // nothing is loaded from a cache
    const fs::path own = folder / std::to_string(runs++);
    fs::create_directory(own);
    fs::permissions(own, fs::perms(0700));
    return kernels_with(variables, own);
  };
  const Kernels plain = emitted({});
  EXPECT_GT(plain.size(), 40u);
  Kernels all = plain;
  const auto asks_for_others = [&](const Variables& variables) {
    const Kernels kernels = emitted(variables);
    for (const auto& [key, code] : kernels) {
      EXPECT_EQ(all.try_emplace(key, code).first->second, code) << text(variables);
    }
    return kernels != plain;
  };

  std::vector<Variables> together(3);
  for (const auto& [name, setting] : rows) {
    EXPECT_TRUE(known.contains(name)) << name << " is no variable any more";
    if (setting.reach == Reach::nothing) {
      ASSERT_LE(setting.values.size(), together.size());
      for (std::size_t i = 0; i < together.size(); ++i) {
        together[i][name] = setting.values[std::min(i, setting.values.size() - 1)];
      }
      continue;
    }
    bool reaches = false;
    for (const std::string& value : setting.values) {
      reaches = asks_for_others({{name, value}}) || reaches;
    }
    EXPECT_TRUE(reaches || setting.reach == Reach::machine) << name;
  }
  for (const Variables& variables : together) {
    EXPECT_FALSE(asks_for_others(variables)) << text(variables);
  }
  fs::remove_all(folder);
}

}  // namespace
}  // namespace tilewright::ops
