// What stands before a packed weight in its file (cache/README.md has every byte).
//
// The header proves itself by a SHA-256 and says how long the data is and what it was made of. The
// data is mapped, not read, so that a start touches no more of it than it computes with; it has a
// hash of its own for those who want to read it all.
//
// Thread-safe. Tested by weight_directory_test (every bit flip of a header, every truncation).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cache/content_hash.h"
#include "jit/base/result.h"

namespace tilewright::cache {

constexpr std::uint32_t kWeightFormat = 1;
constexpr std::size_t kWeightPage = 4096;  // data begins at a multiple of this
constexpr std::size_t kWeightHeaderMaxBytes = 1 << 20;

struct WeightHeader {
  std::string generator, key_text;
  std::string form;  // how the data is to be read; the caller's affair
  std::uint64_t data_offset = 0, data_bytes = 0;
  ContentHash content{};  // of the data

  friend bool operator==(const WeightHeader&, const WeightHeader&) = default;
};

// data_offset is what it becomes. Error: longer than kWeightHeaderMaxBytes.
Result<std::vector<std::byte>> encode(const WeightHeader& header);

// How many bytes of a file are its header, from its first page. Error: the reason, a short fixed
// text to count by.
Result<std::size_t> header_bytes(std::span<const std::byte> first_page);

// bytes: as many as header_bytes() says, of a file of file_bytes. Error: as above.
Result<WeightHeader> decode(std::span<const std::byte> bytes, std::uint64_t file_bytes);

}  // namespace tilewright::cache
