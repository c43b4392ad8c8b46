// Encoding, verification and lookup of packs. See pack.h and cache/README.md. Tested by
// pack_file_test.
#include "cache/pack.h"

#include <elf.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <map>

#include "cache/key.h"
#include "cache/little_endian.h"
#include "cache/trusted_file.h"

namespace tilewright::cache {
namespace {

static_assert(std::endian::native == std::endian::little, "ELF structures are written as they are");

using Bytes = std::vector<std::byte>;

constexpr std::string_view kMagic("TWPACK\0\0", 8);
constexpr std::size_t kIndex = 64;      // where section .tilewright begins: after the header
constexpr std::size_t kGenerator = 96;  // its last field, of variable length
constexpr std::size_t kRecordBytes = 88;
constexpr std::size_t kDigestBytes = sizeof(Digest);
constexpr std::size_t kCodeAlignment = 64;  // a cache line
constexpr std::size_t kMinBytes = kGenerator + kDigestBytes;

constexpr std::array<std::string_view, 7> kSections = {
    "", ".tilewright", ".text", ".symtab", ".strtab", ".shstrtab", ".tilewright.sha256"};
enum SectionIndex : std::uint16_t { kNull, kOurs, kText, kSymbols, kStrings, kNames, kDigest };

std::size_t aligned(std::size_t offset, std::size_t alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

void align(Bytes& bytes, std::size_t alignment) { bytes.resize(aligned(bytes.size(), alignment)); }

void append(Bytes& bytes, std::span<const std::byte> more) {
  bytes.insert(bytes.end(), more.begin(), more.end());
}

void append(Bytes& bytes, std::string_view text) { append(bytes, std::as_bytes(std::span(text))); }

template <class Structure>
void append_structure(Bytes& bytes, const Structure& value) {
  append(bytes, std::as_bytes(std::span(&value, 1)));
}

std::string to_string(std::span<const std::byte> bytes) {
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

// A table of names as ELF has it: each ends with a zero, and the empty name is at 0.
struct StringTable {
  Bytes bytes = {std::byte{0}};

  std::uint32_t add(std::string_view name) {
    if (name.empty()) return 0;
    const auto offset = static_cast<std::uint32_t>(bytes.size());
    append(bytes, name);
    bytes.push_back(std::byte{0});
    return offset;
  }
};

Elf64_Ehdr file_header(std::size_t section_headers) {
  Elf64_Ehdr header = {};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_ident[EI_VERSION] = EV_CURRENT;
  header.e_type = ET_REL;
  header.e_machine = EM_X86_64;
  header.e_version = EV_CURRENT;
  header.e_shoff = section_headers;
  header.e_ehsize = sizeof(Elf64_Ehdr);
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = kSections.size();
  header.e_shstrndx = kNames;
  return header;
}

// Where the texts and the code of each entry lie.
struct Placement {
  Digest key;
  const Entry* entry;
  std::size_t texts = 0, code = 0;
};

// Entries by key, none twice.
Result<std::vector<Placement>> in_order(std::span<const Entry> entries,
                                        std::string_view generator) {
  std::vector<Placement> placements;
  for (const Entry& entry : entries) {
    placements.push_back({key_digest(generator, entry.key_text), &entry});
  }
  std::ranges::stable_sort(placements, {}, &Placement::key);
  const auto same_key = [](const Placement& a, const Placement& b) { return a.key == b.key; };
  for (std::size_t i = 1; i < placements.size(); ++i) {
    const Placement& one = placements[i - 1];
    if (same_key(one, placements[i]) && *one.entry != *placements[i].entry) {
      return Error{"two different entries of one key: " + hex(one.key)};
    }
  }
  placements.erase(std::unique(placements.begin(), placements.end(), same_key), placements.end());
  return placements;
}

// Gives every entry its place after `begin`, and returns where the code begins and ends.
std::pair<std::size_t, std::size_t> place(std::vector<Placement>& placements, std::size_t begin) {
  std::size_t end = begin;
  for (Placement& placement : placements) {
    const Entry& entry = *placement.entry;
    placement.texts = end;
    end += entry.key_text.size() + entry.name.size() + entry.recipe.packed().size();
  }
  const std::size_t code = aligned(end, kCodeAlignment);
  end = code;
  // One kernel for several rungs is often the same code.
  const auto less = [](const Bytes* a, const Bytes* b) { return *a < *b; };
  std::map<const Bytes*, std::size_t, decltype(less)> known(less);
  for (Placement& placement : placements) {
    const Bytes& bytes = placement.entry->code;
    const std::size_t next = aligned(end, kCodeAlignment);
    const auto [found, fresh] = known.emplace(&bytes, next);
    placement.code = found->second;
    if (fresh) end = next + bytes.size();
  }
  return {code, end};
}

}  // namespace

Result<std::vector<std::byte>> encode_pack(std::span<const Entry> entries,
                                           std::string_view generator) {
  Result<std::vector<Placement>> ordered = in_order(entries, generator);
  if (!ordered) return ordered.error();
  std::vector<Placement>& placements = *ordered;
  const std::size_t records = aligned(kGenerator + generator.size(), 8);
  const auto [code, code_end] = place(placements, records + kRecordBytes * placements.size());

  StringTable strings, names;
  Bytes symbols(sizeof(Elf64_Sym));
  for (const Placement& placement : placements) {
    Elf64_Sym symbol = {};
    symbol.st_name = strings.add(placement.entry->name + "." + hex(placement.key).substr(0, 8));
    if (is_plan(placement.entry->key_text)) {  // no place in .text: tools would see it in others'
      symbol.st_info = ELF64_ST_INFO(STB_LOCAL, STT_NOTYPE);
      symbol.st_shndx = SHN_ABS;
    } else {
      symbol.st_info = ELF64_ST_INFO(STB_LOCAL, STT_FUNC);
      symbol.st_shndx = kText;
      symbol.st_value = placement.code - code;
      symbol.st_size = placement.entry->code.size();
    }
    append_structure(symbols, symbol);
  }
  std::array<Elf64_Shdr, kSections.size()> sections = {};
  for (std::size_t i = 0; i < kSections.size(); ++i) sections[i].sh_name = names.add(kSections[i]);

  std::size_t end = 0;
  const auto put = [&](SectionIndex index, std::uint32_t type, std::size_t at, std::size_t size,
                       std::size_t alignment) -> Elf64_Shdr& {
    sections[index].sh_type = type;
    sections[index].sh_offset = at;
    sections[index].sh_size = size;
    sections[index].sh_addralign = alignment;
    end = at + size;
    return sections[index];
  };
  put(kOurs, SHT_PROGBITS, kIndex, code - kIndex, 8);
  put(kText, SHT_PROGBITS, code, code_end - code, kCodeAlignment).sh_flags =
      SHF_ALLOC | SHF_EXECINSTR;
  Elf64_Shdr& table = put(kSymbols, SHT_SYMTAB, aligned(end, 8), symbols.size(), 8);
  table.sh_link = kStrings;
  table.sh_info = static_cast<std::uint32_t>(placements.size() + 1);  // all symbols are local
  table.sh_entsize = sizeof(Elf64_Sym);
  put(kStrings, SHT_STRTAB, end, strings.bytes.size(), 1);
  put(kNames, SHT_STRTAB, end, names.bytes.size(), 1);
  const std::size_t headers = aligned(end, 8);
  put(kDigest, SHT_PROGBITS, headers + sizeof(sections), kDigestBytes, 1);
  if (end > kPackMaxBytes) return Error{"more than fits into a pack"};

  Bytes bytes;
  bytes.reserve(end);
  append_structure(bytes, file_header(headers));
  append(bytes, kMagic);
  append_integer(bytes, kPackFormat);
  append_integer(bytes, static_cast<std::uint32_t>(placements.size()));
  append_integer(bytes, std::uint64_t{end});
  append_integer(bytes, std::uint64_t{generator.size()});
  append(bytes, generator);
  align(bytes, 8);
  for (const Placement& placement : placements) {
    const Entry& entry = *placement.entry;
    append(bytes, placement.key);
    append_integer(bytes, entry.required_isa);
    append_integer(bytes, std::uint32_t{0});
    for (std::size_t field : {placement.texts, entry.key_text.size(), entry.name.size(),
                              entry.recipe.packed().size(), placement.code, entry.code.size()}) {
      append_integer(bytes, std::uint64_t{field});
    }
  }
  for (const Placement& placement : placements) {
    append(bytes, placement.entry->key_text);
    append(bytes, placement.entry->name);
    append(bytes, placement.entry->recipe.packed());
  }
  bytes.resize(code_end);
  for (const Placement& placement : placements) {
    std::ranges::copy(placement.entry->code,
                      bytes.begin() + static_cast<std::ptrdiff_t>(placement.code));
  }
  align(bytes, 8);
  append(bytes, symbols);
  append(bytes, strings.bytes);
  append(bytes, names.bytes);
  align(bytes, 8);
  for (const Elf64_Shdr& section : sections) append_structure(bytes, section);
  append(bytes, sha256(bytes));
  return bytes;
}

Result<Pack> Pack::decode(std::vector<std::byte> bytes) {
  Pack pack;
  pack.bytes_ = std::move(bytes);
  const std::span<const std::byte> all = pack.bytes_;
  if (all.size() < kMinBytes) return Error{"too short"};
  if (all.size() > kPackMaxBytes) return Error{"too long"};
  if (to_string(all.subspan(kIndex, kMagic.size())) != kMagic) return Error{"no pack"};
  if (read_integer<std::uint32_t>(all, 72) != kPackFormat) return Error{"other format"};
  if (read_integer<std::uint64_t>(all, 80) != all.size()) return Error{"wrong length"};
  const auto body = all.first(all.size() - kDigestBytes);
  if (!std::ranges::equal(sha256(body), all.last(kDigestBytes))) return Error{"wrong digest"};

  const auto generator = read_integer<std::uint64_t>(all, 88);
  if (generator > body.size() - kGenerator) return Error{"wrong part length"};
  pack.generator_ = to_string(all.subspan(kGenerator, generator));
  const std::size_t records = aligned(kGenerator + generator, 8);
  const auto count = read_integer<std::uint32_t>(all, 76);
  if (records > body.size() || count > (body.size() - records) / kRecordBytes) {
    return Error{"wrong part length"};
  }
  for (std::size_t i = 0; i < count; ++i) {
    Result<Record> record = pack.record_at(records + i * kRecordBytes);
    if (!record) return record.error();
    if (i != 0 && record->key <= pack.records_.back().key) return Error{"records out of order"};
    pack.plans_ += is_plan(to_string(record->key_text)) ? 1 : 0;
    pack.records_.push_back(*record);
  }
  return pack;
}

Result<Pack::Record> Pack::record_at(std::size_t offset) const {
  const auto body = std::span(bytes_).first(bytes_.size() - kDigestBytes);
  Record record;
  std::ranges::copy(body.subspan(offset, kDigestBytes), record.key.begin());
  record.required_isa = read_integer<std::uint32_t>(body, offset + 32);
  const auto field = [&](int index) {
    return read_integer<std::uint64_t>(body, offset + 40 + 8 * static_cast<std::size_t>(index));
  };
  std::uint64_t at = field(0);
  const auto part = [&](std::uint64_t size, std::span<const std::byte>& to) {
    if (at > body.size() || size > body.size() - at) return false;
    to = body.subspan(at, size);
    at += size;
    return true;
  };
  bool inside = part(field(1), record.key_text) && part(field(2), record.name) &&
                part(field(3), record.recipe);
  at = field(4);
  inside = inside && part(field(5), record.code);
  if (!inside) return Error{"wrong part length"};
  if (record.key != key_digest(generator_, to_string(record.key_text))) return Error{"other key"};
  return record;
}

Entry Pack::entry(std::size_t index) const {
  const Record& record = records_[index];
  return {to_string(record.key_text),
          to_string(record.name),
          record.required_isa,
          {record.code.begin(), record.code.end()},
          Recipe::of_packed(record.recipe)};
}

std::string Pack::key(std::size_t index) const { return hex(records_[index].key); }

std::optional<Entry> Pack::find(std::string_view key_text) const {
  const Digest key = key_digest(generator_, key_text);
  const auto found = std::ranges::lower_bound(records_, key, {}, &Record::key);
  if (found == records_.end() || found->key != key) return std::nullopt;
  Entry entry = this->entry(static_cast<std::size_t>(found - records_.begin()));
  if (entry.key_text != key_text) return std::nullopt;
  return entry;
}

Result<PackName> parse_pack_name(std::string_view name) {
  constexpr std::string_view kMark = "@sha256:";
  const std::size_t mark = name.rfind(kMark);
  if (mark == std::string_view::npos) return PackName{std::string(name), ""};
  PackName result{std::string(name.substr(0, mark)), std::string(name.substr(mark + kMark.size()))};
  for (char& c : result.digest) {
    if (c >= 'A' && c <= 'F') c = static_cast<char>(c - 'A' + 'a');
  }
  const bool digits = result.digest.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!digits || result.digest.size() != 2 * kDigestBytes) {
    return Error{std::string(name) + ": after @sha256: there must be 64 hexadecimal digits"};
  }
  return result;
}

std::vector<std::string> split_pack_names(std::string_view names) {
  std::vector<std::string> result;
  while (!names.empty()) {
    const std::size_t length = std::min(names.find(','), names.size());
    if (length != 0) result.emplace_back(names.substr(0, length));
    names.remove_prefix(std::min(length + 1, names.size()));
  }
  return result;
}

Result<Pack> open_pack(std::string_view name) {
  if (getauxval(AT_SECURE) != 0) return Error{"not used with somebody else's privileges"};
  const Result<PackName> parsed = parse_pack_name(name);
  if (!parsed) return parsed.error();
  const std::string &path = parsed->path, &digest = parsed->digest;
  const auto refused = [&](const std::string& why) { return Error{path + ": " + why}; };
  bool absent = false;
  Result<TrustedFile> file = digest.empty()
                                 ? read_trusted_file(AT_FDCWD, path, kPackMaxBytes, &absent)
                                 : read_any_file(AT_FDCWD, path, kPackMaxBytes, &absent);
  if (absent) return refused("no such file");
  if (!file) {
    std::string what = file.error().message;
    struct stat status;
    if (digest.empty() && lstat(path.c_str(), &status) == 0) {
      std::array<char, 64> mode;
      std::snprintf(mode.data(), mode.size(), " (mode %04o, owner %u)",
                    static_cast<unsigned>(status.st_mode & 07777),
                    static_cast<unsigned>(status.st_uid));
      what += mode.data();
      what +=
          "; make it a file of this user or root with chmod go-w, or name its content: " + path +
          "@sha256:<64 digits of sha256sum>";
    }
    return refused(what);
  }
  if (!digest.empty() && hex(sha256(file->bytes)) != digest) {
    return refused("its SHA-256 is another than the one that was named");
  }
  Result<Pack> pack = Pack::decode(std::move(file->bytes));
  if (!pack)
    return refused(pack.error().message + "; make it again with tilewright prewarm --pack");
  return pack;
}

}  // namespace tilewright::cache
