// Readers of files that are not trusted, all seen in one way: bytes in, verdict out. The tests of
// mutations and the fuzzer go through every row of file_readers(); a new format is one more row.
//
// Used by cache_mutation_test and file_reader_fuzz.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace tilewright::testing {

using Bytes = std::vector<std::byte>;

enum class Verdict {
  rejected,  // a miss
  accepted,  // its content would be used
  wrong,     // accepted, and it does not mean what its bytes say
};

struct FileReader {
  std::string name;
  std::vector<Bytes> golden;  // files that are accepted: a small, a middle and a large one
  std::function<Verdict(std::span<const std::byte>)> read;
  std::function<void(Bytes&)> seal;  // makes the digests right for what the bytes are now
};

std::vector<FileReader> file_readers();

}  // namespace tilewright::testing
