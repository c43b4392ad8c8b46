// RaggedRows: see ragged_rows.h. Tested by kv_cache_test.
#include "ops/ragged_rows.h"

#include <fmt/format.h>

#include <utility>

namespace tilewright::ops {

Result<std::shared_ptr<const RaggedRows>> RaggedRows::make(std::vector<Sequence> sequences,
                                                           std::int64_t page_tokens,
                                                           std::int64_t memory_tokens) {
  auto made = std::make_shared<RaggedRows>();
  for (Sequence& sequence : sequences) {
    const std::size_t index = made->sequences.size();
    if (sequence.rows < 1 || sequence.length < 0) {
      return Error{fmt::format("sequence {} of a ragged step has {} rows after {} tokens", index,
                               sequence.rows, sequence.length)};
    }
    const auto pages = static_cast<std::int64_t>(sequence.pages.size());
    if (pages * page_tokens < sequence.length + sequence.rows) {
      return Error{fmt::format("sequence {} of a ragged step has {} pages of {} for {} tokens",
                               index, pages, page_tokens, sequence.length + sequence.rows)};
    }
    for (std::int64_t page : sequence.pages) {
      if (page < 0 || page > memory_tokens - page_tokens) {
        return Error{fmt::format("sequence {} of a ragged step has a page outside", index)};
      }
    }
    sequence.first_row = made->rows();
    made->sequence_of.insert(made->sequence_of.end(), static_cast<std::size_t>(sequence.rows),
                             static_cast<std::int32_t>(index));
    made->sequences.push_back(std::move(sequence));
  }
  return std::shared_ptr<const RaggedRows>(std::move(made));
}

}  // namespace tilewright::ops
