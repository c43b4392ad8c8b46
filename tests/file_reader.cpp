// The table of readers. See file_reader.h.
#include "tests/file_reader.h"

#include <algorithm>
#include <random>

#include "cache/entry.h"
#include "cache/sha256.h"

namespace tilewright::testing {
namespace {

constexpr const char* kGenerator = "4f2a9c";
constexpr const char* kKeyText = "linear 1x32\nisa avx2\n";
constexpr IsaMask kHost = bit(Isa::avx2) | bit(Isa::avx_vnni);

// An entry whose file has exactly so many bytes.
Bytes entry_file(std::size_t bytes) {
  cache::Entry entry;
  entry.key_text = kKeyText;
  entry.name = "tilewright_linear";
  entry.required_isa = bit(Isa::avx2);
  entry.recipe = "kernel linear_f32 {\n  return\n}\n";
  const std::size_t rest = encode(entry, kGenerator)->size();
  std::mt19937 random(7);
  for (std::size_t i = rest; i < bytes; ++i) entry.code.push_back(static_cast<std::byte>(random()));
  return *encode(entry, kGenerator);
}

// As cache::Store accepts a file; and what it accepts must encode to the same bytes again, so that
// no field was taken for another.
Verdict read_entry(std::span<const std::byte> bytes) {
  const Result<cache::DecodedEntry> decoded = cache::decode(bytes);
  if (!decoded) return Verdict::rejected;
  const Result<Bytes> again = encode(decoded->entry, decoded->generator);
  if (!again || !std::ranges::equal(*again, bytes)) return Verdict::wrong;
  const bool wanted = decoded->generator == kGenerator && decoded->entry.key_text == kKeyText &&
                      (decoded->entry.required_isa & ~kHost) == 0;
  return wanted ? Verdict::accepted : Verdict::rejected;
}

void seal_entry(Bytes& bytes) {
  constexpr std::size_t kDigestBytes = sizeof(cache::Digest);
  if (bytes.size() < cache::kEntryMinBytes) return;
  // The length in the header, too: otherwise few mutations come further than that.
  for (std::size_t i = 0; i < 8; ++i)
    bytes[16 + i] = static_cast<std::byte>(bytes.size() >> (8 * i));
  const cache::Digest digest = cache::sha256(std::span(bytes).first(bytes.size() - kDigestBytes));
  std::ranges::copy(digest, bytes.end() - kDigestBytes);
}

}  // namespace

std::vector<FileReader> file_readers() {
  return {
      {"entry",
       {entry_file(1 << 10), entry_file(8 << 10), entry_file(64 << 10)},
       read_entry,
       seal_entry},
  };
}

}  // namespace tilewright::testing
