// SHA-256 from the static libcrypto. See sha256.h. Tested by cache_test.
//
// The low-level calls, deprecated in OpenSSL 3 in favour of EVP: EVP would pull the whole provider
// machinery (about 4 MB) into the extension, and read configuration files of the system.
#define OPENSSL_SUPPRESS_DEPRECATED

#include "cache/sha256.h"

#include <openssl/sha.h>

namespace tilewright::cache {

Digest sha256(std::span<const std::byte> bytes) {
  SHA256_CTX context;
  Digest digest;
  SHA256_Init(&context);
  SHA256_Update(&context, bytes.data(), bytes.size());
  SHA256_Final(reinterpret_cast<unsigned char*>(digest.data()), &context);
  return digest;
}

Digest sha256(std::string_view text) { return sha256(std::as_bytes(std::span(text))); }

std::string hex(const Digest& digest) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  text.reserve(2 * digest.size());
  for (std::byte byte : digest) {
    text += kDigits[std::to_integer<unsigned>(byte >> 4)];
    text += kDigits[std::to_integer<unsigned>(byte & std::byte{15})];
  }
  return text;
}

}  // namespace tilewright::cache
