// The attention kernel for many queries. For each chunk of keys:
//
//   gather   keys and values from their blocks into scratch; of i8 or 16 bits they are widened,
//            unless the products are of bf16; values as the products want them
//   and for each strip of rows
//   scores   [keys][rows], so that lanes are rows
//   bend     softcap and slopes; masks
//   limit    the rows' ranges of keys, where they end; each row's largest score
//   softmax  down the keys, all rows of a vector at once: nothing is summed across lanes
//   sums     of values, added to the strip's totals
//
// Phases are separate loops because an activation beside the accumulators would spill; what passes
// between them stays in L1.
//
// Tested by prefill_attention_test.
#include "ops/attention/prefill_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "jit/math.h"
#include "jit/vir/builder.h"
#include "ops/attention/head_vectors.h"
#include "ops/attention/key_blocks.h"
#include "ops/attention/prefill_products.h"
#include "ops/attention/transpose.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kTileColumns = 32;  // of bf16
constexpr std::int64_t kBlocksBytes = 16, kTileStateBytes = 64;

std::int64_t in_lines(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

int units_of(const PrefillKernel& spec) {
  return spec.is_paired() ? spec.attention.head_dim / 2 : spec.attention.head_dim;
}

template <class Products>
class PrefillBuilder {
 public:
  explicit PrefillBuilder(const PrefillKernel& kernel)
      : kernel_(kernel),
        spec_(kernel.attention),
        at_(kernel),
        b_(name(kernel), spec_.lanes, PrefillArgs::count),
        blocks_(b_, {PrefillArgs::first_key, PrefillArgs::key_count, PrefillArgs::block_tokens,
                     PrefillArgs::scratch, at_.blocks}),
        products_(b_, kernel) {}

  jit::vir::Function run() && {
    blocks_.find_first();
    products_.begin();
    each_strip([&] { begin_strip(); });
    const KeyBlocks::Place place = blocks_.first();
    key_ = b_.arg(PrefillArgs::first_key);
    Reg remaining = blocks_.key_count(), size = b_.arg(PrefillArgs::first_chunk);
    b_.loop(remaining, [&] {
      count_ = blocks_.take(remaining, size);
      b_.assign(size, b_.constant(kChunkKeys));
      gather(place);
      products_.prepare_values();
      each_strip([&] {
        Reg left = b_.sub(strip_keys(0), key_);
        keys_ = b_.max(b_.min(left, count_), b_.constant(0));
        b_.if_nonzero(keys_, [&] { add_chunk(); });
      });
      b_.add_to(key_, count_);
    });
    each_strip([&] { finish_strip(); });
    products_.end();
    return std::move(b_).finish();
  }

 private:
  static std::string name(const PrefillKernel& kernel) {
    std::string text = print(kernel);
    std::replace(text.begin(), text.end(), ' ', '.');
    return text;
  }

  Reg scratch(std::int64_t offset) { return b_.add(b_.arg(PrefillArgs::scratch), offset); }
  Address vector(Reg base, int index) const { return b_.at(base, index * b_.vector_bytes()); }

  // With strip_ at the strip's scratch, rows_ the offset of its rows in arrays of four bytes, and
  // ranges_ at its StripKeys.
  template <class Body>
  void each_strip(const Body& body) {
    strip_ = scratch(at_.strips);
    rows_ = b_.constant(0);
    ranges_ = b_.arg(PrefillArgs::strips);
    b_.loop(b_.arg(PrefillArgs::strip_count), [&] {
      body();
      b_.add_to(strip_, at_.strip_bytes);
      b_.add_to(rows_, at_.row_bytes);
      b_.add_to(ranges_, sizeof(StripKeys));
    });
  }
  Reg strip_keys(int field) { return b_.load_gpr(Element::i64, b_.at(ranges_, 8 * field)); }
  // The strip's part of an array of addresses.
  Reg row_addresses(PrefillArgs::Slot slot) { return b_.lea(b_.at(b_.arg(slot), rows_, 2)); }
  // Of first_keys, end_keys, slopes, sinks.
  Reg row_numbers(PrefillArgs::Slot slot, int index) {
    return b_.load(Element::f32, b_.at(b_.arg(slot), rows_, 1, index * b_.vector_bytes()));
  }
  Reg strip_vector(std::int64_t offset, int index) {
    return b_.load(Element::f32, b_.at(strip_, offset + index * b_.vector_bytes()));
  }
  void set_strip_vector(std::int64_t offset, int index, Reg value) {
    b_.store(Element::f32, b_.at(strip_, offset + index * b_.vector_bytes()), value);
  }

  // A sink takes part in the softmax as a key without a value would.
  void begin_strip() {
    for (int v = 0; v < kRowVectors; ++v) {
      Reg most = spec_.sinks ? row_numbers(PrefillArgs::sinks, v) : b_.splat(kMinusInfinity);
      set_strip_vector(at_.most, v, most);
      set_strip_vector(at_.sum, v, spec_.sinks ? b_.splat(1.0f) : b_.zero());
    }
    Reg total = b_.add(strip_, at_.totals), zero = b_.zero();
    b_.loop(b_.constant((at_.strip_bytes - at_.totals) / b_.vector_bytes()), [&] {
      b_.store(Element::f32, b_.at(total), zero);
      b_.add_to(total, b_.vector_bytes());
    });
    transpose_queries();
  }

  void transpose_queries() {
    const DataType unit = kernel_.is_paired() ? DataType::i32 : spec_.input;
    Reg to_rows = b_.add(strip_, at_.query);
    Reg rows = row_addresses(PrefillArgs::q_rows);
    b_.loop(b_.constant(kRowVectors), [&] {
      Reg to = b_.copy(to_rows);
      for_columns(b_, {at_.units, {}}, 1, Block::Part::masked, [&](const Block& block) {
        std::vector<Reg> square;
        for (int row = 0; row < b_.lanes(); ++row) {
          Reg from = b_.load_gpr(Element::i64, b_.at(rows, 8 * row));
          square.push_back(load(b_, unit, from, block));
        }
        square = transpose(b_, square);
        for (int column = 0; column < b_.lanes(); ++column) {
          b_.store(Element::f32, b_.at(to, column * at_.row_bytes),
                   square[static_cast<std::size_t>(column)]);
        }
        b_.add_to(to, b_.lanes() * at_.row_bytes);
      });
      b_.add_to(rows, 8 * b_.lanes());
      b_.add_to(to_rows, b_.vector_bytes());
    });
  }

  // --- a chunk of keys and values

  void gather(const KeyBlocks::Place& place) {
    const KeyBlocks::Table keys{PrefillArgs::k_blocks, PrefillArgs::k_token_stride};
    const KeyBlocks::Table values{PrefillArgs::v_blocks, PrefillArgs::v_token_stride};
    std::vector<KeyBlocks::Table> tables{keys, values};
    if (spec_.has_scales()) {
      tables.push_back({keys.blocks, keys.stride, true});
      tables.push_back({values.blocks, values.stride, true});
    }
    const std::array<Reg, 2> to{scratch(at_.keys), scratch(at_.tokens)};
    blocks_.walk(place, b_.copy(count_), tables, [&](std::span<const Reg> at, Reg tokens) {
      b_.loop(tokens, [&] {
        for (std::size_t i = 0; i < tables.size() && i < to.size(); ++i) {
          Reg scale = spec_.has_scales() ? b_.broadcast(Element::f32, b_.at(at[i + 2])) : Reg{};
          copy_token(at[i], to[i], scale);
          b_.add_to(at[i], b_.arg(tables[i].stride));
          b_.add_to(to[i], at_.token_bytes);
          if (spec_.has_scales()) b_.add_to(at[i + 2], kScaleBytes);
        }
      });
    });
    // What is behind the last token has weights of zero, which must not meet NaN.
    Reg zero = b_.zero();
    Reg missing = b_.bit_and(b_.sub(b_.constant(0), count_), key_granule(kernel_) - 1);
    b_.loop(missing, [&] {
      for (Reg row : to) {
        for_vectors(
            [&](const Block& block) { b_.store(Element::f32, address(b_, row, 4, block), zero); });
        b_.add_to(row, at_.token_bytes);
      }
    });
  }

  void copy_token(Reg from, Reg to, Reg scale) {
    for_vectors([&](const Block& block) {
      Reg value = load(b_, kernel_.is_paired() ? DataType::i32 : spec_.cache, from, block);
      if (scale.valid()) value = b_.vmul(value, scale);
      b_.store(Element::f32, address(b_, to, 4, block), value);
    });
  }

  // Of a token's units; the last one is stored whole, with zeros behind the last unit.
  void for_vectors(const BlockBody& body) {
    for_columns(b_, {at_.units, {}}, 4, Block::Part::masked, body);
  }

  // --- a strip and a chunk

  void add_chunk() {
    const int granule = key_granule(kernel_);
    Reg keys = b_.bit_and(b_.add(keys_, granule - 1), -granule);
    products_.score(strip_, keys);
    if (spec_.softcap || spec_.slopes) bend_scores(keys);
    if (spec_.mask != MaskKind::none) add_masks();
    limit_keys(keys);
    softmax(keys);
    products_.add_values(strip_, keys);
  }

  // The body for each of `keys` keys, `step` at a time, with `scores` at the first one's row.
  template <class Body>
  void each_key(Reg keys, int step, const Body& body) {
    Reg scores = scratch(at_.scores);
    const int shift = step == 4 ? 2 : step - 1;  // of 1, 2, 4
    b_.loop(shift == 0 ? b_.copy(keys) : b_.shift_right(keys, shift), [&] {
      body(scores);
      b_.add_to(scores, step * at_.row_bytes);
    });
  }
  Reg score(Reg scores, int key, int index) {
    return b_.load(Element::f32, b_.at(scores, key * at_.row_bytes + index * b_.vector_bytes()));
  }

  void bend_scores(Reg keys) {
    Reg key = b_.copy(key_);
    each_key(keys, 1, [&](Reg scores) {
      for (int v = 0; v < kRowVectors; ++v) {
        Reg value = score(scores, 0, v);
        if (spec_.softcap) {
          Reg cap = b_.splat(b_.arg(PrefillArgs::softcap));
          value = b_.vmul(jit::math::tanh(b_, b_.vdiv(value, cap)), cap);
        }
        if (spec_.slopes) {
          Reg place = b_.isub(b_.splat(key), row_numbers(PrefillArgs::first_keys, v));
          value = b_.vadd(value, b_.vmul(row_numbers(PrefillArgs::slopes, v), b_.to_f32(place)));
        }
        b_.store(Element::f32, vector(scores, v), value);
      }
      b_.add_to(key, 1);
    });
  }

  // One element at a time: a row of the mask lies across the lanes.
  void add_masks() {
    const bool additive = spec_.mask == MaskKind::additive;
    const int bytes = additive ? 4 : 1;
    Reg row = row_addresses(PrefillArgs::mask_rows), column = scratch(at_.scores);
    b_.loop(b_.constant(at_.rows), [&] {
      Reg mask = b_.load_gpr(Element::i64, b_.at(row));
      b_.add_to(mask, b_.mul(key_, bytes));
      Reg score = b_.copy(column);
      b_.loop(b_.copy(keys_), [&] {
        Reg value = b_.load_one(Element::f32, b_.at(score));
        if (additive) {
          value = b_.vadd(value, b_.load_one(Element::f32, b_.at(mask)));
        } else {
          Reg allowed = b_.igreater(b_.load_one(Element::u8, b_.at(mask)), b_.zero());
          value = b_.select(allowed, value, b_.splat(kMinusInfinity));
        }
        b_.store_one(Element::f32, b_.at(score), value);
        b_.add_to(score, at_.row_bytes);
        b_.add_to(mask, bytes);
      });
      b_.add_to(row, 8);
      b_.add_to(column, 4);
    });
  }

  // Each row's largest score so far, in most_. What is no key, or where rows end outside of their
  // ranges, gets minus infinity.
  void limit_keys(Reg keys) {
    Reg nothing = b_.splat(kMinusInfinity);
    Reg padding = b_.add(scratch(at_.scores), b_.mul(keys_, at_.row_bytes));
    b_.loop(b_.sub(keys, keys_), [&] {
      for (int v = 0; v < kRowVectors; ++v) b_.store(Element::f32, vector(padding, v), nothing);
      b_.add_to(padding, at_.row_bytes);
    });
    for (std::size_t v = 0; v < kRowVectors; ++v) {
      most_[v] = strip_vector(at_.most, static_cast<int>(v));
    }
    Reg before = b_.sub(key_, strip_keys(1));
    Reg behind = b_.sub(strip_keys(2), b_.add(key_, keys_));
    Reg sure = b_.max(b_.add(b_.min(before, behind), 1), b_.constant(0));
    constexpr int unroll = 4;
    b_.if_nonzero(
        sure,
        [&] {
          each_key(keys, unroll, [&](Reg scores) {
            for (int key = 0; key < unroll; ++key) {
              for (std::size_t v = 0; v < kRowVectors; ++v) {
                b_.assign(most_[v], b_.vmax(most_[v], score(scores, key, static_cast<int>(v))));
              }
            }
          });
        },
        [&] {
          Reg key = b_.copy(key_);
          each_key(keys, 1, [&](Reg scores) {
            Reg number = b_.splat(key);
            for (std::size_t i = 0; i < kRowVectors; ++i) {
              const int v = static_cast<int>(i);
              Reg first = row_numbers(PrefillArgs::first_keys, v);
              Reg end = row_numbers(PrefillArgs::end_keys, v);
              Reg value = b_.select(b_.igreater(end, number), score(scores, 0, v), nothing);
              value = b_.select(b_.igreater(first, number), nothing, value);
              b_.store(Element::f32, vector(scores, v), value);
              b_.assign(most_[i], b_.vmax(most_[i], value));
            }
            b_.add_to(key, 1);
          });
        });
  }

  // Weights, relative to the largest score so far; all sums until now are rescaled to it.
  void softmax(Reg keys) {
    std::array<Reg, kRowVectors> sums;
    for (std::size_t i = 0; i < kRowVectors; ++i) {
      const int v = static_cast<int>(i);
      Reg before = strip_vector(at_.most, v);
      set_strip_vector(at_.most, v, most_[i]);
      // All masked: subtract 0, and every exp is 0.
      Reg all_masked = b_.equal(most_[i], b_.splat(kMinusInfinity));
      most_[i] = b_.select(all_masked, b_.zero(), most_[i]);
      Reg rescale = jit::math::exp_to_one(b_, b_.vsub(before, most_[i]));
      b_.store(Element::f32, vector(scratch(at_.rescale), v), rescale);
      sums[i] = b_.zero();
    }
    const auto weight = [&](Reg scores, int key, std::size_t v) {
      Reg value = b_.vsub(score(scores, key, static_cast<int>(v)), most_[v]);
      value = jit::math::exp_to_one(b_, value);
      b_.assign(sums[v], b_.vadd(sums[v], value));
      return value;
    };
    if (kernel_.is_paired()) {
      Reg upper = b_.splat_bits(0xffff0000u), half = b_.splat_bits(0x8000u);
      Reg to = scratch(at_.weights);
      each_key(keys, 2, [&](Reg scores) {
        for (std::size_t v = 0; v < kRowVectors; ++v) {
          Reg low = b_.vshift_right(b_.iadd(weight(scores, 0, v), half), 16);
          Reg high = b_.vand(b_.iadd(weight(scores, 1, v), half), upper);
          b_.store(Element::i32, vector(to, static_cast<int>(v)), b_.vor(low, high));
        }
        b_.add_to(to, at_.row_bytes);
      });
    } else {
      each_key(keys, 1, [&](Reg scores) {
        for (std::size_t v = 0; v < kRowVectors; ++v) {
          b_.store(Element::f32, vector(scores, static_cast<int>(v)), weight(scores, 0, v));
        }
      });
    }
    for (std::size_t i = 0; i < kRowVectors; ++i) {
      const int v = static_cast<int>(i);
      Reg sum = sums[i];
      b_.fma_load(sum, b_.load(Element::f32, vector(scratch(at_.rescale), v)),
                  b_.at(strip_, at_.sum + v * b_.vector_bytes()));
      set_strip_vector(at_.sum, v, sum);
    }
  }

  // A sum of zero (no key, or all masked) must give zeros: 0 / infinity.
  void finish_strip() {
    Reg infinity = b_.splat(-kMinusInfinity);
    for (int v = 0; v < kRowVectors; ++v) {
      Reg sum = strip_vector(at_.sum, v);
      set_strip_vector(at_.sum, v, b_.select(b_.equal(sum, b_.zero()), infinity, sum));
    }
    products_.finish(strip_, row_addresses(PrefillArgs::output_rows));
  }

  const PrefillKernel& kernel_;
  const AttentionKernel& spec_;
  PrefillLayout at_;
  Builder b_;
  KeyBlocks blocks_;
  Products products_;
  Reg key_, count_;            // the chunk's first key, and how many it has
  Reg strip_, rows_, ranges_;  // each_strip
  Reg keys_;                   // of the chunk, for this strip
  std::array<Reg, kRowVectors> most_;
};

}  // namespace

