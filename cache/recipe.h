// Recipe: the text that an entry was made from, packed.
//
// A load reads and hashes the whole file, and the VIR text of a kernel is five to six times as long
// as its code; only people and plans want the text. zstd leaves a sixth of it, at a quarter of the
// time of an emission (LZ4: a third, at a tenth; perf/results/cache-avx2.md).
//
// Thread-safe. Tested by cache_test.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "jit/base/result.h"

namespace tilewright::cache {

constexpr std::size_t kRecipeMaxBytes = 64 << 20;  // of text; what claims more is malformed

class Recipe {
 public:
  Recipe() = default;
  explicit Recipe(std::string_view text);
  static Recipe of_packed(std::span<const std::byte> bytes);

  // A frame of zstd (RFC 8878), or nothing for no text.
  const std::string& packed() const { return packed_; }
  // Error: "malformed recipe".
  Result<std::string> text() const;

  friend bool operator==(const Recipe&, const Recipe&) = default;

 private:
  std::string packed_;
};

}  // namespace tilewright::cache
