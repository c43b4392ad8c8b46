// The attention kernel for many queries: softmax(scale * q @ k.T + mask) @ v for a tile of rows
// that share a key/value head. A row is one token of one query head of the group, so GQA fills
// tiles too.
//
// A tile is strips of rows. Its keys come in chunks of 64: a chunk of keys and values is brought
// into scratch once, in the form that the products want, and each strip then does its scores,
// softmax and weighted sum of it before the next chunk comes, rescaled when a larger score appears
// (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao, FlashAttention-2,
// 2023). So all that is read twice is in L1 or L2, whatever the length, and scratch is constant.
//
// Every row has its own range of keys (causality, windows, padding). Chunks end at places that the
// caller fixes for a whole sequence: which rows share a tile, how many strips it has and where
// blocks of keys end changes no bit.
//
// Tested by prefill_attention_test.
#pragma once

#include <cstdint>
#include <string>

#include "ops/attention/attention_kernel.h"
#include "ops/gemm/linear_kernel.h"

namespace tilewright::ops {

// Rows of a strip: 24 with AVX2, 48 with AVX-512.
int strip_rows(int lanes);
inline constexpr int kMostStrips = 4;
inline constexpr int kMostTileRows = kMostStrips * 48;

// The keys that some row of a strip sees end before `end`. Those in [sure_first, sure_end) may be
// seen by all of its rows that exist: their ranges are not looked at there.
struct StripKeys {
  std::int64_t end, sure_first, sure_end;
};

// fma: any types. dot and tiles: q, keys and values are bf16, and weights are rounded to bf16, as
// PyTorch rounds them; tiles want a head_dim of whole rows of tiles, 32.
struct PrefillKernel {
  AttentionKernel attention;  // its group is not looked at
  Arithmetic arithmetic = Arithmetic::fma;

  bool is_paired() const { return arithmetic != Arithmetic::fma; }
};

// Argument slots; strides in bytes. What AttentionArgs has, too, is the same here. Arrays have an
// entry for each row of the tile, strip_rows() for each strip:
//   q_rows, output_rows: addresses; rows that do not exist can have any row's q and must have a
//     place for output
//   mask_rows: addresses, element 0 = key 0
//   first_keys, end_keys: i32, the row's keys; within [first_key, first_key + key_count)
//   slopes, sinks: f32; a slope times (key - the row's first key) is added to a score
//   strips: an array of strip_count StripKeys
//   first_chunk: keys of the first chunk, 1..kChunkKeys
//   scratch: at least prefill_scratch_bytes(), 64-byte aligned, private to the thread
struct PrefillArgs {
  enum Slot {
    q_rows,
    output_rows,
    mask_rows,
    first_keys,
    end_keys,
    strips,
    strip_count,
    k_blocks,
    v_blocks,
    k_token_stride,
    v_token_stride,
    block_tokens,
    first_key,
    key_count,
    first_chunk,
    scale,
    softcap,
    slopes,
    sinks,
    scratch,
    count
  };
};

std::int64_t prefill_scratch_bytes(const PrefillKernel& spec, int strips);
std::string print(const PrefillKernel& spec);
// Error: why there is no kernel for this.
Status supported(const PrefillKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build(const PrefillKernel& spec);

}  // namespace tilewright::ops
