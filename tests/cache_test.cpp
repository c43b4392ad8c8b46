// Tests of the kernel cache: keys, the entry encoding, modes, listing and pruning. What it must
// survive is in cache_trust_test.
//
// Tested by breaking the rules: each test fails if its check is removed from cache/.
#include <fcntl.h>
#include <sys/stat.h>

#include <set>
#include <thread>

#include "cache/sha256.h"
#include "tests/cache_fixture.h"

namespace tilewright::cache {
namespace {

TEST(Sha256Test, StandardVectors) {
  EXPECT_EQ(hex(sha256(std::string_view(""))),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hex(sha256(std::string_view("abc"))),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hex(sha256(std::string(1000000, 'a'))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(KeyTest, FieldsDoNotRunIntoEachOther) {
  const std::set<std::string> names = {key_name("", "ab"), key_name("a", "b"), key_name("ab", ""),
                                       key_name("b", "a"), key_name("", "")};
  EXPECT_EQ(names.size(), 5u);
  for (const std::string& name : names) EXPECT_EQ(name.size(), 64u);
  EXPECT_EQ(key_name("a", "b"), key_name("a", "b"));
}

// The name of an entry is part of the format: caches of other processes depend on it.
TEST(KeyTest, NameIsSha256OfTaggedFields) {
  std::string bytes = "f";
  bytes += std::string("\x01\0\0\0\0\0\0\0", 8) + "2";
  bytes += "g" + std::string("\x03\0\0\0\0\0\0\0", 8) + "gen";
  bytes += "k" + std::string("\x04\0\0\0\0\0\0\0", 8) + "text";
  EXPECT_EQ(key_name("gen", "text"), hex(sha256(bytes)));
}

TEST(KeyTest, GeneratorHashIsADigest) { EXPECT_EQ(generator_hash().size(), 64u); }

TEST(EntryTest, RoundTrip) {
  for (std::size_t code_bytes : {0u, 1u, 200u, 70000u}) {
    const Entry entry = make_entry("linear 1x32", code_bytes);
    const auto bytes = encode(entry, "generator");
    ASSERT_TRUE(bytes.ok());
    const auto decoded = decode(*bytes);
    ASSERT_TRUE(decoded.ok()) << decoded.error().message;
    EXPECT_EQ(decoded->entry, entry);
    EXPECT_EQ(decoded->generator, "generator");
  }
}

TEST(EntryTest, EveryBitFlipIsRejected) {
  std::vector<std::byte> bytes = *encode(make_entry("linear 1x32"), "generator");
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      bytes[i] ^= std::byte(1 << bit);
      EXPECT_FALSE(decode(bytes).ok()) << "byte " << i << ", bit " << bit;
      bytes[i] ^= std::byte(1 << bit);
    }
  }
  EXPECT_TRUE(decode(bytes).ok());
}

TEST(EntryTest, EveryTruncationAndExtensionIsRejected) {
  std::vector<std::byte> bytes = *encode(make_entry("linear 1x32"), "generator");
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode(std::span(bytes).first(size)).ok()) << size;
  }
  bytes.push_back(std::byte{0});
  EXPECT_FALSE(decode(bytes).ok());
}

// Lengths that lie, under a digest that is right: the bounds checks must hold by themselves.
void expect_wrong_lengths(std::vector<std::byte> bytes,
                          const std::map<std::size_t, std::uint64_t>& lies) {
  for (const auto& [field, lie] : lies) {
    for (std::size_t i = 0; i < 8; ++i) bytes[24 + 8 * field + i] = std::byte(lie >> (8 * i));
  }
  bytes.resize(bytes.size() - 32);
  const Digest digest = sha256(bytes);
  bytes.insert(bytes.end(), digest.begin(), digest.end());
  const auto decoded = decode(bytes);
  ASSERT_FALSE(decoded.ok()) << "field " << lies.begin()->first;
  EXPECT_EQ(decoded.error().message, "wrong part length");
}

TEST(RecipeTest, TextComesBack) {
  std::mt19937 random(3);
  std::string noise(100'000, ' ');
  for (char& c : noise) c = static_cast<char>(random());
  std::string vir;
  for (int i = 0; i < 3000; ++i) vir += "  %" + std::to_string(i) + " = fma_f32x8(%1, %2, %3)\n";
  for (const std::string& text : {std::string(), std::string("x"), noise, vir}) {
    const Recipe recipe(text);
    EXPECT_EQ(*recipe.text(), text);
    EXPECT_EQ(Recipe::of_packed(std::as_bytes(std::span(recipe.packed()))), recipe);
  }
  EXPECT_LT(Recipe(vir).packed().size(), vir.size() / 3);
}

// Under a right digest nothing but a fault of ours makes one; it is an error and no crash.
TEST(RecipeTest, MalformedOnesAreErrors) {
  const std::string text(2000, 'v');
  const std::string good = Recipe(text).packed();
  const auto text_of = [](std::string_view packed) {
    return Recipe::of_packed(std::as_bytes(std::span(packed))).text();
  };
  for (std::size_t size = 1; size < good.size(); ++size) {
    EXPECT_FALSE(text_of(good.substr(0, size)).ok()) << size;
  }
  std::mt19937 random(5);
  for (int i = 0; i < 20'000; ++i) {
    std::string bad = good;
    for (int k = 0; k < 3; ++k) bad[random() % bad.size()] = static_cast<char>(random());
    const Result<std::string> made = text_of(bad);
    EXPECT_TRUE(!made || made->size() <= kRecipeMaxBytes);
  }
}

TEST(EntryTest, WrongLengthsUnderAValidDigestAreRejected) {
  const std::vector<std::byte> good = *encode(make_entry("linear 1x32"), "generator");
  const std::uint64_t lies[] = {0, 1, good.size(), std::uint64_t{1} << 63, ~std::uint64_t{0}};
  for (std::size_t field = 0; field < 5; ++field) {
    for (std::uint64_t lie : lies) expect_wrong_lengths(good, {{field, lie}});
  }
}

TEST(EntryTest, LengthsWhoseSumWrapsAroundAreRejected) {
  const Entry entry = make_entry("linear 1x32");
  const std::vector<std::byte> good = *encode(entry, "generator");
  constexpr std::uint64_t kHalf = std::uint64_t{1} << 63;
  expect_wrong_lengths(good, {{0, kHalf + 9}, {1, kHalf + entry.key_text.size()}});
  expect_wrong_lengths(good, {{3, ~std::uint64_t{0}}, {4, entry.recipe.packed().size() + 201}});
}

TEST(EntryTest, TooLargeIsAnError) {
  EXPECT_FALSE(encode(make_entry("large", kEntryMaxBytes), "generator").ok());
}

TEST_F(CacheTest, RoundTripThroughAnotherStore) {
  const Entry entry = make_entry("linear 1x32");
  Store writer = open();
  EXPECT_EQ(writer.problem(), "");
  EXPECT_FALSE(writer.load(entry.key_text, kHost).has_value());
  writer.save(entry);
  EXPECT_EQ(writer.counters().writes, 1u);
  EXPECT_EQ(writer.counters().misses, 1u);
  EXPECT_TRUE(writer.counters().rejects.empty());

  Store reader = open();
  const std::optional<Entry> loaded = reader.load(entry.key_text, kHost);
  ASSERT_TRUE(loaded.has_value());
  EXPECT_EQ(*loaded, entry);
  EXPECT_EQ(reader.counters().hits, 1u);
  EXPECT_EQ(reader.counters().misses, 0u);
}

TEST_F(CacheTest, PlansLieBesideKernels) {
  Entry plan = make_entry("plan 2\nmodel", 0);
  plan.required_isa = 0;
  Store store = open();
  store.save(plan);
  store.save(make_entry("planar 1x32"));  // of no such kind
  EXPECT_EQ(store.load(plan.key_text, 0), plan);
  const std::vector<Listing> listings = store.list();
  ASSERT_EQ(listings.size(), 2u);
  for (const Listing& listing : listings) {
    EXPECT_EQ(listing.plan, listing.key_text == plan.key_text);
    EXPECT_EQ(listing.file.ends_with(".plan"), listing.plan);
    EXPECT_EQ(listing.problem, "");
  }
  // A plan in the place of a kernel is none.
  const fs::path file = fs::path(directory()) / listings[listings[0].plan ? 0 : 1].file;
  fs::rename(file, fs::path(file).replace_extension(".kernel"));
  EXPECT_FALSE(store.load(plan.key_text, 0).has_value());
  EXPECT_EQ(store.prune(0), 2u);
}

TEST_F(CacheTest, CacheCanBeMoved) {
  open().save(make_entry("linear 1x32"));
  fs::rename(directory(), base_ / "moved");
  Store moved = Store::open((base_ / "moved").string(), Mode::read_only, 0);
  EXPECT_TRUE(moved.load("linear 1x32", kHost).has_value());
}

TEST_F(CacheTest, OtherGeneratorIsAMiss) {
  open().save(make_entry("linear 1x32"));
  Store other = Store::open(directory(), Mode::read_write, 0, "another generator");
  EXPECT_FALSE(other.load("linear 1x32", kHost).has_value());
}

TEST_F(CacheTest, FullKeyIsCompared) {
  open().save(make_entry("linear 1x32"));
  fs::create_directories(path_of("linear 1x64").parent_path());
  fs::permissions(path_of("linear 1x64").parent_path(), fs::perms::owner_all);
  fs::copy_file(path_of("linear 1x32"), path_of("linear 1x64"));
  expect_reject("linear 1x64", "other key");

  // The same file name, made by another generator.
  write_file(path_of("linear 1x32"), *encode(make_entry("linear 1x32"), "another generator"));
  expect_reject("linear 1x32", "other key");
}

TEST_F(CacheTest, IsaMustBeASubsetOfTheHosts) {
  Entry entry = make_entry("linear 1x32");
  entry.required_isa = bit(Isa::avx2) | bit(Isa::avx512);
  open().save(entry);
  expect_reject(entry.key_text, "needs another CPU");
  EXPECT_TRUE(fs::exists(path_of(entry.key_text)));  // another host may need it
  EXPECT_TRUE(open().load(entry.key_text, entry.required_isa).has_value());
}

TEST_F(CacheTest, CorruptFileIsRejectedRemovedAndReplaced) {
  const Entry entry = make_entry("linear 1x32");
  open().save(entry);
  std::vector<std::byte> bytes = read_file(path_of(entry.key_text));
  bytes[100] ^= std::byte{1};
  write_file(path_of(entry.key_text), bytes);
  expect_reject(entry.key_text, "wrong digest");
  EXPECT_FALSE(fs::exists(path_of(entry.key_text)));
  open().save(entry);
  EXPECT_TRUE(open().load(entry.key_text, kHost).has_value());
}

TEST_F(CacheTest, EmptyFileIsRejected) {
  open().save(make_entry("linear 1x32"));
  write_file(path_of("linear 1x32"), {});
  expect_reject("linear 1x32", "too short");
}

TEST_F(CacheTest, HugeFileIsNotRead) {
  open().save(make_entry("linear 1x32"));
  fs::resize_file(path_of("linear 1x32"), std::uintmax_t{1} << 40);
  expect_reject("linear 1x32", "too long");
}

TEST_F(CacheTest, ReadOnlyModeReadsAndNeverChangesAnything) {
  Store missing = open(Mode::read_only);
  EXPECT_NE(missing.problem(), "");
  EXPECT_FALSE(fs::exists(directory()));

  open().save(make_entry("linear 1x32"));
  open().save(make_entry("broken"));
  fs::resize_file(path_of("broken"), 50);
  Store store = open(Mode::read_only);
  EXPECT_EQ(store.problem(), "");
  EXPECT_TRUE(store.load("linear 1x32", kHost).has_value());
  EXPECT_FALSE(store.load("broken", kHost).has_value());
  EXPECT_TRUE(fs::exists(path_of("broken")));
  store.save(make_entry("linear 1x64"));
  EXPECT_EQ(store.counters().writes, 0u);
  EXPECT_EQ(store.prune(0), 0u);
  EXPECT_EQ(store.list().size(), 2u);
}

TEST_F(CacheTest, OffTouchesNothing) {
  Store store = open(Mode::off);
  store.save(make_entry("linear 1x32"));
  EXPECT_FALSE(store.load("linear 1x32", kHost).has_value());
  EXPECT_EQ(store.problem(), "");
  EXPECT_EQ(store.counters().misses, 1u);
  EXPECT_EQ(store.counters().write_failures, 0u);
  EXPECT_FALSE(fs::exists(directory()));
}

TEST_F(CacheTest, UnusablePathsAreAProblemAndMisses) {
  write_file(base_ / "file", {});
  for (const std::string& path :
       {(base_ / "file").string(), (base_ / "file" / "below").string(), std::string("relative"),
        std::string(), std::string("/proc/tilewright"), "/" + std::string(5000, 'x')}) {
    Store store = Store::open(path, Mode::read_write, 0);
    EXPECT_NE(store.problem(), "") << path;
    store.save(make_entry("linear 1x32"));
    EXPECT_FALSE(store.load("linear 1x32", kHost).has_value());
    EXPECT_TRUE(store.list().empty());
  }
  EXPECT_FALSE(fs::exists("relative"));
}

TEST_F(CacheTest, DirectoryRemovedUnderneathIsAMiss) {
  Store store = open();
  store.save(make_entry("linear 1x32"));
  fs::remove_all(directory());
  EXPECT_FALSE(store.load("linear 1x32", kHost).has_value());
  store.save(make_entry("linear 1x32"));
  EXPECT_EQ(store.counters().write_failures, 1u);
}

TEST_F(CacheTest, ListShowsEveryEntryAndWhatIsWrongWithIt) {
  Store store = open();
  store.save(make_entry("linear 1x32", 300));
  store.save(make_entry("broken"));
  Store::open(directory(), Mode::read_write, 0, "older generator").save(make_entry("older"));
  fs::resize_file(path_of("broken"), 97);
  std::map<std::string, Listing> by_key;
  for (const Listing& listing : store.list()) by_key[listing.key_text] = listing;
  ASSERT_EQ(by_key.size(), 3u);
  EXPECT_EQ(by_key.at("").problem, "wrong length");
  const Listing& good = by_key.at("linear 1x32");
  EXPECT_EQ(good.problem, "");
  EXPECT_TRUE(good.current);
  EXPECT_EQ(good.code_bytes, 300u);
  EXPECT_EQ(good.required_isa, bit(Isa::avx2));
  EXPECT_EQ(good.name, "linear_f32");
  EXPECT_EQ(fs::path(directory()) / good.file, path_of("linear 1x32"));
  EXPECT_EQ(good.bytes, fs::file_size(path_of("linear 1x32")));
  EXPECT_FALSE(by_key.at("older").current);
  EXPECT_EQ(by_key.at("older").problem, "");
}

std::uint64_t total_bytes(const Store& store) {
  std::uint64_t total = 0;
  for (const Listing& listing : store.list()) total += listing.bytes;
  return total;
}

TEST_F(CacheTest, OldestEntriesMakeRoom) {
  constexpr std::uint64_t kLimit = 20000;
  Store store = open(Mode::read_write, kLimit);
  for (int i = 0; i < 60; ++i) {
    const std::string key = "kernel " + std::to_string(i);
    store.save(make_entry(key, 1000));
    ASSERT_TRUE(fs::exists(path_of(key)));
    // One second apart, in the past, so that age is what decides.
    const timespec times[2] = {{1000000 + i, 0}, {1000000 + i, 0}};
    ASSERT_EQ(utimensat(AT_FDCWD, path_of(key).c_str(), times, 0), 0);
    EXPECT_LE(total_bytes(store), kLimit) << i;
  }
  EXPECT_GT(total_bytes(store), kLimit / 2);
  EXPECT_TRUE(fs::exists(path_of("kernel 59")));
  EXPECT_FALSE(fs::exists(path_of("kernel 0")));
  EXPECT_EQ(store.counters().writes, 60u);
}

TEST_F(CacheTest, UseMakesAnOldEntryYoung) {
  Store store = open();
  for (const char* key : {"used", "unused"}) {
    store.save(make_entry(key));
    const timespec times[2] = {{1000000, 0}, {1000000, 0}};
    ASSERT_EQ(utimensat(AT_FDCWD, path_of(key).c_str(), times, 0), 0);
  }
  EXPECT_TRUE(store.load("used", kHost).has_value());
  EXPECT_EQ(store.prune(fs::file_size(path_of("used")) + 10), 1u);
  EXPECT_TRUE(fs::exists(path_of("used")));
  EXPECT_FALSE(fs::exists(path_of("unused")));
  EXPECT_EQ(store.prune(0), 1u);
  EXPECT_TRUE(store.list().empty());
}

TEST_F(CacheTest, EntryLargerThanTheLimitIsNotKept) {
  Store store = open(Mode::read_write, 1000);
  store.save(make_entry("small", 100));
  store.save(make_entry("large", 2000));
  EXPECT_EQ(store.counters().write_failures, 1u);
  EXPECT_EQ(store.list().size(), 1u);
}

TEST_F(CacheTest, PruningRemovesOldTemporaryFilesOnly) {
  Store store = open();
  store.save(make_entry("linear 1x32"));
  const fs::path shard = path_of("linear 1x32").parent_path();
  write_file(shard / ".tmp-old", {});
  write_file(shard / ".tmp-new", {});
  const timespec times[2] = {{1000000, 0}, {1000000, 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, (shard / ".tmp-old").c_str(), times, 0), 0);
  EXPECT_EQ(store.prune(1 << 20), 0u);
  EXPECT_FALSE(fs::exists(shard / ".tmp-old"));
  EXPECT_TRUE(fs::exists(shard / ".tmp-new"));
  EXPECT_EQ(store.list().size(), 1u);
}

TEST_F(CacheTest, ThreadsShareAStore) {
  Store store = open(Mode::read_write, 1 << 20);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        const Entry entry = make_entry("kernel " + std::to_string(i));
        const std::optional<Entry> loaded = store.load(entry.key_text, kHost);
        if (!loaded) store.save(entry);
        EXPECT_EQ(loaded.value_or(entry), entry);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Counters counters = store.counters();
  EXPECT_EQ(counters.hits + counters.misses, 400u);
  EXPECT_EQ(counters.write_failures, 0u);
  EXPECT_TRUE(counters.rejects.empty());
  EXPECT_EQ(store.list().size(), 50u);
}

TEST(DefaultDirectoryTest, GivenThenXdgThenHome) {
  setenv("XDG_CACHE_HOME", "/xdg", 1);
  setenv("HOME", "/home/somebody", 1);
  EXPECT_EQ(default_directory("/given"), "/given");
  EXPECT_EQ(default_directory(), "/xdg/tilewright");
  setenv("XDG_CACHE_HOME", "relative", 1);
  EXPECT_EQ(default_directory(), "/home/somebody/.cache/tilewright");
  unsetenv("XDG_CACHE_HOME");
  EXPECT_EQ(default_directory(), "/home/somebody/.cache/tilewright");
  setenv("HOME", "", 1);
  EXPECT_EQ(default_directory(), "");
  unsetenv("HOME");
  EXPECT_EQ(default_directory(), "");
}

}  // namespace
}  // namespace tilewright::cache
