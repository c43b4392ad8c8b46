// The attention kernel: softmax(scale * q @ k.T + mask) @ v for one token of one sequence and one
// group of query heads that share a key/value head (GQA native), over keys and values found through
// a block table.
//
// Plain tensors, our own cache blocks and paged caches are three fillings of the same table: block
// i holds tokens [i * block_tokens, (i + 1) * block_tokens) as k[token][head_dim],
// v[token][head_dim] with a byte stride per token. The order of additions depends on the problem
// only (key index), so results are the same for any thread count.
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
  graph::DataType cache = graph::DataType::f32;  // k and v: f32, bf16, f16
  MaskKind mask = MaskKind::none;
  bool softcap = false;  // scores become cap * tanh(score / cap), before the mask
  bool slopes = false;   // ALiBi: slope * (key - first_key) is added to a score, a slope per head
  bool sinks = false;    // a score per head that takes part in the softmax and has no value
};

// Argument slots; strides in bytes.
//   k_blocks, v_blocks: arrays of pointers, one per block, to the first token of this kv head in
//     that block; entry 0 holds token 0; entries of blocks without keys that take part are not read
//   block_tokens: at least 1
//   first_key, key_count: keys [first_key, first_key + key_count) take part (left padding,
//     causality)
//   mask: pointer to this query token's mask row (element 0 = key 0); heads share it
//   scale, softcap: the floats' bits
//   slopes, sinks: pointers to one f32 per head of the group
//   scratch: at least scratch_bytes(spec, first_key + key_count), 64-byte aligned, private to the
//     thread
// key_count == 0 writes zeros (ATen's safe softmax); so does a row whose keys are all masked.
struct AttentionArgs {
  enum Slot {
    q,
    q_head_stride,
    output,
    output_head_stride,
    k_blocks,
    v_blocks,
    k_token_stride,
    v_token_stride,
    block_tokens,
    first_key,
    key_count,
    mask,
    scale,
    softcap,
    slopes,
    sinks,
    scratch,
    count
  };
};

std::int64_t scratch_bytes(const AttentionKernel& spec, std::int64_t keys);
std::string print(const AttentionKernel& spec);
// Error: why there is no kernel for this.
Status supported(const AttentionKernel& spec);
// REQUIRES: supported(spec)
jit::vir::Function build(const AttentionKernel& spec);
// The scalar reference, in double; args as the kernel's (scratch is not used).
void reference(const AttentionKernel& spec, const std::int64_t* args);

}  // namespace tilewright::ops
