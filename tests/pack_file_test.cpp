// Tests of sealed packs: the bytes, what is refused, the trust rules, lookups through a store, and
// that binutils reads one.
//
// Tested by breaking the rules: each test fails if its check is removed from cache/.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "cache/pack.h"
#include "cache/sha256.h"
#include "tests/cache_fixture.h"

namespace tilewright::cache {
namespace {

constexpr std::string_view kGenerator = "generator";

std::vector<Entry> small_entries() {
  return {make_entry("linear 1x32", 30), make_entry("norm 64", 7), make_entry("plan 2", 0)};
}

std::vector<std::byte> small_pack() { return *encode_pack(small_entries(), kGenerator); }

// Renews the digest after a change, so that only the checks behind it are left.
std::vector<std::byte> sealed(std::vector<std::byte> bytes) {
  bytes.resize(bytes.size() - sizeof(Digest));
  const Digest digest = sha256(bytes);
  bytes.insert(bytes.end(), digest.begin(), digest.end());
  return bytes;
}

void put(std::vector<std::byte>& bytes, std::size_t offset, std::uint64_t value, int width = 8) {
  for (int i = 0; i < width; ++i) {
    bytes[offset + static_cast<std::size_t>(i)] = std::byte(value >> (8 * i));
  }
}

constexpr std::size_t kRecords = 112;  // 96 and the generator, at a multiple of 8
constexpr std::size_t kRecordBytes = 88;

TEST(PackTest, RoundTrip) {
  for (const auto& entries : {std::vector<Entry>{}, small_entries()}) {
    Result<Pack> pack = Pack::decode(*encode_pack(entries, kGenerator));
    ASSERT_TRUE(pack.ok()) << pack.error().message;
    EXPECT_EQ(pack->generator(), kGenerator);
    EXPECT_EQ(pack->size(), entries.size());
    EXPECT_EQ(pack->plans(), entries.empty() ? 0u : 1u);
    for (const Entry& entry : entries) EXPECT_EQ(pack->find(entry.key_text), entry);
    EXPECT_FALSE(pack->find("linear 1x64").has_value());
  }
}

TEST(PackTest, BytesDependOnTheSetOfEntriesOnly) {
  std::vector<Entry> entries = small_entries();
  const std::vector<std::byte> bytes = small_pack();
  std::ranges::reverse(entries);
  entries.push_back(entries[0]);  // the same again
  EXPECT_EQ(*encode_pack(entries, kGenerator), bytes);

  // And what is read gives the same bytes again.
  Result<Pack> pack = Pack::decode(bytes);
  std::vector<Entry> read;
  for (std::size_t i = 0; i < pack->size(); ++i) {
    read.push_back(pack->entry(i));
    EXPECT_EQ(pack->key(i), key_name(kGenerator, read.back().key_text));
  }
  EXPECT_EQ(*encode_pack(read, kGenerator), bytes);
}

TEST(PackTest, EqualCodeIsStoredOnce) {
  Entry one = make_entry("isa avx2", 5000), other = one;
  other.key_text = "isa avx_vnni";
  const std::size_t single = encode_pack(std::vector{one}, kGenerator)->size();
  const std::vector<std::byte> both = *encode_pack(std::vector{one, other}, kGenerator);
  EXPECT_LT(both.size(), single + 1000);
  EXPECT_EQ(Pack::decode(both)->find("isa avx_vnni"), other);
}

TEST(PackTest, DifferentEntriesOfOneKeyAreAnError) {
  Entry other = make_entry("norm 64", 7);
  other.code[0] ^= std::byte{1};
  std::vector<Entry> entries = small_entries();
  entries.push_back(other);
  EXPECT_FALSE(encode_pack(entries, kGenerator).ok());
}

TEST(PackTest, EveryBitFlipIsRejected) {
  std::vector<std::byte> bytes = small_pack();
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      bytes[i] ^= std::byte(1 << bit);
      EXPECT_FALSE(Pack::decode(bytes).ok()) << "byte " << i << ", bit " << bit;
      bytes[i] ^= std::byte(1 << bit);
    }
  }
  EXPECT_TRUE(Pack::decode(bytes).ok());
}

TEST(PackTest, EveryTruncationAndExtensionIsRejected) {
  const std::vector<std::byte> bytes = small_pack();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(Pack::decode({bytes.begin(), bytes.begin() + static_cast<long>(size)}).ok());
  }
  std::vector<std::byte> longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(Pack::decode(longer).ok());
  EXPECT_FALSE(Pack::decode(sealed(longer)).ok());
}

