// Recipe: see recipe.h. The only place that sees LZ4. Tested by cache_test.
#include "cache/recipe.h"

#include <lz4.h>

#include <cstdint>
#include <vector>

#include "cache/little_endian.h"

namespace tilewright::cache {
namespace {

constexpr std::size_t kLengthBytes = sizeof(std::uint64_t);

}  // namespace

Recipe::Recipe(std::string_view text) {
  if (text.empty()) return;
  std::vector<std::byte> length;
  append_integer(length, std::uint64_t{text.size()});
  const int most = LZ4_compressBound(static_cast<int>(text.size()));
  packed_.assign(reinterpret_cast<const char*>(length.data()), kLengthBytes);
  packed_.resize(kLengthBytes + static_cast<std::size_t>(most));
  const int bytes = LZ4_compress_default(text.data(), packed_.data() + kLengthBytes,
                                         static_cast<int>(text.size()), most);
  packed_.resize(kLengthBytes + static_cast<std::size_t>(bytes));
}

Recipe Recipe::of_packed(std::span<const std::byte> bytes) {
  Recipe recipe;
  recipe.packed_.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return recipe;
}

Result<std::string> Recipe::text() const {
  if (packed_.empty()) return std::string();
  const Error malformed{"malformed recipe"};
  const auto bytes = std::as_bytes(std::span(packed_));
  if (bytes.size() < kLengthBytes) return malformed;
  const auto length = read_integer<std::uint64_t>(bytes, 0);
  // LZ4 packs 255 bytes into one at most: a short text that claims to be long gets no memory.
  if (length > kRecipeMaxBytes || length / 255 > bytes.size()) return malformed;
  std::string text(length, '\0');
  const int made =
      LZ4_decompress_safe(packed_.data() + kLengthBytes, text.data(),
                          static_cast<int>(bytes.size() - kLengthBytes), static_cast<int>(length));
  if (made < 0 || static_cast<std::uint64_t>(made) != length) return malformed;
  return text;
}

}  // namespace tilewright::cache
