// Key: the name of an entry in the cache.
//
// SHA-256 over tagged, length-prefixed fields: the entry format's version, the generator's hash and
// the key text (the printed specification and the ISA mask that was allowed). Never in it: times,
// paths, process or host names, thread counts. The digest only finds the file; the full key is
// stored in the entry and compared on load.
//
// Thread-safe. Tested by cache_test.
#pragma once

#include <string>
#include <string_view>

#include "cache/sha256.h"

namespace tilewright::cache {

// The hash, made by the build, of everything that decides which bytes are emitted: the sources
// under jit/ and ops/ and Xbyak's headers. Version numbers would miss a changed source tree, and
// modification times would miss a package that was replaced by one of the same age.
std::string_view generator_hash();
// The same of graph/, which decides what the passes make of a graph: part of a plan's key text.
std::string_view passes_hash();

Digest key_digest(std::string_view generator, std::string_view key_text);
// The same as 64 hexadecimal characters.
std::string key_name(std::string_view generator, std::string_view key_text);

}  // namespace tilewright::cache
