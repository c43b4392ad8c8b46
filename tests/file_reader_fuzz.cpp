// The entry point for libFuzzer: the first byte chooses a reader; of the second, one bit says that
// the rest is the file or lies over a good one (exclusive or), the other that its digests are made
// right.
//
// Built and run by tests/campaign/cache.py (./dev campaign cache), with clang's libFuzzer and
// sanitizers.
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "tests/file_reader.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tilewright::testing;
  static const std::vector<FileReader> readers = file_readers();
  if (size < 2) return 0;
  const FileReader& reader = readers[data[0] % readers.size()];
  const auto* begin = reinterpret_cast<const std::byte*>(data);
  Bytes bytes(begin + 2, begin + size);
  if (data[1] / 2 % 2 != 0) {
    const Bytes& golden = reader.golden.front();
    bytes.resize(std::max(bytes.size(), golden.size()));
    for (std::size_t i = 0; i < golden.size(); ++i) bytes[i] ^= golden[i];
  }
  if (data[1] % 2 != 0) reader.seal(bytes);
  if (reader.read(bytes) == Verdict::wrong) std::abort();
  return 0;
}