int strip_rows(int lanes) { return kRowVectors * lanes; }
static_assert(kMostStrips * kRowVectors * 16 == kMostTileRows);

int key_granule(const PrefillKernel& spec) {
  if (spec.arithmetic == Arithmetic::tiles) return kTileColumns;
  return spec.attention.lanes == 16 ? 8 : 4;
}

PrefillLayout::PrefillLayout(const PrefillKernel& spec)
    : rows(strip_rows(spec.attention.lanes)), units(units_of(spec)), row_bytes(4 * rows) {
  const int lanes = spec.attention.lanes, head_dim = spec.attention.head_dim;
  const std::int64_t vector_bytes = 4 * lanes;
  const auto padded = [&](std::int64_t count) { return (count + lanes - 1) / lanes * lanes; };
  token_bytes = 4 * padded(units);
  std::int64_t end = 0;
  const auto take = [&](std::int64_t bytes) { return std::exchange(end, end + in_lines(bytes)); };
  blocks = take(kBlocksBytes);
  tile_state = take(kTileStateBytes);
  rescale = take(row_bytes);
  keys = take(kChunkKeys * token_bytes);
  tokens = take(kChunkKeys * token_bytes);
  const std::int64_t value_bytes = spec.arithmetic == Arithmetic::tiles
                                       ? 2 * kChunkKeys * head_dim
                                       : kChunkKeys / 2 * 4 * padded(head_dim);
  values = spec.is_paired() ? take(value_bytes) : tokens;
  scores = take(kChunkKeys * row_bytes);
  weights = spec.is_paired() ? take(kChunkKeys / 2 * row_bytes) : scores;
  sums = take(spec.arithmetic == Arithmetic::tiles ? kTileColumns * row_bytes : 0);
  strips = std::exchange(end, 0);
  most = take(row_bytes);
  sum = take(row_bytes);
  query = take(padded(units) * row_bytes);
  totals = take(vector_bytes / lanes * rows * padded(head_dim));
  strip_bytes = end;
}

