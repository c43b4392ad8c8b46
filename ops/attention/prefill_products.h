// How a strip of prefill attention multiplies: scores from queries and keys, sums of values from
// weights. With fused multiply-adds or vdpbf16ps (vector_products.cpp), or by AMX
// (tile_products.cpp); all read and write the scratch that PrefillLayout describes. Both classes
// have the same members, of which PrefillBuilder is a template.
//
// Tested by prefill_attention_test.
#pragma once

#include <cstdint>
#include <vector>

#include "jit/vir/builder.h"
#include "ops/attention/head_vectors.h"
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

// What both have: the builder that they emit to, and its scratch.
class PrefillScratch {
 protected:
  PrefillScratch(jit::vir::Builder& builder, const PrefillKernel& spec)
      : b_(builder), spec_(spec), at_(spec) {}

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

class VectorProducts : PrefillScratch {
 public:
  VectorProducts(jit::vir::Builder& builder, const PrefillKernel& spec);

  // Around all others.
  void begin() {}
  void end() {}
  // Values of a chunk from its tokens.
  void prepare_values();
  // Scores, times the scale, of `keys` keys, whole granules, with the queries of `strip`.
  void score(jit::vir::Reg strip, jit::vir::Reg keys);
  // The strip's totals = totals * rescale + weights @ values over `keys` keys.
  void add_values(jit::vir::Reg strip, jit::vir::Reg keys);
  // totals / divisors (f32 [rows], in the place of the sums) to the addresses in `output_rows`.
  void finish(jit::vir::Reg strip, jit::vir::Reg output_rows);

 private:
  // Whole vectors of them.
  std::int64_t head_columns() const;
  jit::vir::Element unit() const;
  void multiply(jit::vir::Reg sum, jit::vir::Reg a, jit::vir::Reg b);
  void score_keys(int keys, jit::vir::Reg first, jit::vir::Reg queries, jit::vir::Reg to);
  // `width` vectors of columns of all rows.
  void add_columns(int width, jit::vir::Reg totals, jit::vir::Reg values, jit::vir::Reg steps);

  HeadVectors head_;
  std::int64_t total_bytes_;  // of a row of totals, and of a token's or a pair's values
};

class TileProducts : PrefillScratch {
 public:
  TileProducts(jit::vir::Builder& builder, const PrefillKernel& spec)
      : PrefillScratch(builder, spec) {}

  void begin();
  void end();
  void prepare_values();
  void score(jit::vir::Reg strip, jit::vir::Reg keys);
  void add_values(jit::vir::Reg strip, jit::vir::Reg keys);
  void finish(jit::vir::Reg strip, jit::vir::Reg output_rows);

 private:
  std::vector<jit::vir::Reg> zeros(int count);
  jit::vir::Reg quotient(jit::vir::Reg totals, int column, jit::vir::Reg inverse);
};

}  // namespace tilewright::ops
