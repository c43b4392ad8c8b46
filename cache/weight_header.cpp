// See weight_header.h and cache/README.md. Tested by weight_directory_test.
#include "cache/weight_header.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cache/little_endian.h"
#include "cache/sha256.h"

namespace tilewright::cache {
namespace {

constexpr std::string_view kMagic = "TWWEIGHT";
constexpr std::size_t kFixedBytes = 80;
constexpr std::size_t kDigestBytes = sizeof(Digest);

}  // namespace

Result<std::vector<std::byte>> encode(const WeightHeader& header) {
  const std::array<std::string_view, 3> parts = {header.generator, header.key_text, header.form};
  std::size_t used = kFixedBytes + kDigestBytes;
  for (std::string_view part : parts) used += part.size();
  const std::size_t total = (used + kWeightPage - 1) / kWeightPage * kWeightPage;
  if (total > kWeightHeaderMaxBytes) return Error{"header too large"};

  std::vector<std::byte> bytes;
  bytes.reserve(total);
  for (char c : kMagic) bytes.push_back(static_cast<std::byte>(c));
  append_integer(bytes, std::uint64_t{kWeightFormat});
  append_integer(bytes, std::uint64_t{total + header.data_bytes});
  append_integer(bytes, std::uint64_t{total});
  append_integer(bytes, header.data_bytes);
  for (std::string_view part : parts) append_integer(bytes, std::uint64_t{part.size()});
  bytes.insert(bytes.end(), header.content.begin(), header.content.end());
  for (std::string_view part : parts) {
    for (char c : part) bytes.push_back(static_cast<std::byte>(c));
  }
  bytes.resize(total - kDigestBytes);
  const Digest digest = sha256(bytes);
  bytes.insert(bytes.end(), digest.begin(), digest.end());
  return bytes;
}

Result<std::size_t> header_bytes(std::span<const std::byte> first_page) {
  if (first_page.size() < kWeightPage) return Error{"too short"};
  if (std::memcmp(first_page.data(), kMagic.data(), kMagic.size()) != 0) {
    return Error{"wrong magic"};
  }
  if (read_integer<std::uint64_t>(first_page, 8) != kWeightFormat) return Error{"other format"};
  const auto bytes = read_integer<std::uint64_t>(first_page, 24);
  if (bytes == 0 || bytes % kWeightPage != 0 || bytes > kWeightHeaderMaxBytes) {
    return Error{"wrong header length"};
  }
  return static_cast<std::size_t>(bytes);
}

Result<WeightHeader> decode(std::span<const std::byte> bytes, std::uint64_t file_bytes) {
  const Result<std::size_t> length = header_bytes(bytes);
  if (!length) return length.error();
  if (*length != bytes.size()) return Error{"wrong header length"};
  const auto body = bytes.first(bytes.size() - kDigestBytes);
  if (!std::ranges::equal(sha256(body), bytes.last(kDigestBytes))) return Error{"wrong digest"};

  WeightHeader header;
  header.data_offset = *length;
  header.data_bytes = read_integer<std::uint64_t>(bytes, 32);
  const auto stated = read_integer<std::uint64_t>(bytes, 16);
  if (stated != file_bytes || file_bytes < header.data_offset ||
      file_bytes - header.data_offset != header.data_bytes) {
    return Error{"wrong length"};
  }
  std::copy_n(bytes.begin() + 64, header.content.size(), header.content.begin());
  std::size_t offset = kFixedBytes, at = 40;
  for (std::string* part : {&header.generator, &header.key_text, &header.form}) {
    const auto size = read_integer<std::uint64_t>(bytes, at);
    if (size > body.size() - offset) return Error{"wrong part length"};
    part->assign(reinterpret_cast<const char*>(bytes.data()) + offset, size);
    offset += size;
    at += 8;
  }
  return header;
}

}  // namespace tilewright::cache