std::int64_t prefill_scratch_bytes(const PrefillKernel& spec, int strips) {
  const PrefillLayout layout(spec);
  return layout.strips + strips * layout.strip_bytes;
}

std::string print(const PrefillKernel& spec) {
  AttentionKernel any_group = spec.attention;
  any_group.group = 1;
  any_group.prefetch_level = 0;
  any_group.prefetch_only_jumps = false;
  any_group.dots = any_group.integers = false;
  const char* arithmetic = spec.arithmetic == Arithmetic::dot     ? "avx512_bf16_"
                           : spec.arithmetic == Arithmetic::tiles ? "amx_bf16_"
                                                                  : "";
  return fmt::format("prefill_{}{}", arithmetic, print(any_group));
}

Status supported(const PrefillKernel& spec) {
  const AttentionKernel& attention = spec.attention;
  if (Status possible = supported(attention); !possible || !spec.is_paired()) return possible;
  const int unit = spec.arithmetic == Arithmetic::tiles ? kTileColumns : 2;
  const bool is_bf16 = attention.input == DataType::bf16 && attention.cache == DataType::bf16;
  if (spec.arithmetic == Arithmetic::split_tiles || !is_bf16 || attention.lanes != 16 ||
      attention.head_dim % unit != 0) {
    return Error{"attention that cannot be computed by products of bf16"};
  }
  return {};
}

jit::vir::Function build(const PrefillKernel& spec) {
  if (spec.arithmetic == Arithmetic::tiles) return PrefillBuilder<TileProducts>(spec).run();
  return PrefillBuilder<VectorProducts>(spec).run();
}

}  // namespace tilewright::ops
