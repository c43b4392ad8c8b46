// Recipe: see recipe.h. The only place that sees zstd. Tested by cache_test.
#include "cache/recipe.h"

#include <zstd.h>

namespace tilewright::cache {

Recipe::Recipe(std::string_view text) {
  if (text.empty()) return;
  constexpr int fast = 1;
  packed_.resize(ZSTD_compressBound(text.size()));
  const std::size_t bytes =
      ZSTD_compress(packed_.data(), packed_.size(), text.data(), text.size(), fast);
  packed_.resize(ZSTD_isError(bytes) == 0 ? bytes : 0);  // an error: out of memory
}

Recipe Recipe::of_packed(std::span<const std::byte> bytes) {
  Recipe recipe;
  recipe.packed_.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return recipe;
}

Result<std::string> Recipe::text() const {
  if (packed_.empty()) return std::string();
  // The two errors are the largest numbers.
  const auto length = ZSTD_getFrameContentSize(packed_.data(), packed_.size());
  if (length > kRecipeMaxBytes) return Error{"malformed recipe"};
  std::string text(length, '\0');
  const std::size_t made =
      ZSTD_decompress(text.data(), text.size(), packed_.data(), packed_.size());
  if (ZSTD_isError(made) != 0 || made != length) return Error{"malformed recipe"};
  return text;
}

}  // namespace tilewright::cache
