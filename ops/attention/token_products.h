// What the phases of attention for one token (attention_kernel.h) share: their scratch, how keys
// and values are asked for, and the last phase, the weighted sums of values.
//
// Tested by attention_test.
#pragma once

#include <cstdint>
#include <vector>

#include "jit/vir/builder.h"
#include "ops/attention/attention_kernel.h"
#include "ops/attention/head_vectors.h"
#include "ops/attention/key_blocks.h"

namespace tilewright::ops {

// A thread's scratch, in bytes from its begin. blocks: of KeyBlocks. chunk_place: i64, the chunk's
// first key - origin. queries: as the products want them. factors: f32 per head, what a chunk
// leaves of the sums before. units: likewise, of integers. scores: f32 [group][kChunkKeys], later
// the weights, with dots as bf16. value_scales: of i8, as scores lie. weights: of integers, the
// planes of each head (integer_products.h) and as much behind them as a step reads; else the
// scores.
struct TokenLayout {
  explicit TokenLayout(const AttentionKernel& spec);

  static constexpr std::int64_t blocks = 0, chunk_place = 16, queries = 64;
  static constexpr std::int64_t score_bytes = 4 * kChunkKeys;  // a head's
  std::int64_t query_bytes;                                    // a head's
  std::int64_t factors, units, scores, value_scales, weights;
  std::int64_t weight_bytes;  // a head's
  std::int64_t bytes;
};

inline constexpr KeyBlocks::Table kValueTable{AttentionArgs::v_blocks,
                                              AttentionArgs::v_token_stride};

// Vectors of bf16 that a key or value is read in as a whole, each two vectors of columns.
int bf16_pairs(const AttentionKernel& spec);

// Asks for the keys or values of `tokens` tokens from `address` on, which moves behind them;
// stride_slot: the argument that lies between them. With prefetch_only_jumps only if `asked` is not
// 0.
void prefetch_tokens(jit::vir::Builder& builder, const AttentionKernel& spec, int tokens,
                     jit::vir::Reg address, int stride_slot, jit::vir::Reg asked);

class WeightedValues {
 public:
  WeightedValues(jit::vir::Builder& builder, const AttentionKernel& spec, KeyBlocks& blocks,
                 const HeadVectors& head)
      : b_(builder), spec_(spec), blocks_(blocks), head_(head), at_(spec), part_(spec) {}

  // Adds to the part the values of `keys` keys from `values` on, by the weights in scratch; asks
  // for as many keys from `ahead` on, or for none where that is 0.
  void add(const KeyBlocks::Place& values, jit::vir::Reg keys, jit::vir::Reg ahead);

 private:
  // Sums over a chunk: [heads][count] vectors of columns, those of a head from `first` on. Of
  // integers those by the upper bytes of weights, then as many by the lower.
  struct Sums {
    int heads, first, count;
    std::vector<jit::vir::Reg> vectors;

    jit::vir::Reg& at(int head, int vector) {
      return vectors[static_cast<std::size_t>(head * count + vector)];
    }
  };

  void fetch_keys(int tokens, jit::vir::Reg ahead);
  std::vector<jit::vir::Reg> weights_of(jit::vir::Element element, jit::vir::Reg weights,
                                        int heads);
  void add_keys(const KeyBlocks::Place& place, jit::vir::Reg keys, jit::vir::Reg row,
                jit::vir::Reg ahead, Sums& sums);
  void add_pairs_of_keys(const KeyBlocks::Place& place, jit::vir::Reg keys, jit::vir::Reg row,
                         jit::vir::Reg ahead, Sums& sums);
  void add_integers(const KeyBlocks::Place& place, jit::vir::Reg keys, jit::vir::Reg row,
                    jit::vir::Reg factor, jit::vir::Reg ahead, Sums& sums);
  void add_four_keys(const std::vector<jit::vir::Address>& keys, jit::vir::Reg weights, Sums& sums);
  void order_integers(Sums& sums);
  void add_pair_of_keys(jit::vir::Reg first, jit::vir::Reg second, jit::vir::Reg weights,
                        Sums& sums);
  bool is_of_pair(int vector) const { return vector < 2 * bf16_pairs(spec_); }
  void order_columns(Sums& sums);

  jit::vir::Builder& b_;
  const AttentionKernel& spec_;
  KeyBlocks& blocks_;
  const HeadVectors& head_;
  TokenLayout at_;
  PartLayout part_;
};

}  // namespace tilewright::ops
