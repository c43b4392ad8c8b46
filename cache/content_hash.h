// The hash that tells one weight's values from another's: 128 bits of XXH3, at the speed of memory.
//
// Who finds packed weights by the hash of their source computes with whatever was packed under that
// hash. XXH3 is not made to withstand somebody who looks for two inputs with one hash, and a
// checkpoint may come from anybody. So the hash is taken with a secret of this cache directory:
// without knowing it, no file can be made that is taken for another. SHA-256 would need no secret,
// but takes ten times as long as the memory does.
//
// Thread-safe. Tested by weight_directory_test.
#pragma once

#include <array>
#include <cstddef>
#include <span>

namespace tilewright::cache {

using ContentHash = std::array<std::byte, 16>;
using ContentSecret = std::array<std::byte, 192>;  // random

ContentHash content_hash(std::span<const std::byte> bytes, const ContentSecret& secret);
// Against accidents only, and the same for everybody.
ContentHash content_hash(std::span<const std::byte> bytes);

}  // namespace tilewright::cache
