// How a strip of prefill attention multiplies: scores from queries and keys, sums of values from
// weights. With fused multiply-adds or vdpbf16ps (vector_products.cpp), or by AMX
// (tile_products.cpp); all read and write the scratch that PrefillLayout describes.
//
// Tested by prefill_attention_test.
#pragma once

#include <cstdint>
#include <memory>

#include "jit/vir/builder.h"
#include "ops/attention/prefill_kernel.h"

namespace tilewright::ops {

// The vectors of a strip's rows. Three, so that with them as many accumulators as a register file
// has are left room for a key and the queries.
inline constexpr int kRowVectors = 3;

// Keys are handled so many at a time; a chunk is filled up to that with zeros.
int key_granule(const PrefillKernel& spec);

// A tile's scratch, for all strips in turns, and behind it a strip's own part for each. Units are
// columns in f32, or with bf16 products pairs of columns.
struct PrefillLayout {
  explicit PrefillLayout(const PrefillKernel& spec);

  int rows;                  // of a strip
  int units;                 // of a head
  std::int64_t row_bytes;    // of a number for each row of a strip
  std::int64_t token_bytes;  // of `keys` and `tokens`

  // blocks: KeyBlocks. tile_state: what the thread had configured.
  // rescale: f32 [rows], what totals are multiplied by when a chunk is added.
  // keys: [kChunkKeys][units]; tokens: values likewise; values: as the products want them, which
  // may be `tokens` itself.
  // scores: f32 [kChunkKeys][rows]; weights: the same place, or pairs of bf16
  // [kChunkKeys / 2][rows][2]; sums: of tiles, on their way to the totals.
  std::int64_t blocks, tile_state, rescale, keys, tokens, values, scores, weights, sums, strips;

  // Of a strip: the largest score and the sum of weights, f32 [rows]; queries, [units][rows];
  // totals, f32 [rows][columns] or with tiles [head_dim][rows].
  std::int64_t most, sum, query, totals, strip_bytes;
};

class PrefillProducts {
 public:
  PrefillProducts(jit::vir::Builder& builder, const PrefillKernel& spec)
      : b_(builder), spec_(spec), at_(spec) {}
  PrefillProducts(const PrefillProducts&) = delete;
  PrefillProducts& operator=(const PrefillProducts&) = delete;
  virtual ~PrefillProducts() = default;

  // Around all others.
  virtual void begin() {}
  virtual void end() {}
  // Values of a chunk from its tokens.
  virtual void prepare_values() = 0;
  // Scores, times the scale, of `keys` keys, whole granules, with the queries of `strip`.
  virtual void score(jit::vir::Reg strip, jit::vir::Reg keys) = 0;
  // The strip's totals = totals * rescale + weights @ values over `keys` keys.
  virtual void add_values(jit::vir::Reg strip, jit::vir::Reg keys) = 0;
  // totals / divisors (f32 [rows], in the place of the sums) to the addresses in `output_rows`.
  virtual void finish(jit::vir::Reg strip, jit::vir::Reg output_rows) = 0;

 protected:
  jit::vir::Reg scratch(std::int64_t offset) {
    return b_.add(b_.arg(PrefillArgs::scratch), offset);
  }
  jit::vir::Address vector(jit::vir::Reg base, int index) const {
    return b_.at(base, index * b_.vector_bytes());
  }

  jit::vir::Builder& b_;
  const PrefillKernel& spec_;
  PrefillLayout at_;
};

std::unique_ptr<PrefillProducts> vector_products(jit::vir::Builder& builder,
                                                 const PrefillKernel& spec);
std::unique_ptr<PrefillProducts> tile_products(jit::vir::Builder& builder,
                                               const PrefillKernel& spec);

}  // namespace tilewright::ops
