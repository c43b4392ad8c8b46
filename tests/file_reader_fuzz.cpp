// The entry point for libFuzzer: the first byte chooses a reader, the second whether the digests
// are made right, the rest is the file.
//
// Built and run by tests/campaign/cache.py (./dev campaign cache), with clang's libFuzzer and
// sanitizers.
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
  if (data[1] % 2 != 0) reader.seal(bytes);
  if (reader.read(bytes) == Verdict::wrong) std::abort();
  return 0;
}
