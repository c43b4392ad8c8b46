// The attention kernel for many queries: softmax(scale * q @ k.T + mask) @ v for a tile of rows
// that share a key/value head. A row is one token of one query head of the group, so GQA fills
// tiles too.
//
// Each key and value is read once per tile, in place, through the same block tables as in
// attention_kernel.h. A tile's weights wait in scratch between the phases, which therefore grows
// with the number of keys but not with its square. Every row has its own range of keys (causality,
// windows, padding). The order of additions depends on neither the tile nor the blocks.
//
// Tested by prefill_attention_test.
#pragma once

#include <cstdint>
#include <string>

#include "ops/attention/attention_kernel.h"

namespace tilewright::ops {

// Rows of a tile: 24 with AVX2, 48 with AVX-512.
int prefill_rows(int lanes);
inline constexpr int kMostPrefillRows = 48;

// Argument slots; strides in bytes. What AttentionArgs has, too, is the same here. Per row of the
// tile, arrays of prefill_rows():
//   q_rows, output_rows: addresses; rows that do not exist can have any row's q and must have a
//     place for output
//   mask_rows: addresses, element 0 = key 0
//   first_keys, end_keys: i32, the row's keys; within [first_key, first_key + key_count)
//   slopes, sinks: f32; a slope times (key - the row's first key) is added to a score
// scratch: at least prefill_scratch_bytes(spec, key_count)
struct PrefillArgs {
  enum Slot {
    q_rows,
    output_rows,
    mask_rows,
    first_keys,
    end_keys,
    k_blocks,
    v_blocks,
    k_token_stride,
    v_token_stride,
    block_tokens,
    first_key,
    key_count,
    scale,
    softcap,
    slopes,
    sinks,
    scratch,
    count
  };
};

// The spec's group is not looked at. All that is supported() is supported here.
std::int64_t prefill_scratch_bytes(const AttentionKernel& spec, std::int64_t keys);
std::string print_prefill(const AttentionKernel& spec);
jit::vir::Function build_prefill(const AttentionKernel& spec);

}  // namespace tilewright::ops
