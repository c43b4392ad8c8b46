// PromptLookup: which place is taken, how far it is read, and how many guesses follow from the
// last.
#include "ops/prompt_lookup.h"

#include <gtest/gtest.h>

#include <vector>

namespace tilewright::ops {
namespace {

using Tokens = std::vector<std::int64_t>;

Tokens guess(const Tokens& text, std::int64_t at_most, std::int64_t most_matched = 2) {
  PromptLookup lookup(10, most_matched);
  lookup.set_text(text);
  return lookup.guess(at_most);
}

TEST(PromptLookup, TakesTheLatestPlaceOfTheLongestMatch) {
  EXPECT_EQ(guess({1, 2, 3, 1, 2, 4, 5, 2, 6, 7, 1, 2}, 3), (Tokens{4, 5, 2}));
  EXPECT_EQ(guess({1, 2, 3, 1, 2, 4, 5, 2, 6, 7, 1, 2}, 3, 1), (Tokens{6, 7, 1}));
  EXPECT_EQ(guess({9, 2, 3, 8, 2}, 2), (Tokens{3, 8})) << "one token, if two are nowhere";
  EXPECT_EQ(guess({1, 2, 3}, 5), Tokens{});
  EXPECT_EQ(guess({1}, 5), Tokens{});
  EXPECT_EQ(guess({}, 5), Tokens{});
  EXPECT_EQ(guess({1, 2, 1, 2}, 0), Tokens{});
  EXPECT_EQ(guess({1, 2, 1, 2}, -1), Tokens{});
}

TEST(PromptLookup, APeriodGoesOnBehindTheEnd) {
  EXPECT_EQ(guess({4, 1, 2, 3, 1, 2, 3}, 7), (Tokens{1, 2, 3, 1, 2, 3, 1}));
  EXPECT_EQ(guess({5, 5}, 3), (Tokens{5, 5, 5}));
}

TEST(PromptLookup, GuessesAsMuchAsPays) {
  PromptLookup lookup(6, 1);
  lookup.set_text({5, 5});
  const auto guesses = [&] { return static_cast<int>(lookup.guess(100).size()); };
  EXPECT_EQ(guesses(), 6);
  lookup.learn(6, 2);
  EXPECT_EQ(guesses(), 2);
  lookup.learn(2, 2);
  EXPECT_EQ(guesses(), 4);
  lookup.learn(4, 4);
  EXPECT_EQ(guesses(), 6) << "no more than asked for";
  lookup.learn(6, 0);
  EXPECT_EQ(guesses(), 1) << "one, or nothing would ever be learnt again";
  lookup.learn(0, 0);
  EXPECT_EQ(guesses(), 1);
}

}  // namespace
}  // namespace tilewright::ops
