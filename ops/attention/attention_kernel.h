// The attention kernel: a part of softmax(scale * q @ k.T + mask) @ v, for one token of one
// sequence and one group of query heads that share a key/value head (GQA native), over a range of
// its keys, found through a block table. merge_kernel.h makes the token's output of its parts.
//
// Plain tensors, our own cache blocks and paged caches are three fillings of the same table: block
// i holds tokens [i * block_tokens, (i + 1) * block_tokens) as k[token][head_dim],
// v[token][head_dim] with a byte stride per token. Parts are ranges of kPartKeys keys, counted from
// the sequence's first: the order of additions depends on the problem only, so results are the same
// for any thread count and any padding.
//
// Within a part, keys come in chunks: scores, softmax and weighted sum of 64 keys before the next
// 64, rescaled when a larger score appears (Milakov and Gimelshein, Online normalizer calculation
// for softmax, 2018; Dao, FlashAttention-2, 2023). So while a chunk's scores are computed its
// values come from memory, and while its values are summed, the next chunk's keys.
//
// Of i8, the f32 scales of a block's block_tokens tokens lie before them (ops/kv_cache.h). Keys are
// widened in registers, or multiplied as they are (integer_products.h), and a score multiplied by
// its key's scale; a value's scale goes into its weight once the softmax has summed that.
//
// Tested by attention_test (double-precision reference; block tables of one block and many).
#pragma once

#include <cstdint>
#include <string>

#include "graph/type.h"
#include "jit/base/result.h"
#include "jit/vir/vir.h"

namespace tilewright::ops {

enum class MaskKind : std::uint8_t {
  none,
  boolean,  // u8, nonzero = may attend
  additive  // f32
};

struct AttentionKernel {
  int lanes = 8;
  int group = 1;                                 // query heads per key/value head
  int head_dim = 64;                             // of q and k, and of v
  graph::DataType input = graph::DataType::f32;  // q and output: f32, bf16, f16
  graph::DataType cache = graph::DataType::f32;  // k and v: f32, bf16, f16, i8
  MaskKind mask = MaskKind::none;
  bool softcap = false;  // scores become cap * tanh(score / cap), before the mask
  bool slopes = false;   // ALiBi: slope * (key - origin) is added to a score, a slope per head
  bool sinks = false;    // a score per head that takes part in the softmax and has no value
  // Products by vdpbf16ps, of bf16 q, k and v; of scores in as many columns as fill vectors. The
  // weights of values are rounded to bf16, as PyTorch rounds them.
  bool dots = false;
  // Products by vpdpbusd, of 16-bit queries with a cache of i8, over 16-bit integers that queries
  // and weights are rounded to (integer_products.h).
  bool integers = false;
  // How keys and values are asked for, which changes no bit: into L1, or 1: into L2; all, or only
  // what does not lie behind what is read before it.
  int prefetch_level = 0;
  bool prefetch_only_jumps = false;

  bool has_scales() const { return cache == graph::DataType::i8; }
};

// Keys of a part. Few enough to share out a short context of few heads among threads, many enough
// that merging parts is little work beside computing them.
constexpr std::int64_t kPartKeys = 256;

// Keys that both attention kernels work on at a time.
constexpr std::int64_t kChunkKeys = 64;

// What a part holds of one query head: unnormalised output as f32, padded to full vectors of
// `lanes`, then the largest score (f32; minus infinity if no key may be attended to) that its
// weights exp(score - largest) are relative to, then their sum (f32). A group's heads follow each
// other at these bytes.
struct PartLayout {
  explicit PartLayout(const AttentionKernel& spec)
      : most(4 * ((spec.head_dim + spec.lanes - 1) / spec.lanes * spec.lanes)),
        sum(most + 4),
        bytes((sum + 4 + 63) / 64 * 64) {}
  std::int64_t most, sum, bytes;
};

// Argument slots; strides in bytes.
//   part: group * PartLayout(spec).bytes, 64-byte aligned
//   k_blocks, v_blocks: arrays of pointers, one per block, to the first token of this kv head in
//     that block; entry 0 holds token 0; entries of blocks without keys that take part are not read
//   block_tokens: at least 1
//   first_key, key_count: keys [first_key, first_key + key_count) make this part
//   first_chunk: keys of the first chunk, 1..kChunkKeys, if the part has so many
//   next_key: what the thread reads after this part, at k_token_stride: asked for beside the last
//     sums, and never read. Any address
//   origin: the first key that the token sees, in whatever part (left padding, windows)
//   mask: pointer to this query token's mask row (element 0 = key 0); heads share it
//   scale, softcap: the floats' bits
//   slopes: pointer to one f32 per head of the group
//   scratch: at least scratch_bytes(spec), 64-byte aligned, private to the thread
struct AttentionArgs {
  enum Slot {
    q,
    q_head_stride,
    part,
    k_blocks,
    v_blocks,
    k_token_stride,
    v_token_stride,
    block_tokens,
    first_key,
    key_count,
    first_chunk,
    next_key,
    origin,
    mask,
    scale,
    softcap,
    slopes,
    scratch,
    count
  };
};

// That a token's keys, or values, of one head take in memory.
std::int64_t row_bytes(const AttentionKernel& spec);
std::int64_t scratch_bytes(const AttentionKernel& spec);
std::string print(const AttentionKernel& spec);
// Error: why there is no kernel for this.
Status supported(const AttentionKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build(const AttentionKernel& spec);
// The scalar reference, in double; args as the kernel's (scratch is not used).
void reference(const AttentionKernel& spec, const std::int64_t* args);

}  // namespace tilewright::ops
