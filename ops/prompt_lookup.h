// PromptLookup: guesses how a text goes on, from what followed its last tokens earlier in it.
//
// Why: a step with a few more tokens takes little longer than one without, because both read all
// weights once. Summaries, edits of code and repetitions take up whole phrases of what came before,
// and GreedySearch checks a guess of many tokens in one step. The idea is "prompt lookup decoding"
// (A. Saxena, 2023), which transformers has as `prompt_lookup_num_tokens`; wrong guesses cost time,
// never another token.
//
// Thread-compatible. Tested by prompt_lookup_test and greedy_search_test.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace tilewright::ops {

class PromptLookup {
 public:
  // At most `most_guesses` tokens at once, where the last `most_matched` tokens came before, or the
  // last `most_matched - 1`, down to 1.
  PromptLookup(std::int64_t most_guesses, std::int64_t most_matched)
      : most_guesses_(most_guesses), most_matched_(most_matched), guesses_(most_guesses) {}

  void set_text(std::vector<std::int64_t> tokens) { text_ = std::move(tokens); }
  void append(std::int64_t token) { text_.push_back(token); }

  // At most `at_most` tokens; none, where the last one is new.
  std::vector<std::int64_t> guess(std::int64_t at_most) const;

  // How many of so many guesses were right: where few are, fewer are made.
  void learn(std::int64_t guesses, std::int64_t right) {
    if (guesses == 0) return;
    guesses_ =
        right == guesses ? std::min(most_guesses_, 2 * guesses_) : std::max<std::int64_t>(right, 1);
  }

 private:
  std::int64_t most_guesses_, most_matched_;
  std::int64_t guesses_;  // that are worth making
  std::vector<std::int64_t> text_;
};

}  // namespace tilewright::ops
