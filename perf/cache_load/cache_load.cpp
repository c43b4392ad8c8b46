// How long the kernel cache takes for one kernel: a hit in a directory and in a pack, a miss, a
// write.
//
// Why: a start loads every kernel of a model before the first token, each verified. The goal is at
// most 60 us for 16 KiB, in the median.
//
//   cache_load [ROUNDS]     JSON: microseconds by what was done; 2001 rounds, the kinds in turns
//
// Files are in the page cache, as after the first start. Tested by ctest, which runs three rounds.
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cache/store.h"

namespace tilewright::cache {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kSize = 16 << 10;
constexpr const char* kGenerator = "perf";

Entry entry_of(const std::string& key_text, std::size_t code_bytes, std::size_t recipe_bytes) {
  Entry entry;
  entry.key_text = key_text;
  entry.name = "tilewright_linear";
  entry.required_isa = bit(Isa::avx2);
  std::mt19937 random(1);
  while (entry.code.size() < code_bytes) entry.code.push_back(static_cast<std::byte>(random()));
  std::string vir;
  for (int i = 0; vir.size() < recipe_bytes; ++i) {
    vir += fmt::format("  %{} = fma_f32x8(%{}, %{}, %{})\n", i, random() % 64, i / 2, i - 1);
  }
  entry.recipe = Recipe(vir);
  return entry;
}

struct Kind {
  const char* name;
  std::function<bool(int round)> run;  // false: not what it should be
  std::vector<double> microseconds = {};
};

int run(int rounds) {
  std::string pattern = (fs::temp_directory_path() / "tilewright-perf-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) return 1;
  Store store = Store::open(pattern, Mode::read_write, 0, kGenerator);
  Store packed = Store::open("", Mode::off, 0, kGenerator);
  const Entry entry = entry_of("linear", kSize / 7, kSize * 6 / 7 - 300);
  store.save(entry);
  // VIR text is about six times as long as its code: perf/results/cache-avx2.md.
  store.save(entry_of("large", kSize, 6 * kSize));
  Result<std::vector<std::byte>> bytes = encode_pack(std::vector{entry}, kGenerator);
  Result<Pack> pack = Pack::decode(std::move(bytes.value()));
  if (!packed.add_pack(std::make_shared<const Pack>(std::move(pack.value())))) return 1;

  const IsaMask host = bit(Isa::avx2);
  std::vector<Kind> kinds = {
      {"hit, a file of 16 KiB", [&](int) { return store.load("linear", host).has_value(); }},
      {"hit, code of 16 KiB and its recipe",
       [&](int) { return store.load("large", host).has_value(); }},
      {"hit, in a pack", [&](int) { return packed.load("linear", host).has_value(); }},
      {"miss", [&](int) { return !store.load("other", host).has_value(); }},
      {"write",
       [&](int round) {
         Entry fresh = entry;
         fresh.key_text = "write " + std::to_string(round);
         store.save(fresh);
         return store.counters().write_failures == 0;
       }},
  };
  bool good = true;
  for (int round = 0; round < rounds; ++round) {
    for (Kind& kind : kinds) {
      const auto start = std::chrono::steady_clock::now();
      good = kind.run(round) && good;
      const std::chrono::duration<double, std::micro> passed =
          std::chrono::steady_clock::now() - start;
      kind.microseconds.push_back(passed.count());
    }
  }
  std::error_code ignored;
  fs::remove_all(pattern, ignored);
  std::printf("{\"rounds\": %d", rounds);
  for (Kind& kind : kinds) {
    std::ranges::sort(kind.microseconds);
    const std::size_t count = kind.microseconds.size();
    std::printf(", \"%s\": {\"p50\": %.2f, \"p99\": %.2f}", kind.name, kind.microseconds[count / 2],
                kind.microseconds[count * 99 / 100]);
  }
  std::printf("}\n");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace tilewright::cache

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 2001;
  if (rounds < 1) {
    std::fprintf(stderr, "usage: cache_load [ROUNDS]\n");
    return 2;
  }
  return tilewright::cache::run(rounds);
}
