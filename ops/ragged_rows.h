// RaggedRows: which rows of a step are of which sequence, when the sequences have different
// lengths.
//
// A ragged step's tensors are [1, rows]: the rows of its sequences lie behind one another, some
// with one new token and some with hundreds. All but attention and the appending of keys and values
// sees rows only, so continuous batching needs no padding and no program of its own. Keys and
// values lie in pages that the front end's paged cache owns; a sequence is a list of them.
//
// Immutable once made, so that all layers and threads share one. Tested by kv_cache_test.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "jit/base/result.h"

namespace tilewright::ops {

struct RaggedRows {
  struct Sequence {
    std::int64_t first_row, rows;     // new tokens; at least one
    std::int64_t length;              // tokens before this step
    std::vector<std::int64_t> pages;  // where each begins, in tokens from the memory's start
  };
  std::vector<Sequence> sequences;
  std::vector<std::int32_t> sequence_of;  // by row

  std::int64_t rows() const { return static_cast<std::int64_t>(sequence_of.size()); }

  // Fills in first_row and sequence_of. page_tokens: per page. memory_tokens: that the pages must
  // lie in. Error: a sequence without rows, or with fewer pages than its tokens need; a page
  // outside.
  static Result<std::shared_ptr<const RaggedRows>> make(std::vector<Sequence> sequences,
                                                        std::int64_t page_tokens,
                                                        std::int64_t memory_tokens);
};

}  // namespace tilewright::ops
