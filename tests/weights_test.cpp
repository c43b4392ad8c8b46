// Tests of ops/weights: what is packed is found again; a released source's values come back bit for
// bit from every form of packing, and stay while a token stands for them.
#include "ops/weights.h"

#include <gtest/gtest.h>
#include <omp.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "ops/threads.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

struct Case {
  DataType source;
  bool gated, fits;          // fits: fp32 values that 16 bits hold
  bool twelve_bits = false;  // which then hold them
};

class Weights : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr std::int64_t kDepth = 45, kRows = 37;

  void SetUp() override {
    std::mt19937 engine(7);
    const auto bytes =
        static_cast<std::size_t>(kRows * kDepth * graph::size_in_bytes(GetParam().source));
    for (std::vector<char>& block : values_) {
      block.resize(bytes);
      for (char& byte : block) byte = static_cast<char>(engine());
      const auto size = static_cast<std::size_t>(graph::size_in_bytes(GetParam().source));
      for (std::size_t i = 0; i < bytes; i += size) {
        if (GetParam().fits) block[i] = block[i + 1] = 0;
        if (GetParam().twelve_bits) block[i + size - 1] %= 16;
      }
    }
  }

  std::vector<WeightBlock> blocks() const {
    std::vector<WeightBlock> result;
    for (const std::vector<char>& block : values_) {
      result.push_back({block.data(), kRows, kDepth * graph::size_in_bytes(GetParam().source)});
    }
    return result;
  }

  auto pack(const std::vector<WeightBlock>& sources) {
    return store_.pack(sources, kDepth, GetParam().source, GetParam().gated,
                       {true, GetParam().twelve_bits});
  }

  bool unpacks_to(const void* token, const std::vector<char>& expected) const {
    std::vector<char> result(expected.size());
    return store_.unpack(token, result.data()).ok() && result == expected;
  }

  std::vector<char> values_[2];
  WeightStore store_;
};

TEST_P(Weights, ReleasedValuesComeBack) {
  const std::vector<WeightBlock> sources = blocks();
  const auto packed = pack(sources);
  ASSERT_TRUE(packed.ok());
  EXPECT_EQ((*packed)->form.dtype, GetParam().fits ? DataType::bf16 : GetParam().source);
  EXPECT_EQ((*packed)->form.twelve_bits, GetParam().twelve_bits);
  std::vector<WeightBlock> tokens = sources;
  for (std::size_t i = 0; i < 2; ++i) {
    tokens[i].data = store_.release(sources[i].data);
    ASSERT_TRUE(WeightStore::is_token(tokens[i].data));
    EXPECT_TRUE(unpacks_to(tokens[i].data, values_[i]));
  }
  // The token takes the address's place; the address, which anybody may get next, is forgotten.
  EXPECT_EQ(pack(tokens)->get(), packed->get());
  EXPECT_NE(pack(sources)->get(), packed->get());
  EXPECT_FALSE(store_.pack({tokens[0]}, kDepth, GetParam().source, false, {}).ok());
}

TEST_P(Weights, ValuesStayWhileATokenStandsForThem) {
  const std::vector<WeightBlock> sources = blocks();
  ASSERT_TRUE(pack(sources).ok());
  const void* first = store_.release(sources[0].data);
  const void* second = store_.release(sources[1].data);
  store_.forget(first);
  EXPECT_TRUE(unpacks_to(second, values_[1]));
  EXPECT_FALSE(unpacks_to(first, values_[0]));
  store_.forget(second);
  EXPECT_EQ(store_.bytes(), 0);
}

TEST_P(Weights, AForgottenSourceDoesNotTakeOthersAlong) {
  const std::vector<WeightBlock> sources = blocks();
  ASSERT_TRUE(pack(sources).ok());
  const void* first = store_.release(sources[0].data);
  store_.forget(sources[1].data);  // it changed
  EXPECT_TRUE(unpacks_to(first, values_[0]));
  std::vector<WeightBlock> mixed = sources;
  mixed[0].data = first;
  EXPECT_FALSE(pack(mixed).ok());  // must not find what the changed source was part of
}

INSTANTIATE_TEST_SUITE_P(
    Forms, Weights,
    ::testing::Values(Case{DataType::f32, false, false}, Case{DataType::f32, true, false},
                      Case{DataType::f32, false, true}, Case{DataType::f32, true, true},
                      Case{DataType::bf16, false, false}, Case{DataType::f16, true, false},
                      Case{DataType::bf16, false, false, true},
                      Case{DataType::bf16, true, false, true},
                      Case{DataType::f32, true, true, true}));

