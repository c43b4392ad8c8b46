// See prompt_lookup.h.
//
// Tested by prompt_lookup_test.
#include "ops/prompt_lookup.h"

#include <span>

namespace tilewright::ops {

std::vector<std::int64_t> PromptLookup::guess(std::int64_t at_most) const {
  const std::int64_t count = std::min(at_most, guesses_);
  const auto size = static_cast<std::int64_t>(text_.size());
  std::vector<std::int64_t> guesses;
  for (std::int64_t n = std::min(most_matched_, size - 1); n > 0 && count > 0; --n) {
    const auto last = std::span(text_).last(static_cast<std::size_t>(n));
    // The latest place: a text that repeats itself changes less and less.
    const auto found = std::find_end(text_.begin(), text_.end() - 1, last.begin(), last.end());
    if (found == text_.end() - 1) continue;
    const std::int64_t from = found - text_.begin() + n;
    for (std::int64_t i = from; i < from + count; ++i) {
      // Behind the end of the text lie the guesses: a short period goes on.
      guesses.push_back(i < size ? text_[static_cast<std::size_t>(i)]
                                 : guesses[static_cast<std::size_t>(i - size)]);
    }
    break;
  }
  return guesses;
}

}  // namespace tilewright::ops
