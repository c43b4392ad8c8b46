// The digest of a key. See key.h. Tested by cache_test.
#include "cache/key.h"

#include <cstdint>

#include "cache/entry.h"

namespace tilewright::cache {
namespace {

// Tag and length in front of each field: no two different lists of fields give the same bytes.
void append_field(std::string& bytes, char tag, std::string_view value) {
  bytes += tag;
  std::uint64_t size = value.size();
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>((size >> (8 * i)) & 0xff);
  bytes += value;
}

}  // namespace

Digest key_digest(std::string_view generator, std::string_view key_text) {
  std::string bytes;
  append_field(bytes, 'f', std::to_string(kEntryFormat));
  append_field(bytes, 'g', generator);
  append_field(bytes, 'k', key_text);
  return sha256(bytes);
}

std::string key_name(std::string_view generator, std::string_view key_text) {
  return hex(key_digest(generator, key_text));
}

}  // namespace tilewright::cache
