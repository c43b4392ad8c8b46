// Entry: one kernel, or one plan, as one self-verifying sequence of bytes (cache/README.md has
// every byte). A plan is an entry without code whose recipe is the plan.
//
// Code and metadata are one file, so they cannot come from two writers; a SHA-256 over everything
// before it ends the file, so a torn, truncated or altered file is a miss and never code. decode()
// trusts nothing: every length is checked before it is used.
//
// Thread-safe. Tested by cache_test (every bit flip, every truncation).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/recipe.h"
#include "jit/base/result.h"
#include "jit/base/target.h"

namespace tilewright::cache {

constexpr std::uint32_t kEntryFormat = 2;
constexpr std::size_t kEntryMinBytes = 64 + 32;   // header and trailer
constexpr std::size_t kEntryMaxBytes = 16 << 20;  // larger files are not read

struct Entry {
  std::string key_text;         // the full key, compared on load
  std::string name;             // as perf and gdb show the kernel; of a plan, "plan_" and the model
  IsaMask required_isa = 0;     // collected from the instructions emitted
  std::vector<std::byte> code;  // position independent, no relocations
  Recipe recipe;                // the VIR text that the code was emitted from; of a plan, itself

  friend bool operator==(const Entry&, const Entry&) = default;
};

// The kind of an entry: the first word of its key text says it.
constexpr bool is_plan(std::string_view key_text) { return key_text.starts_with("plan "); }

struct DecodedEntry {
  Entry entry;
  std::string generator;
};

// Error: larger than kEntryMaxBytes.
Result<std::vector<std::byte>> encode(const Entry& entry, std::string_view generator);

// Error: the reason, a short fixed text that the store counts by.
Result<DecodedEntry> decode(std::span<const std::byte> bytes);

}  // namespace tilewright::cache
