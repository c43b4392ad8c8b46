// Runs an attention task: which queries meet which keys, and which of the two kernels computes
// them.
//
// A few queries (a step of decode, or of speculation) go one token at a time, so that one of them
// and sixteen of them get the same bits; more of them fill tiles of rows.
//
// Tested by program_test and task_test.
#pragma once

#include <cstdint>

#include "ops/task.h"

namespace tilewright::ops {

// One thread's share.
void run(const AttentionTask& task, const Frame& frame, int thread, int threads);

// Keys that query token `query` of `sequence` sees: [first, first + count).
struct KeyRange {
  std::int64_t first, count;
};
KeyRange keys_of(const AttentionTask& task, const Frame& frame, std::int64_t sequence,
                 std::int64_t query);

// Bytes of scratch that a thread needs.
std::int64_t scratch_bytes(const AttentionTask& task, const Frame& frame);

}  // namespace tilewright::ops
