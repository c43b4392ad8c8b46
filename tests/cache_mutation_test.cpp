// Files that are not what a writer wrote: every bit flipped, random mutations, mutations under a
// digest that is right. For every reader of file_reader.h.
//
// Tested by breaking the rules: without the digest, flips are accepted; without the checks of
// lengths, sealed mutations crash.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/fault_count.h"
#include "tests/file_reader.h"

namespace tilewright::testing {
namespace {

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t limit) { return limit == 0 ? 0 : random() % limit; }

// A range of at most 512 bytes: [first, second).
std::pair<std::size_t, std::size_t> range_of(Random& random, const Bytes& bytes) {
  const std::size_t begin = below(random, bytes.size());
  return {begin, std::min(bytes.size(), begin + 1 + below(random, 512))};
}

void put_integer(Random& random, Bytes& bytes) {
  constexpr std::uint64_t kEdges[] = {
      0, 1, 31, 32, 64, 96, 255, 4096, 1ull << 31, 1ull << 32, 1ull << 63, ~0ull, ~0ull - 63};
  const std::uint64_t values[] = {kEdges[below(random, std::size(kEdges))], bytes.size(),
                                  bytes.size() - below(random, 200), random()};
  const std::uint64_t value = values[below(random, std::size(values))];
  // Mostly in the header, where lengths are.
  const std::size_t limit =
      random() % 4 != 0 ? std::min<std::size_t>(bytes.size(), 128) : bytes.size();
  const std::size_t at = below(random, limit) / 4 * 4;
  for (std::size_t i = 0; i < 8 && at + i < bytes.size(); ++i) {
    bytes[at + i] = static_cast<std::byte>(value >> (8 * i));
  }
}

void mutate_once(Random& random, Bytes& bytes, const Bytes& other) {
  if (bytes.empty()) return;
  const auto at = [&](std::size_t i) { return bytes.begin() + static_cast<std::ptrdiff_t>(i); };
  const auto [begin, end] = range_of(random, bytes);
  switch (random() % 9) {
    case 0:
      bytes[begin] ^= static_cast<std::byte>(1u << (random() % 8));
      break;
    case 1:
      bytes[begin] = static_cast<std::byte>(random());
      break;
    case 2:
      bytes.resize(begin);
      break;
    case 3:  // a sector that was never written
      std::fill(at(begin), at(end), std::byte{0});
      break;
    case 4: {  // a piece twice
      const Bytes piece(at(begin), at(end));
      bytes.insert(at(below(random, bytes.size())), piece.begin(), piece.end());
      break;
    }
    case 5:
      bytes.erase(at(begin), at(end));
      break;
    case 6: {  // the beginning of one file and the end of another
      const std::size_t cut = below(random, std::min(bytes.size(), other.size()));
      bytes.resize(cut);
      bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(cut), other.end());
      break;
    }
    case 7:
      for (std::size_t i = random() % 64; i > 0; --i)
        bytes.push_back(static_cast<std::byte>(random()));
      break;
    default:
      put_integer(random, bytes);
  }
}

class FileMutation : public ::testing::TestWithParam<FileReader> {};

TEST_P(FileMutation, GoldenFilesAreAccepted) {
  for (Bytes file : GetParam().golden) {
    EXPECT_EQ(GetParam().read(file), Verdict::accepted);
    const Bytes before = file;
    GetParam().seal(file);
    EXPECT_EQ(file, before);  // so the seal is the writer's
  }
}

TEST_P(FileMutation, EveryBitFlipIsRejected) {
  std::int64_t tried = 0, wrong = 0;
  for (Bytes file : GetParam().golden) {
    const std::size_t step = file.size() > 16384 && !is_campaign() ? 61 : 1;
    for (std::size_t bit = 0; bit < 8 * file.size(); bit += step) {
      const auto mask = static_cast<std::byte>(1u << (bit % 8));
      file[bit / 8] ^= mask;
      wrong += GetParam().read(file) != Verdict::rejected;
      file[bit / 8] ^= mask;
      ++tried;
    }
  }
  record_fault("single-bit flips, " + GetParam().name, tried, wrong);
}

TEST_P(FileMutation, RandomMutationsAreRejected) {
  Random random(1);
  const std::vector<Bytes>& golden = GetParam().golden;
  std::int64_t tried = 0, wrong = 0;
  for (const std::int64_t count = cases(50'000, 2'000'000); tried < count;) {
    // Mostly the small file: the digest of the large one is what takes the time.
    const std::size_t which = random() % 16 < 13 ? 0 : random() % golden.size();
    Bytes bytes = golden[which];
    for (std::size_t i = random() % 3 + 1; i > 0; --i) {
      mutate_once(random, bytes, golden[random() % golden.size()]);
    }
    if (std::ranges::find(golden, bytes) != golden.end()) continue;
    wrong += GetParam().read(bytes) != Verdict::rejected;
    ++tried;
  }
  record_fault("random mutations, " + GetParam().name, tried, wrong);
}

// Whoever can make the digest right owns the files; but no bytes may crash the reader, and what it
// accepts must be for this key, generator and CPU.
TEST_P(FileMutation, SealedMutationsAreUnderstoodOrRejected) {
  Random random(2);
  const std::vector<Bytes>& golden = GetParam().golden;
  std::int64_t tried = 0, wrong = 0, accepted = 0;
  for (const std::int64_t count = cases(50'000, 2'000'000); tried < count; ++tried) {
    Bytes bytes = golden[random() % 16 < 13 ? 0 : random() % golden.size()];
    for (std::size_t i = random() % 3 + 1; i > 0; --i) {
      mutate_once(random, bytes, golden[random() % golden.size()]);
    }
    GetParam().seal(bytes);
    const Verdict verdict = GetParam().read(bytes);
    wrong += verdict == Verdict::wrong;
    accepted += verdict == Verdict::accepted;
  }
  EXPECT_GT(accepted, 0);      // the seal works: other code under a right digest is accepted
  EXPECT_LT(accepted, tried);  // and keys, lengths and CPUs are looked at
  record_fault("mutations under a right digest, " + GetParam().name, tried, wrong);
}

INSTANTIATE_TEST_SUITE_P(Readers, FileMutation, ::testing::ValuesIn(file_readers()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace tilewright::testing
