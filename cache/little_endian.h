// Integers of the cache's files, which are little endian whatever the machine.
//
// Thread-safe. Tested by cache_test and pack_file_test.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace tilewright::cache {

template <class Integer>
void append_integer(std::vector<std::byte>& bytes, Integer value) {
  for (std::size_t i = 0; i < sizeof(value); ++i) {
    bytes.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
}

// REQUIRES: the integer lies inside bytes.
template <class Integer>
Integer read_integer(std::span<const std::byte> bytes, std::size_t offset) {
  Integer value = 0;
  for (std::size_t i = 0; i < sizeof(value); ++i) {
    value |= std::to_integer<Integer>(bytes[offset + i]) << (8 * i);
  }
  return value;
}

}  // namespace tilewright::cache
