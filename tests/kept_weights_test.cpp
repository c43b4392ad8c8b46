// Tests of ops/kept_weights: packed weights come back from disk in every form, with the same bits;
// only for sources with exactly these contents, and never from a file that is not whole.
#include "ops/kept_weights.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cache_fixture.h"

namespace tilewright::ops {
namespace {

using cache::Mode;
using graph::DataType;
using Policy = KeptWeights::Policy;

struct Case {
  DataType source;
  bool gated = false, transposed = false;
  int form = 0;  // 0: as given, 1: in 16 bits, 2: in 12 bits
};

class KeptWeightsTest : public cache::CacheTest {
 protected:
  static constexpr std::int64_t kDepth = 45, kRows = 37;

  void SetUp() override {
    CacheTest::SetUp();
    cache::fs::create_directory(directory());
    cache::fs::permissions(directory(), cache::fs::perms::owner_all);
    fill({DataType::bf16});
  }

  void fill(const Case& wanted) {
    case_ = wanted;
    std::mt19937 engine(7);
    const auto size = static_cast<std::size_t>(graph::size_in_bytes(wanted.source));
    for (std::vector<char>& block : values_) {
      block.resize(static_cast<std::size_t>(kRows * kDepth) * size);
      for (char& byte : block) byte = static_cast<char>(engine());
      for (std::size_t i = 0; i < block.size(); i += size) {
        if (wanted.form > 0 && size == 4) block[i] = block[i + 1] = 0;
        if (wanted.form == 2) block[i + size - 1] %= 16;
      }
    }
  }

  std::vector<WeightBlock> blocks() const {
    const std::int64_t size = graph::size_in_bytes(case_.source);
    const std::int64_t stride = (case_.transposed ? kRows : kDepth) * size;
    std::vector<WeightBlock> result;
    for (const std::vector<char>& block : values_) {
      result.push_back({block.data(), kRows, stride, case_.transposed});
      if (case_.transposed) break;
    }
    return result;
  }

  std::shared_ptr<KeptWeights> kept(Policy policy = Policy::automatic, Mode mode = Mode::read_write,
                                    bool checked = false) const {
    return std::make_shared<KeptWeights>(cache::WeightDirectory::open(directory(), mode, 0), policy,
                                         checked);
  }

  // In a store of its own, as another process would.
  std::shared_ptr<const PackedWeight> pack(KeptWeights* from, bool keep = false) const {
    WeightStore store;
    const auto packed = store.pack(blocks(), kDepth, case_.source, case_.gated,
                                   {true, case_.form == 2}, from, keep);
    return packed ? *packed : nullptr;
  }
  static std::string bytes_of(const std::shared_ptr<const PackedWeight>& weight) {
    return {weight->data.get(), static_cast<std::size_t>(weight->bytes)};
  }
  std::vector<cache::fs::path> files() const {
    std::vector<cache::fs::path> found;
    std::error_code absent;
    for (const auto& file :
         cache::fs::directory_iterator(cache::fs::path(directory()) / "weights", absent)) {
      found.push_back(file.path());
    }
    return found;
  }
  // Whether the weight is found on disk now.
  bool is_mapped() const {
    const auto reader = kept();
    return pack(reader.get()) != nullptr && reader->counters().mapped == 1;
  }

