// Tails: every item is computed once however slow a thread is, who is free takes what others have
// left, steps too short have no tails; and in whole programs: the bits of one thread.
#include "ops/tails.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops/program_state.h"
#include "tests/program_model.h"

namespace tilewright::ops {
namespace {

constexpr std::int64_t kLong = 1 << 20;  // bytes of an item: two may be a piece

TEST(Tails, EachItemIsComputedOnceInEveryTurn) {
  constexpr int threads = 3;
  std::vector<Claim> claims(threads);
  for (const std::int64_t count : {0, 1, 2, 7, 95, 96, 1000}) {
    for (const std::int64_t bytes : {std::int64_t{0}, std::int64_t{30000}, kLong}) {
      constexpr int turns = 50;
      std::vector<std::vector<std::atomic<int>>> computed(turns);
      for (auto& turn : computed) {
        turn = std::vector<std::atomic<int>>(static_cast<std::size_t>(count));
      }
      Barrier barrier;
      run_team(threads, [&](int thread, int team) {
        for (int turn = 0; turn < turns; ++turn) {
          const Turn step{claims, (static_cast<std::uint64_t>(count * 3 + bytes) << 10) + 1};
          share_with_tails({count, bytes}, thread, team, step.part(turn), [&](WorkRange range) {
            for (std::int64_t item = range.begin; item < range.end; ++item) {
              computed[static_cast<std::size_t>(turn)][static_cast<std::size_t>(item)] += 1;
            }
          });
          barrier.wait(team, [] {});
        }
      });
      for (const auto& turn : computed) {
        for (const auto& item : turn) ASSERT_EQ(item, 1) << count << " of " << bytes;
      }
    }
  }
}

// Thread 1 does not come before thread 0 is done: what is left is its head.
TEST(Tails, WhoIsFreeTakesWhatOthersHaveLeft) {
  std::array<Claim, 2> claims;
  const auto items_of = [&](int thread, std::uint64_t number) {
    std::int64_t items = 0;
    share_with_tails({64, kLong}, thread, 2, {claims, number},
                     [&](WorkRange range) { items += range.end - range.begin; });
    return items;
  };
  EXPECT_EQ(items_of(0, 7), 32 + 8);
  EXPECT_EQ(items_of(1, 7), 32 - 8);
  EXPECT_EQ(items_of(1, 8), 32 + 8);  // what was taken in the turn before does not count
  EXPECT_EQ(items_of(0, 8), 32 - 8);
  EXPECT_EQ(items_of(0, 0), 32);
}

TEST(Tails, ShortStepsAndSharesOfOneHaveNone) {
  for (const Items& items : {Items{18, 60 << 10}, Items{2, kLong}, Items{96, 1 << 10}}) {
    const TailShare share(items, 1, 2);
    EXPECT_EQ(share.pieces(), 0) << items.count;
    EXPECT_EQ(share.head.end, items.count);
  }
  const TailShare share({96, 110 << 10}, 0, 2);  // 48 panels
  EXPECT_EQ(share.head.end, 36);
  EXPECT_EQ(share.pieces(), 3);
  EXPECT_EQ(share.piece(2).end, 48);
}

TEST(Tails, PartsOfAStepHaveTurnsOfTheirOwnWhileThereAreSome) {
  const Turn step{{}, 2 * kTurnsOfStep};
  EXPECT_EQ(step.part(0).number, 2 * kTurnsOfStep);
  EXPECT_EQ(step.part(255).number, 3 * kTurnsOfStep - 1);
  EXPECT_EQ(step.part(256).number, 0u);
  EXPECT_EQ(Turn{}.part(1).number, 0u);
}

// A thread that is slow with item 0 leaves all the rest to the other.
TEST(Tails, ItemsAreTakenWhenTheyAreComputed) {
  std::array<Claim, 2> claims;
  constexpr std::int64_t count = 9;
  TakenItems slow(count, 0, 2, {claims, 5}), fast(count, 1, 2, {claims, 5});
  ASSERT_TRUE(slow.takes(0));
  for (std::int64_t item = 0; item < count; ++item) EXPECT_EQ(fast.takes(item), item > 0) << item;
  for (std::int64_t item = 1; item < count; ++item) EXPECT_FALSE(slow.takes(item)) << item;

  for (const std::int64_t many : {count, kMostPieces + 1}) {  // no number; too many to count
    TakenItems even(many, 0, 2, {claims, many == count ? 0u : 6u});
    TakenItems odd(many, 1, 2, {claims, many == count ? 0u : 6u});
    for (std::int64_t item = 0; item < many; ++item) {
      ASSERT_EQ(even.takes(item), item % 2 == 0);
      ASSERT_EQ(odd.takes(item), item % 2 == 1);
    }
  }
}

// A weight of 8 MB, by a row, by a chunk, by several with their packing shared.
TEST(Tails, ProgramsHaveTheBitsOfOneThread) {
  const LlamaText text{
      "graph f(%x: f32[t, 512]) -> (f32[t, 4096]) {\n"
      "  %w = const \"w\" : f32[4096, 512]\n"
      "  %y = linear(%x, %w)\n"
      "  return %y\n"
      "}\n",
      {{"w", {4096, 512}}}};
  Model model(text, graph::DataType::f32);
  Program program = model.compile();
  for (const std::int64_t rows : {1, 5, 100, 1500}) {
    std::vector<Tensor> inputs{random_tensor(graph::DataType::f32, {rows, 512}, 3, 1.0)};
    const Tensor alone = run(program, inputs, {}, 1)[0];
    for (int i = 0; i < 5; ++i) {
      for (const int threads : {2, 3}) {
        EXPECT_EQ(run(program, inputs, {}, threads)[0].bytes, alone.bytes) << rows;
        const std::span<const Claim> claims = program.state().scratch.claims();
        EXPECT_TRUE(std::ranges::any_of(claims, [&](const Claim& claim) {
          return claim.taken >> 16 > program.state().turns - 2 * kTurnsOfStep;
        })) << "no tail was shared";
      }
    }
  }
}

}  // namespace
}  // namespace tilewright::ops
