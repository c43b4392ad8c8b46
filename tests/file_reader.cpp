// The table of readers. See file_reader.h.
#include "tests/file_reader.h"

#include <algorithm>
#include <functional>
#include <random>
#include <string_view>

#include "cache/content_hash.h"
#include "cache/entry.h"
#include "cache/file_contents.h"
#include "cache/key.h"
#include "cache/pack.h"
#include "cache/sha256.h"
#include "cache/weight_header.h"

namespace tilewright::testing {
namespace {

constexpr const char* kGenerator = "4f2a9c";
constexpr const char* kKernelKey = "linear 1x32\nisa avx2\n";
constexpr const char* kPlanKey = "plan 2\npasses 5d1e\nmodel LlamaForCausalLM\n";
constexpr IsaMask kHost = bit(Isa::avx2) | bit(Isa::avx_vnni);

constexpr std::size_t kDigestBytes = sizeof(cache::Digest);

void put_integer(Bytes& bytes, std::size_t offset, std::uint64_t value) {
  for (std::size_t i = 0; i < 8; ++i) bytes[offset + i] = static_cast<std::byte>(value >> (8 * i));
}

// The last bytes of bytes[0, end) become the digest of those before them.
void put_digest(Bytes& bytes, std::size_t end) {
  const cache::Digest digest = cache::sha256(std::span(bytes).first(end - kDigestBytes));
  std::ranges::copy(digest, bytes.begin() + static_cast<std::ptrdiff_t>(end - kDigestBytes));
}

Bytes random_bytes(std::size_t count) {
  std::mt19937 random(7);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

cache::Entry entry_of(const std::string& key_text, std::size_t code_bytes) {
  return {key_text, "tilewright_linear", bit(Isa::avx2), random_bytes(code_bytes),
          cache::Recipe("kernel linear_f32 {\n  return\n}\n")};
}

// Entries whose files have exactly so many bytes.
Bytes kernel_file(std::size_t bytes) {
  const std::size_t rest = encode(entry_of(kKernelKey, 0), kGenerator)->size();
  return *encode(entry_of(kKernelKey, bytes - rest), kGenerator);
}

Bytes plan_file(std::size_t bytes) {
  cache::Entry entry;
  entry.key_text = kPlanKey;
  entry.name = "plan_LlamaForCausalLM";
  const std::size_t rest = encode(entry, kGenerator)->size();
  entry.recipe = cache::Recipe::of_packed(random_bytes(bytes - rest));
  return *encode(entry, kGenerator);
}

// As cache::Store accepts a file; and what it accepts must encode to the same bytes again, so that
// no field was taken for another.
Verdict read_entry(std::string_view key_text, std::span<const std::byte> bytes) {
  const Result<cache::DecodedEntry> decoded = cache::decode(bytes);
  if (!decoded) return Verdict::rejected;
  const Result<Bytes> again = encode(decoded->entry, decoded->generator);
  if (!again || !std::ranges::equal(*again, bytes)) return Verdict::wrong;
  const bool wanted = decoded->generator == kGenerator && decoded->entry.key_text == key_text &&
                      (decoded->entry.required_isa & ~kHost) == 0;
  return wanted ? Verdict::accepted : Verdict::rejected;
}

void seal_entry(Bytes& bytes) {
  if (bytes.size() < cache::kEntryMinBytes) return;
  // The length in the header, too: otherwise few mutations come further than that.
  put_integer(bytes, 16, bytes.size());
  put_digest(bytes, bytes.size());
}

// The wanted entry among others.
Bytes pack_file(int others, std::size_t code_bytes) {
  std::vector<cache::Entry> entries = {entry_of(kKernelKey, code_bytes)};
  for (int i = 0; i < others; ++i) {
    entries.push_back(entry_of("norm " + std::to_string(i), code_bytes + 1));
  }
  return *encode_pack(entries, kGenerator);
}

// As cache::Store accepts a pack and then finds in it. What is read of a record must lead to that
// record again, so that no lookup gives the code of another key.
Verdict read_pack(std::span<const std::byte> bytes) {
  const Result<cache::Pack> pack = cache::Pack::decode({bytes.begin(), bytes.end()});
  if (!pack) return Verdict::rejected;
  for (std::size_t i = 0; i < pack->size(); ++i) {
    const cache::Entry entry = pack->entry(i);
    const bool named = pack->key(i) == cache::key_name(pack->generator(), entry.key_text);
    if (!named || pack->find(entry.key_text) != entry) return Verdict::wrong;
  }
  if (pack->generator() != kGenerator) return Verdict::rejected;
  const std::optional<cache::Entry> found = pack->find(kKernelKey);
  const bool wanted = found && (found->required_isa & ~kHost) == 0;
  return wanted ? Verdict::accepted : Verdict::rejected;
}

void seal_pack(Bytes& bytes) {
  constexpr std::size_t kLength = 80, kFixedBytes = 96;
  if (bytes.size() < kFixedBytes + kDigestBytes) return;
  put_integer(bytes, kLength, bytes.size());
  put_digest(bytes, bytes.size());
}

Bytes weight_file(std::size_t data_bytes) {
  const Bytes data = random_bytes(data_bytes);
  cache::WeightHeader header;
  header.generator = kGenerator;
  header.key_text = kKernelKey;
  header.form = "bf16";
  header.data_bytes = data.size();
  header.content = cache::content_hash(data);
  Bytes bytes = *encode(header);
  bytes.insert(bytes.end(), data.begin(), data.end());
  return bytes;
}

// As cache::WeightDirectory accepts a file whose data is to be compared with its hash, too
// (TILEWRIGHT_CACHE_CHECK=1, tilewright cache verify).
Verdict read_weight(std::span<const std::byte> bytes) {
  const Result<std::size_t> length = cache::header_bytes(bytes);
  if (!length || *length > bytes.size()) return Verdict::rejected;
  const auto header = cache::decode(bytes.first(*length), bytes.size());
  if (!header) return Verdict::rejected;
  if (header->data_offset + header->data_bytes != bytes.size()) return Verdict::wrong;
  if (cache::content_hash(bytes.subspan(header->data_offset)) != header->content) {
    return Verdict::rejected;
  }
  // What was read, written and read again is the same, but for gaps that nothing reads.
  cache::WeightHeader again = *header;
  if (const auto written = encode(again); written) {
    again.data_offset = written->size();
    const auto read = cache::decode(*written, written->size() + header->data_bytes);
    if (!read || *read != again) return Verdict::wrong;
  }
  const bool wanted = header->generator == kGenerator && header->key_text == kKernelKey;
  return wanted ? Verdict::accepted : Verdict::rejected;
}

void seal_weight(Bytes& bytes) {
  constexpr std::size_t kLength = 16, kDataBytes = 32, kContent = 64;
  const Result<std::size_t> header = cache::header_bytes(bytes);
  if (!header || *header > bytes.size()) return;
  put_integer(bytes, kLength, bytes.size());
  put_integer(bytes, kDataBytes, bytes.size() - *header);
  const auto content = cache::content_hash(std::span(bytes).subspan(*header));
  std::ranges::copy(content, bytes.begin() + kContent);
  put_digest(bytes, *header);
}

const cache::ContentSecret kSecret = [] {
  cache::ContentSecret secret;
  std::ranges::copy(random_bytes(secret.size()), secret.begin());
  return secret;
}();
const cache::FileState kState{1, 2, 3000, 4, 5};
const cache::FilePart kPart{10, 20};

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The wanted part among others.
Bytes contents_file(std::uint64_t others) {
  cache::FileContents contents;
  contents.add(kState, kPart, {});
  for (std::uint64_t i = 0; i < others; ++i) contents.add({1, 3 + i / 8}, {i, 1}, {});
  const std::string text = contents.text(kSecret);
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

// As cache::WeightDirectory reads its record of sources.
Verdict read_contents(std::span<const std::byte> bytes) {
  const auto contents = cache::FileContents::parse(text_of(bytes), kSecret);
  if (!contents.find(kState, kPart)) return Verdict::rejected;
  return contents.text(kSecret) == text_of(bytes) ? Verdict::accepted : Verdict::wrong;
}

void seal_contents(Bytes& bytes) {
  constexpr std::size_t kSeal = 33;  // 32 digits and the end of the line
  if (bytes.size() < kSeal) return;
  const auto sealed = std::span<const std::byte>(bytes).first(bytes.size() - kSeal);
  auto to = bytes.end() - kSeal;
  for (std::byte byte : cache::content_hash(sealed, kSecret)) {
    for (const auto digit : {byte >> 4, byte & std::byte{15}}) {
      *to++ = static_cast<std::byte>("0123456789abcdef"[std::to_integer<std::size_t>(digit)]);
    }
  }
  *to = std::byte{'\n'};
}

}  // namespace

std::vector<FileReader> file_readers() {
  return {
      {"entry",
       {kernel_file(1 << 10), kernel_file(8 << 10), kernel_file(64 << 10)},
       std::bind_front(read_entry, kKernelKey),
       seal_entry},
      {"plan",
       {plan_file(1 << 10), plan_file(8 << 10), plan_file(64 << 10)},
       std::bind_front(read_entry, kPlanKey),
       seal_entry},
      {"pack", {pack_file(0, 300), pack_file(8, 800), pack_file(30, 2000)}, read_pack, seal_pack},
      {"weight",
       {weight_file(0), weight_file(4096), weight_file(64 << 10)},
       read_weight,
       seal_weight},
      {"sources",
       {contents_file(0), contents_file(30), contents_file(500)},
       read_contents,
       seal_contents},
  };
}

}  // namespace tilewright::testing
