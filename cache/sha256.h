// SHA-256, the one hash of the cache: it names entries and proves that a file is whole.
//
// The only place that sees OpenSSL. A cryptographic hash rather than a CRC, because what it guards
// is executed; it costs 0.5 ns/byte with SHA-NI and about 2 ns/byte without.
//
// Thread-safe. Tested by cache_test (vectors of FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace tilewright::cache {

using Digest = std::array<std::byte, 32>;

Digest sha256(std::span<const std::byte> bytes);
Digest sha256(std::string_view text);

std::string hex(const Digest& digest);  // 64 lower-case characters

}  // namespace tilewright::cache