// Fields that lie, under a digest that is right: the bounds checks must hold by themselves.
TEST(PackTest, WrongFieldsUnderAValidDigestAreRejected) {
  const std::vector<std::byte> good = small_pack();
  ASSERT_TRUE(Pack::decode(sealed(good)).ok());
  const auto refused = [&](std::size_t offset, std::uint64_t value, int width = 8) {
    std::vector<std::byte> bytes = good;
    put(bytes, offset, value, width);
    EXPECT_FALSE(Pack::decode(sealed(bytes)).ok()) << offset << ": " << value;
  };
  const std::uint64_t lies[] = {1, good.size(), std::uint64_t{1} << 63, ~std::uint64_t{0},
                                ~std::uint64_t{0} - 40};
  for (std::uint64_t format : {0, 1, 3}) refused(72, format, 4);
  for (std::uint64_t lie : lies) {
    refused(76, lie | 0x10, 4);                                         // number of records
    refused(80, lie + 1);                                               // length of the file
    refused(88, lie);                                                   // length of the generator
    for (std::size_t field : {40, 48}) refused(kRecords + field, lie);  // texts, key text
    for (std::size_t field : {56, 64, 72, 80}) {                        // name, recipe, code
      if (lie != 1) refused(kRecords + field, lie);
    }
  }
}

TEST(PackTest, RecordsTwiceOrOutOfOrderAreRejected) {
  const std::vector<std::byte> good = small_pack();
  const auto first = good.begin() + kRecords;
  std::vector<std::byte> twice = good, swapped = good;
  std::copy(first, first + kRecordBytes, twice.begin() + kRecords + kRecordBytes);
  std::swap_ranges(swapped.begin() + kRecords, swapped.begin() + kRecords + kRecordBytes,
                   swapped.begin() + kRecords + kRecordBytes);
  for (const auto& bytes : {twice, swapped}) {
    Result<Pack> pack = Pack::decode(sealed(bytes));
    ASSERT_FALSE(pack.ok());
    EXPECT_EQ(pack.error().message, "records out of order");
  }
  std::vector<std::byte> renamed = good;
  renamed[kRecords] ^= std::byte{1};
  EXPECT_FALSE(Pack::decode(sealed(renamed)).ok());
}

class PackFileTest : public CacheTest {
 protected:
  std::string path() const { return (base_ / "kernels.pack").string(); }
  void write_pack(std::string_view generator = generator_hash()) const {
    write_file(path(), *encode_pack(small_entries(), generator));
    fs::permissions(path(), fs::perms(0644));
  }
  std::string pinned() const { return path() + "@sha256:" + hex(sha256(read_file(path()))); }
  // What open_pack says against it; "" if nothing.
  static std::string refusal(const std::string& name) {
    Result<Pack> pack = open_pack(name);
    return pack ? "" : pack.error().message;
  }
};

TEST_F(PackFileTest, OwnershipRules) {
  EXPECT_NE(refusal(path()).find("no such file"), std::string::npos);
  write_pack();
  EXPECT_EQ(refusal(path()), "");
  for (unsigned mode : {0444u, 0600u, 0755u}) {
    fs::permissions(path(), fs::perms(mode));
    EXPECT_EQ(refusal(path()), "") << mode;
  }
  for (unsigned mode : {0664u, 0646u, 0777u}) {
    fs::permissions(path(), fs::perms(mode));
    const std::string said = refusal(path());
    char text[16];
    std::snprintf(text, sizeof(text), "mode %04o", mode);
    for (const std::string& part :
         {path(), std::string(text), std::string("chmod"), std::string("@sha256:")}) {
      EXPECT_NE(said.find(part), std::string::npos) << said;
    }
    EXPECT_EQ(refusal(pinned()), "") << mode;
  }
  fs::permissions(path(), fs::perms(0644));
  fs::create_symlink(path(), base_ / "link");
  EXPECT_NE(refusal((base_ / "link").string()), "");
  fs::remove(base_ / "link");
  ASSERT_EQ(mkfifo((base_ / "fifo").c_str(), 0600), 0);
  EXPECT_NE(refusal((base_ / "fifo").string()).find("not a regular file"), std::string::npos);
  EXPECT_NE(refusal(base_.string()), "");
}

TEST_F(PackFileTest, OtherUsersPackIsAcceptedByDigestOnly) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to give a file to another user";
  write_pack();
  ASSERT_EQ(chown(path().c_str(), 1001, 1001), 0);
  EXPECT_NE(refusal(path()).find("belongs to another user"), std::string::npos);
  EXPECT_EQ(refusal(pinned()), "");
}