  Case case_{DataType::bf16};
  std::vector<char> values_[2];
};

TEST_F(KeptWeightsTest, EveryFormComesBackBitForBit) {
  for (const Case& wanted :
       {Case{DataType::f32}, Case{DataType::f32, true}, Case{DataType::f32, false, false, 1},
        Case{DataType::f32, true, false, 1}, Case{DataType::f32, true, false, 2},
        Case{DataType::bf16}, Case{DataType::bf16, true}, Case{DataType::bf16, false, true},
        Case{DataType::bf16, true, false, 2}, Case{DataType::f16}}) {
    fill(wanted);
    const std::string cold = bytes_of(pack(nullptr));
    const auto writer = kept();
    EXPECT_EQ(bytes_of(pack(writer.get(), true)), cold);
    EXPECT_EQ(writer->counters().packed, 1u);
    const auto reader = kept(Policy::automatic, Mode::read_only, true);
    const auto mapped = pack(reader.get());
    EXPECT_EQ(bytes_of(mapped), cold);
    EXPECT_EQ(mapped->form.twelve_bits, wanted.form == 2);
    EXPECT_EQ(mapped->n, wanted.transposed ? kRows : 2 * kRows);
    EXPECT_EQ(reader->counters().packed, 0u);
    EXPECT_EQ(reader->counters().mapped, 1u);
  }
  EXPECT_EQ(files().size(), 10u);
}

TEST_F(KeptWeightsTest, ReleasedSourcesUnpackFromTheFile) {
  fill({DataType::f32, true, false, 2});
  pack(kept().get(), true);
  WeightStore store;
  const auto reader = kept();
  ASSERT_TRUE(store.pack(blocks(), kDepth, case_.source, true, {true, true}, reader.get()).ok());
  ASSERT_EQ(reader->counters().mapped, 1u);
  for (const std::vector<char>& block : values_) {
    const void* token = store.release(block.data());
    ASSERT_NE(token, nullptr);
    std::vector<char> unpacked(block.size());
    ASSERT_TRUE(store.unpack(token, unpacked.data()).ok());
    EXPECT_EQ(unpacked, block);
  }
}

// A part of a source is packed, and the source freed, while its whole is being hashed ahead.
TEST_F(KeptWeightsTest, SourcesMayGoOnceTheyAreReleased) {
  constexpr std::size_t kBytes = 256 << 20;
  pack(kept().get(), true);                   // a directory without weights hashes nothing
  for (int round = 0; round < 30; ++round) {  // the thread may begin late
    void* source = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ASSERT_NE(source, MAP_FAILED);
    WeightStore store;
    const auto reader = kept();
    store.hash_ahead({std::span(static_cast<const std::byte*>(source), kBytes)}, *reader);
    const std::vector<WeightBlock> part = {{source, kRows, kDepth * 2, false}};
    ASSERT_TRUE(store.pack(part, kDepth, DataType::bf16, false, {}, reader.get()).ok());
    ASSERT_NE(store.release(source), nullptr);
    munmap(source, kBytes);
    store.settle();
  }
}

// Names come from contents alone: any byte, and any other request, is another weight.
TEST_F(KeptWeightsTest, ChangedSourcesAreNotFound) {
  pack(kept().get(), true);
  ASSERT_TRUE(is_mapped());
  for (std::size_t at : {std::size_t{0}, values_[1].size() / 2, values_[1].size() - 1}) {
    values_[1][at] ^= 1;
    EXPECT_FALSE(is_mapped()) << at;
    values_[1][at] ^= 1;
  }
  std::swap(values_[0], values_[1]);
  EXPECT_FALSE(is_mapped());
  std::swap(values_[0], values_[1]);
  case_.gated = true;
  EXPECT_FALSE(is_mapped());
  case_.gated = false;
  case_.source = DataType::f16;
  EXPECT_FALSE(is_mapped());
  case_.source = DataType::bf16;
  case_.form = 2;
  EXPECT_FALSE(is_mapped());
  case_.form = 0;
  EXPECT_TRUE(is_mapped());
}

TEST_F(KeptWeightsTest, OtherAddressesAndThreadsAreTheSameContents) {
  fill({DataType::f32, true});
  pack(kept().get(), true);
  const std::vector<char> moved = values_[0];
  values_[0] = std::vector<char>(moved);
  EXPECT_TRUE(is_mapped());
}

TEST_F(KeptWeightsTest, OnlyWhereAllAreKeptTheQuestionMakesTheSecret) {
  const cache::fs::path secret = cache::fs::path(directory()) / "weights.secret";
  for (Policy policy : {Policy::off, Policy::automatic}) {
    EXPECT_FALSE(kept(policy)->any());
    EXPECT_EQ(kept(policy)->hash_ahead({}), nullptr);
    pack(kept(policy).get());
    EXPECT_FALSE(cache::fs::exists(secret));
  }
  EXPECT_TRUE(kept(Policy::on)->any());
  EXPECT_TRUE(cache::fs::exists(secret));
}

// What decides whether tiles may multiply by it is read from the mapped file, as from memory.
TEST_F(KeptWeightsTest, AMappedWeightKnowsItsLargestMagnitude) {
  for (int form : {0, 1, 2}) {
    for (bool finite : {true, false}) {
      fill({DataType::f32, false, false, form});
      // Its sign, exponent and mantissa are 0 but for the largest value: one that each form has.
      for (std::vector<char>& block : values_) std::ranges::fill(block, '\0');
      const float value = finite ? -3.0f : std::numeric_limits<float>::infinity();
      const float inexact = 0.1f;
      if (form == 0) std::memcpy(values_[0].data(), &inexact, sizeof inexact);
      std::memcpy(values_[1].data() + 36 * kDepth * 4 + 20, &value, sizeof value);
      pack(kept().get(), true);
      WeightStore store;
      const auto reader = kept();
      const auto mapped = *store.pack(blocks(), kDepth, DataType::f32, false, {true, form == 2},
                                      reader.get(), false);
      EXPECT_EQ(reader->counters().mapped, 1u);
      EXPECT_EQ(mapped->form.dtype, form == 0 ? DataType::f32 : DataType::bf16);
      EXPECT_EQ(mapped->form.twelve_bits, form == 2);
      EXPECT_EQ(store.largest_magnitude(mapped), std::abs(value));
    }
  }
}

TEST_F(KeptWeightsTest, NothingIsWrittenUnasked) {
  const auto automatic = kept();
  EXPECT_FALSE(automatic->any());
  pack(automatic.get());
  pack(kept(Policy::off).get(), true);
  pack(kept(Policy::on, Mode::read_only).get());
  EXPECT_TRUE(files().empty());
  EXPECT_FALSE(automatic->any());
  pack(kept(Policy::on).get());
  EXPECT_EQ(files().size(), 1u);
  EXPECT_TRUE(kept()->any());
  const auto off = kept(Policy::off);
  EXPECT_FALSE(off->any());
  pack(off.get());
  EXPECT_EQ(off->counters().packed, 1u);
}

TEST_F(KeptWeightsTest, RowsWithGapsAreNotKept) {
  std::vector<WeightBlock> with_gaps = blocks();
  for (WeightBlock& block : with_gaps) block.rows = kRows / 2;
  for (WeightBlock& block : with_gaps) block.row_stride *= 2;
  WeightStore store;
  const auto writer = kept(Policy::on);
  ASSERT_TRUE(store.pack(with_gaps, kDepth, case_.source, false, {}, writer.get()).ok());
  EXPECT_TRUE(files().empty());
}

// A header that proves itself before data that a kernel would follow out of the file.
TEST_F(KeptWeightsTest, DataThatLeadsOutOfTheFileIsRejected) {
  for (int form : {0, 2}) {
    fill({DataType::bf16, false, false, form});
    const auto original = pack(kept(Policy::on).get());
    ASSERT_EQ(files().size(), 1u);
    auto bytes = cache::read_file(files()[0]);
    auto header = cache::decode(std::span(bytes).first(cache::kWeightPage), bytes.size());
    ASSERT_TRUE(header.ok());
    cache::fs::remove(files()[0]);
    std::vector<std::byte> data(bytes.begin() + cache::kWeightPage, bytes.end());
    if (form == 2) {
      data[1] ^= std::byte{0x10};  // where the first panel's steps begin
    } else {
      data.resize(data.size() - 1);
    }
    auto directory = cache::WeightDirectory::open(this->directory(), Mode::read_write, 0);
    directory.save(header->key_text, header->form, data);
    const auto reader = kept(Policy::automatic, Mode::read_only);
    EXPECT_EQ(bytes_of(pack(reader.get())), bytes_of(original));
    EXPECT_EQ(reader->counters().packed, 1u);
    EXPECT_EQ(reader->directory().counters().rejects.at("not usable"), 1u);
    for (const auto& file : files()) cache::fs::remove(file);
  }
}

TEST_F(KeptWeightsTest, AFormThatIsUnknownIsRejected) {
  pack(kept(Policy::on).get());
  const auto listed = kept()->directory().list(false);
  ASSERT_EQ(listed.size(), 1u);
  const auto bytes = cache::read_file(files()[0]);
  cache::fs::remove(files()[0]);
  auto directory = cache::WeightDirectory::open(this->directory(), Mode::read_write, 0);
  directory.save(listed[0].key_text, "bf16 in 11 bits",
                 std::span(bytes).subspan(cache::kWeightPage));
  EXPECT_FALSE(is_mapped());
}

}  // namespace
}  // namespace tilewright::ops