// Random bits have too many exponents; and what one program has in 12 bits, another one finds.
TEST(WeightStore, TakesTwelveBitsWhereTheySave) {
  std::mt19937 engine(7);
  std::vector<std::uint16_t> random(64 * 64), regular(64 * 64, 0x3f80);
  for (std::uint16_t& value : random) value = static_cast<std::uint16_t>(engine());
  WeightStore store;
  const auto packed = [&](const std::vector<std::uint16_t>& values, bool twelve_bits) {
    return *store.pack({{values.data(), 64, 128}}, 64, DataType::bf16, false, {true, twelve_bits});
  };
  EXPECT_FALSE(packed(random, true)->form.twelve_bits);
  EXPECT_TRUE(packed(regular, true)->form.twelve_bits);
  EXPECT_EQ(packed(regular, false), packed(regular, true));
}

// What tiles ask of the weights of fp32 layers, in every form.
TEST(WeightStore, KnowsTheLargestMagnitudeOfFp32) {
  for (const auto& [value, form] : {std::pair{0.5f, PackedForm{DataType::bf16, false}},
                                    {0.5f, PackedForm{DataType::bf16, true}},
                                    {1.001953125f, PackedForm{DataType::f16, false}},
                                    {1.1f, PackedForm{DataType::f32, false}}}) {
    std::vector<float> values(100 * 64, value);
    values[70 * 64 + 3] = -3.0f;
    const auto largest = [&, form = form] {
      WeightStore store;  // a new one, which has not seen these addresses
      const auto weight = *store.pack({{values.data(), 100, 256}}, 64, DataType::f32, false,
                                      {true, form.twelve_bits});
      EXPECT_EQ(weight->form.dtype, form.dtype);
      EXPECT_EQ(weight->form.twelve_bits, form.twelve_bits);
      const float found = store.largest_magnitude(weight);
      EXPECT_EQ(store.largest_magnitude(weight), found) << "asked again";
      return found;
    };
    EXPECT_EQ(largest(), 3.0f);
    values[5] = -std::numeric_limits<float>::infinity();
    EXPECT_EQ(largest(), -values[5]);
    if (form.dtype == DataType::f16) continue;  // has no NaN
    values[5] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isinf(largest()));
  }
}

// What of a weight thread t of a team will read, its pages it touches first: the kernel counts who
// made it give a page. A few huge ones at least, which the temporary memory of a panel is not.
TEST(WeightStore, PagesAreTouchedByTheThreadThatReads) {
  const int usual = omp_get_max_threads();
  omp_set_num_threads(std::min(usual, 8));  // 16 MB for each
  constexpr std::int64_t depth = 4096, huge_pages = 8;
  const std::int64_t rows = 1024 * default_threads();  // so many huge pages for each
  const std::vector<float> values(static_cast<std::size_t>(rows * depth), 1.1f);
  const auto faults = [] {
    std::vector<long> of_thread(static_cast<std::size_t>(default_threads()));
    run_team(default_threads(), [&](int thread, int) {
      rusage usage{};
      getrusage(RUSAGE_THREAD, &usage);
      of_thread[static_cast<std::size_t>(thread)] = usage.ru_minflt;
    });
    return of_thread;
  };
  faults();  // makes the threads
  WeightStore store;
  std::vector<long> before = faults();
  ASSERT_TRUE(store.pack({{values.data(), rows, depth * 4}}, depth, DataType::f32, false, {}).ok());
  const std::vector<long> after = faults();
  std::ranges::transform(after, before, before.begin(), std::minus());
  omp_set_num_threads(usual);
  EXPECT_GE(std::ranges::min(before), huge_pages / 2);
}

TEST(WeightStore, OnlyWhatIsPackedOnceIsReleased) {
  const std::vector<float> values(64 * 8, 1.1f);
  const std::vector<WeightBlock> block = {{values.data(), 64, 32}};
  WeightStore store;
  EXPECT_EQ(store.release(values.data()), nullptr);
  ASSERT_TRUE(store.pack(block, 8, DataType::f32, false, {}).ok());
  ASSERT_TRUE(store.pack({{values.data(), 32, 32}}, 8, DataType::f32, false, {}).ok());
  EXPECT_EQ(store.release(values.data()), nullptr);
}

}  // namespace
}  // namespace tilewright::ops
