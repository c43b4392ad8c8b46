// See content_hash.h. The only place that sees xxHash. Tested by weight_directory_test.
#include "cache/content_hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <bit>

namespace tilewright::cache {
namespace {

// In the order that xxHash prints, which does not depend on the machine.
ContentHash canonical(XXH128_hash_t hash) {
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, hash);
  return std::bit_cast<ContentHash>(bytes.digest);
}

}  // namespace

ContentHash content_hash(std::span<const std::byte> bytes, const ContentSecret& secret) {
  return canonical(
      XXH3_128bits_withSecret(bytes.data(), bytes.size(), secret.data(), secret.size()));
}

ContentHash content_hash(std::span<const std::byte> bytes) {
  return canonical(XXH3_128bits(bytes.data(), bytes.size()));
}

}  // namespace tilewright::cache
