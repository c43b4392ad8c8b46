// Encoding and decoding of cache entries. See entry.h and cache/README.md. Tested by cache_test.
#include "cache/entry.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cache/little_endian.h"
#include "cache/sha256.h"

namespace tilewright::cache {
namespace {

constexpr std::string_view kMagic = "TWKERNEL";
constexpr std::size_t kHeaderBytes = 64;
constexpr std::size_t kTrailerBytes = sizeof(Digest);
constexpr std::size_t kParts = 5;  // generator, key text, name, code, recipe

std::string to_string(std::span<const std::byte> bytes) {
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

Result<std::vector<std::byte>> encode(const Entry& entry, std::string_view generator) {
  const std::array<std::span<const std::byte>, kParts> parts = {
      std::as_bytes(std::span(generator)), std::as_bytes(std::span(entry.key_text)),
      std::as_bytes(std::span(entry.name)), std::span(entry.code),
      std::as_bytes(std::span(entry.recipe.packed()))};
  std::uint64_t total = kHeaderBytes + kTrailerBytes;
  for (const auto& part : parts) total += part.size();
  if (total > kEntryMaxBytes) return Error{"entry too large"};

  std::vector<std::byte> bytes;
  bytes.reserve(total);
  for (char c : kMagic) bytes.push_back(static_cast<std::byte>(c));
  append_integer(bytes, kEntryFormat);
  append_integer(bytes, entry.required_isa);
  append_integer(bytes, total);
  for (const auto& part : parts) append_integer(bytes, std::uint64_t{part.size()});
  for (const auto& part : parts) bytes.insert(bytes.end(), part.begin(), part.end());
  const Digest digest = sha256(bytes);
  bytes.insert(bytes.end(), digest.begin(), digest.end());
  return bytes;
}

Result<DecodedEntry> decode(std::span<const std::byte> bytes) {
  if (bytes.size() < kEntryMinBytes) return Error{"too short"};
  if (bytes.size() > kEntryMaxBytes) return Error{"too long"};
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) return Error{"wrong magic"};
  if (read_integer<std::uint32_t>(bytes, 8) != kEntryFormat) return Error{"other format"};
  if (read_integer<std::uint64_t>(bytes, 16) != bytes.size()) return Error{"wrong length"};
  const auto body = bytes.first(bytes.size() - kTrailerBytes);
  const Digest digest = sha256(body);
  if (!std::ranges::equal(digest, bytes.last(kTrailerBytes))) return Error{"wrong digest"};

  std::array<std::span<const std::byte>, kParts> parts;
  std::size_t offset = kHeaderBytes;
  for (std::size_t i = 0; i < kParts; ++i) {
    const auto length = read_integer<std::uint64_t>(bytes, 24 + 8 * i);
    if (length > body.size() - offset) return Error{"wrong part length"};
    parts[i] = body.subspan(offset, length);
    offset += length;
  }
  if (offset != body.size()) return Error{"wrong part length"};

  DecodedEntry decoded;
  decoded.generator = to_string(parts[0]);
  decoded.entry.key_text = to_string(parts[1]);
  decoded.entry.name = to_string(parts[2]);
  decoded.entry.required_isa = read_integer<std::uint32_t>(bytes, 12);
  decoded.entry.code.assign(parts[3].begin(), parts[3].end());
  decoded.entry.recipe = Recipe::of_packed(parts[4]);
  return decoded;
}

}  // namespace tilewright::cache
