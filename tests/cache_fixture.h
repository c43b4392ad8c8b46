// What the tests of the cache share: entries to store, and a cache in a fresh directory.
//
// Tested by cache_test and cache_trust_test, which are its users.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "cache/entry.h"
#include "cache/key.h"
#include "cache/store.h"

namespace tilewright::cache {

namespace fs = std::filesystem;

constexpr IsaMask kHost = bit(Isa::avx2) | bit(Isa::avx_vnni);

inline Entry make_entry(const std::string& key_text, std::size_t code_bytes = 200) {
  Entry entry;
  entry.key_text = key_text;
  entry.name = "linear_f32";
  entry.required_isa = bit(Isa::avx2);
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>{}(key_text)));
  for (std::size_t i = 0; i < code_bytes; ++i) {
    entry.code.push_back(static_cast<std::byte>(random()));
  }
  entry.recipe = Recipe("kernel linear_f32 {\n  return\n}\n");
  return entry;
}

inline void write_file(const fs::path& path, std::span<const std::byte> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.good());
}

inline std::vector<std::byte> read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

class CacheTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "tilewright-cache-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    base_ = pattern;
  }
  void TearDown() override {
    std::error_code ignored;
    fs::remove_all(base_, ignored);
  }

  std::string directory() const { return (base_ / "cache").string(); }
  Store open(Mode mode = Mode::read_write, std::uint64_t max_bytes = 0) const {
    return Store::open(directory(), mode, max_bytes);
  }
  fs::path path_of(const std::string& key_text) const {
    const std::string key = key_name(generator_hash(), key_text);
    return fs::path(directory()) / "objects" / key.substr(0, 2) / (key + ".kernel");
  }
  // Expects that the entry is a miss for this reason, in a store of its own.
  void expect_reject(const std::string& key_text, const std::string& reason) const {
    Store store = open();
    EXPECT_FALSE(store.load(key_text, kHost).has_value()) << reason;
    const Counters counters = store.counters();
    EXPECT_EQ(counters.misses, 1u);
    EXPECT_EQ(counters.rejects, (std::map<std::string, std::uint64_t>{{reason, 1}}));
  }

  fs::path base_;
};

}  // namespace tilewright::cache
