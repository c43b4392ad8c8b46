// Recipe: the text that an entry was made from, packed.
//
// A load reads and hashes the whole file, and the VIR text of a kernel is six times as long as its
// code: unpacked, a kernel of 16 KiB was a file of 114 KiB and took 170 us to load instead of 60.
// The text itself is wanted by people and by plans only. LZ4 packs it at 500 MB/s, 4 % of the time
// of an emission.
//
// Thread-safe. Tested by cache_test.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "jit/base/result.h"

namespace tilewright::cache {

constexpr std::size_t kRecipeMaxBytes = 256 << 20;  // of text; what claims more is malformed

class Recipe {
 public:
  Recipe() = default;
  // REQUIRES: at most kRecipeMaxBytes.
  explicit Recipe(std::string_view text);
  static Recipe of_packed(std::span<const std::byte> bytes);

  // As cache/README.md has it.
  const std::string& packed() const { return packed_; }
  // Error: "malformed recipe".
  Result<std::string> text() const;

  friend bool operator==(const Recipe&, const Recipe&) = default;

 private:
  std::string packed_;
};

}  // namespace tilewright::cache
