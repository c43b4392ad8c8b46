// Pack: all kernels of a prewarm as one sealed, self-verifying file (cache/README.md has every
// byte).
//
// It is an ELF object, so that objdump, gdb and perf can read it, which has nothing to load or to
// relocate, so that nothing can run it: kernels are copied out of the verified bytes. A pack is
// good as a whole or refused as a whole.
//
// Values, thread-compatible. Tested by pack_file_test (every bit flip, every truncation).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/entry.h"
#include "cache/sha256.h"
#include "jit/base/result.h"

namespace tilewright::cache {

constexpr std::uint32_t kPackFormat = 2;
constexpr std::size_t kPackMaxBytes = std::size_t{1} << 30;  // larger files are not read

// The bytes depend on the set of entries only. Error: two different entries of one key, or more
// than kPackMaxBytes.
Result<std::vector<std::byte>> encode_pack(std::span<const Entry> entries,
                                           std::string_view generator);

class Pack {
 public:
  // Verifies all of it and keeps the bytes. Error: the reason.
  static Result<Pack> decode(std::vector<std::byte> bytes);
  Pack(Pack&&) = default;
  Pack& operator=(Pack&&) = default;

  const std::string& generator() const { return generator_; }
  std::size_t size() const { return records_.size(); }
  std::size_t plans() const { return plans_; }  // of these
  Entry entry(std::size_t index) const;         // in order of key. REQUIRES: index < size()
  std::string key(std::size_t index) const;     // as in the name of a loose entry
  std::optional<Entry> find(std::string_view key_text) const;

 private:
  Pack() = default;
  struct Record {
    Digest key;
    IsaMask required_isa = 0;
    std::span<const std::byte> key_text, name, recipe, code;  // of bytes_
  };

  Result<Record> record_at(std::size_t offset) const;

  std::vector<std::byte> bytes_;
  std::string generator_;
  std::vector<Record> records_;
  std::size_t plans_ = 0;
};

// What TILEWRIGHT_CACHE_PACK names: the file, and its digest as 64 hexadecimal characters if one
// was given (FILE@sha256:DIGEST).
struct PackName {
  std::string path, digest;
};
// Error: a digest that is none.
Result<PackName> parse_pack_name(std::string_view name);
// The names of a list that is separated by commas.
std::vector<std::string> split_pack_names(std::string_view names);

// Reads and verifies FILE[@sha256:DIGEST]. With a digest, its content decides; without, it must
// belong to this user or root and be writable by nobody else. Error: the path, what is wrong, and
// what to do. Nothing is read with somebody else's privileges (AT_SECURE).
Result<Pack> open_pack(std::string_view name);

}  // namespace tilewright::cache