TEST_F(PackFileTest, DigestIsOfTheWholeFile) {
  write_pack();
  const std::string name = pinned();
  EXPECT_EQ(refusal(name), "");
  // Kubernetes mounts files as links.
  fs::create_symlink(path(), base_ / "link");
  EXPECT_EQ(refusal((base_ / "link").string() + name.substr(name.rfind('@'))), "");
  std::string wrong = name;
  wrong.back() = wrong.back() == '0' ? '1' : '0';
  EXPECT_NE(refusal(wrong).find("SHA-256"), std::string::npos);
  // Another good pack is not the one that was named.
  write_file(path(), *encode_pack(std::vector{make_entry("other")}, generator_hash()));
  EXPECT_NE(refusal(name).find("SHA-256"), std::string::npos);
  for (const char* text : {"@sha256:", "@sha256:12", "@sha256:zz"}) {
    EXPECT_NE(refusal(path() + text).find("64 hexadecimal digits"), std::string::npos);
  }
}

TEST_F(PackFileTest, StoreLooksInPacksFirst) {
  write_pack();
  const auto pack = std::make_shared<const Pack>(std::move(*open_pack(path())));
  for (Mode mode : {Mode::read_write, Mode::read_only, Mode::off}) {
    Store store = open(mode);
    ASSERT_TRUE(store.add_pack(pack).ok());
    EXPECT_EQ(store.load("norm 64", kHost), small_entries()[1]);
    EXPECT_FALSE(store.load("elsewhere", kHost).has_value());
    const Counters counters = store.counters();
    EXPECT_EQ(counters.hits, 1u);
    EXPECT_EQ(counters.pack_hits, 1u);
    EXPECT_EQ(counters.misses, 1u);
  }
  Store store = open();
  ASSERT_TRUE(store.add_pack(pack).ok());
  store.save(make_entry("elsewhere"));
  EXPECT_TRUE(store.load("elsewhere", kHost).has_value());
  EXPECT_EQ(store.counters().pack_hits, 0u);
}

TEST_F(PackFileTest, PackOfAnotherBuildOrCpuIsNotUsed) {
  write_pack("another generator");
  Store store = open();
  EXPECT_FALSE(store.add_pack(std::make_shared<const Pack>(std::move(*open_pack(path())))).ok());
  EXPECT_FALSE(store.load("norm 64", kHost).has_value());

  write_pack();
  ASSERT_TRUE(store.add_pack(std::make_shared<const Pack>(std::move(*open_pack(path())))).ok());
  EXPECT_FALSE(store.load("norm 64", 0).has_value());
  EXPECT_TRUE(store.load("norm 64", kHost).has_value());
}

TEST(PackNameTest, SeveralAreSeparatedByCommas) {
  EXPECT_EQ(split_pack_names(""), std::vector<std::string>{});
  EXPECT_EQ(split_pack_names("/a,/b@sha256:00,"), (std::vector<std::string>{"/a", "/b@sha256:00"}));
}

std::string output_of(const std::string& command) {
  std::string text;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return text;
  char buffer[4096];
  while (const std::size_t count = fread(buffer, 1, sizeof(buffer), pipe))
    text.append(buffer, count);
  return pclose(pipe) == 0 ? text : "failed: " + text;
}

TEST_F(PackFileTest, BinutilsReadIt) {
  if (system("objdump --version > /dev/null 2>&1") != 0) GTEST_SKIP() << "no objdump here";
  Entry add = make_entry("add"), sub = make_entry("sub");
  add.name = "tilewright_add";
  sub.name = "tilewright_sub";
  add.code = {std::byte{0xc5}, std::byte{0xfc}, std::byte{0x58}, std::byte{0xc1}, std::byte{0xc3}};
  sub.code = {std::byte{0xc5}, std::byte{0xfc}, std::byte{0x5c}, std::byte{0xc1}, std::byte{0xc3}};
  Entry plan = make_entry("plan 2", 0);
  plan.name = "plan_of_a_model";
  write_file(path(), *encode_pack(std::vector{plan, add, sub}, kGenerator));
  const std::string code = output_of("objdump -d " + path());
  for (const Entry& entry : {add, sub}) {
    const std::string symbol =
        "<" + entry.name + "." + key_name(kGenerator, entry.key_text).substr(0, 8) + ">:";
    EXPECT_NE(code.find(symbol), std::string::npos) << code;
  }
  EXPECT_NE(code.find("vaddps %ymm1,%ymm0,%ymm0"), std::string::npos) << code;
  EXPECT_NE(code.find("vsubps %ymm1,%ymm0,%ymm0"), std::string::npos) << code;
  EXPECT_EQ(code.find(plan.name), std::string::npos) << code;  // it has no code
  // Every section is where its header says; nothing is loaded and nothing relocated.
  const std::string all = output_of("readelf --wide --all " + path());
  EXPECT_EQ(all.find("failed: "), std::string::npos) << all;
  EXPECT_EQ(all.find("arning"), std::string::npos) << all;
  EXPECT_EQ(all.find("rror"), std::string::npos) << all;
  EXPECT_NE(all.find("There are no relocations in this file"), std::string::npos) << all;
  EXPECT_NE(all.find("There are no program headers in this file"), std::string::npos) << all;
}

}  // namespace
}  // namespace tilewright::cache
