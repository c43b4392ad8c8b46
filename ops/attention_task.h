// Runs an attention task: which queries meet which keys, and which of the two kernels computes
// them.
//
// A few queries (a step of decode, or of speculation) go one token at a time, so that one of them
// and sixteen of them get the same bits; more of them fill tiles of rows. A token's keys are cut
// into parts (attention_kernel.h), which are shared out among threads: 3 heads on 2 threads were
// done as 2 and 1. Who finishes the last part of a sequence's head merges all of them. In a ragged
// step (ragged_rows.h) each sequence goes as it would alone, so it gets the bits that it gets
// alone; several rows of one are a piece of its prompt, which goes as the prompt would. Padding on
// the left of a sequence does not count as queries, for the same reason.
//
// Tested by program_test and task_test.
#pragma once

#include <cstdint>

#include "ops/scratch.h"
#include "ops/task.h"

namespace tilewright::ops {

// One thread's share.
void run(const AttentionTask& task, const Frame& frame, int thread, int threads);

// The sequences of a step, and where the queries of each are in its tensors [batch, queries].
struct Queries {
  std::int64_t batch, first, count;
  std::int64_t at_once;  // alone, they would be the last of so many: chooses the kernel
  std::int64_t last() const { return first + count - 1; }
  // How many of them, at the beginning, are no tokens but fill the batch's shape: their output is
  // 0.
  std::int64_t padding() const { return count > at_once ? count - at_once : 0; }
};
std::int64_t sequence_count(const AttentionTask& task, const Frame& frame);
Queries queries_of(const AttentionTask& task, const Frame& frame, std::int64_t sequence);

// Keys that a query sees: [first, first + count). Those of its sequence begin at `origin`. Counted
// as they lie in their blocks.
struct KeyRange {
  std::int64_t first, count, origin;
};
KeyRange keys_of(const AttentionTask& task, const Frame& frame, std::int64_t batch,
                 std::int64_t query);

ScratchSizes scratch_of(const AttentionTask& task, const Frame& frame);

}  // namespace tilewright::ops
