// See token_products.h.
//
// Tested by attention_test.
#include "ops/attention/token_products.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "jit/base/round_up.h"
#include "ops/attention/integer_products.h"
#include "ops/attention/transpose.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr int kIntegerVectors = 4;  // of the sums of a vector of bytes

// How the sums cut the group and head_dim. What is left of the group is a smaller tile.
struct SumsTile {
  int heads;
  int vectors;  // of head_dim
};

SumsTile sums_tile(const AttentionKernel& spec) {
  const auto cut = [&](int most) {
    const int tiles = (spec.group + most - 1) / most;
    return (spec.group + tiles - 1) / tiles;
  };
  // Two sums each, of upper and lower bytes, a step's 4 vectors of values, and a weight.
  if (spec.integers) return {cut(3), kIntegerVectors};
  SumsTile tile{cut(4), 0};
  // Beside the accumulators: a weight per head, a value, and with AVX2 the mask of a tail.
  const int registers = spec.lanes == 16 ? 32 : 16;
  const int mask = spec.lanes == 8 && spec.head_dim % spec.lanes != 0 ? 1 : 0;
  const int accumulators = std::min(registers - tile.heads - 1 - mask, registers * 3 / 4);
  const int vectors = round_up(spec.head_dim, spec.lanes) / spec.lanes;
  const int most = accumulators / tile.heads;
  const int passes = (vectors + most - 1) / most;
  tile.vectors = (vectors + passes - 1) / passes;
  if (spec.dots) tile.vectors = round_up(tile.vectors, 2);  // a pair's columns
  return tile;
}

}  // namespace

TokenLayout::TokenLayout(const AttentionKernel& spec)
    : query_bytes(4 * round_up(spec.head_dim, spec.lanes)),
      factors(round_up(queries + spec.group * query_bytes, 64)),
      units(round_up(factors + 4 * spec.group, 64)),
      scores(spec.integers ? round_up(units + 4 * spec.group, 64) : units),
      value_scales(scores + spec.group * score_bytes),
      weights(spec.integers ? value_scales + kScaleBytes * kChunkKeys : scores),
      weight_bytes(spec.integers ? 2 * kChunkKeys : score_bytes),
      bytes(spec.integers ? weights + spec.group * weight_bytes + 64
                          : value_scales + (spec.has_scales() ? kScaleBytes * kChunkKeys : 0)) {
  static_assert(kScaleBytes == 4);  // scales lie as scores do
}

int bf16_pairs(const AttentionKernel& spec) {
  const bool possible = spec.input == DataType::bf16 && spec.cache == DataType::bf16;
  return possible ? spec.head_dim / (2 * spec.lanes) : 0;
}

void prefetch_tokens(Builder& builder, const AttentionKernel& spec, int tokens, Reg address,
                     int stride_slot, Reg asked) {
  const auto ask = [&] {
    for (int token = 0; token < tokens; ++token) {
      for (std::int64_t line = 0; line < spec.head_dim * size_in_bytes(spec.cache); line += 64) {
        builder.prefetch(builder.at(address, line), spec.prefetch_level);
      }
      builder.add_to(address, builder.arg(stride_slot));
    }
  };
  spec.prefetch_only_jumps ? builder.if_nonzero(asked, ask) : ask();
}

void WeightedValues::add(const KeyBlocks::Place& values, Reg keys, Reg ahead) {
  const SumsTile tile = sums_tile(spec_);
  Reg row = b_.add(b_.arg(AttentionArgs::scratch), at_.weights);
  Reg factor = b_.add(b_.arg(AttentionArgs::scratch), at_.factors);
  Reg part = b_.arg(AttentionArgs::part);
  const auto add_heads = [&](int heads) {
    for (int first = 0; first < head_.count(); first += tile.vectors) {
      const KeyBlocks::Place place{b_.copy(values.entry), b_.copy(values.token)};
      Sums sums{heads, first, std::min(tile.vectors, head_.count() - first), {}};
      const int planes = spec_.integers ? 2 : 1;
      for (int i = 0; i < planes * heads * sums.count; ++i) sums.vectors.push_back(b_.zero());
      const Reg fetched = first == 0 ? b_.copy(ahead) : Reg{};
      if (spec_.integers) {
        add_integers(place, b_.copy(keys), row, factor, fetched, sums);
      } else if (spec_.dots) {
        add_pairs_of_keys(place, b_.copy(keys), row, fetched, sums);
      } else {
        add_keys(place, b_.copy(keys), row, fetched, sums);
      }
      for (int head = 0; head < heads; ++head) {
        for (int v = 0; v < sums.count; ++v) {
          Reg left = b_.broadcast(Element::f32, b_.at(factor, 4 * head));
          const Address total = b_.at(part, head * part_.bytes + (first + v) * b_.vector_bytes());
          b_.fma_load(sums.at(head, v), left, total);
          b_.store(Element::f32, total, sums.at(head, v));
        }
      }
    }
  };
  b_.loop(b_.constant(spec_.group / tile.heads), [&] {
    add_heads(tile.heads);
    b_.add_to(row, tile.heads * at_.weight_bytes);
    b_.add_to(part, tile.heads * part_.bytes);
    b_.add_to(factor, 4 * tile.heads);
  });
  if (spec_.group % tile.heads != 0) add_heads(spec_.group % tile.heads);
}

void WeightedValues::fetch_keys(int tokens, Reg ahead) {
  if (!ahead.valid()) return;
  prefetch_tokens(b_, spec_, tokens, ahead, AttentionArgs::k_token_stride, ahead);
}

// The weights of each head for the key, or pair of keys, at `weights`.
std::vector<Reg> WeightedValues::weights_of(Element element, Reg weights, int heads) {
  std::vector<Reg> result;
  for (int head = 0; head < heads; ++head) {
    result.push_back(b_.broadcast(element, b_.at(weights, head * at_.weight_bytes)));
  }
  return result;
}

// With the weights in rows from `row` on.
void WeightedValues::add_keys(const KeyBlocks::Place& place, Reg keys, Reg row, Reg ahead,
                              Sums& sums) {
  Reg weights = b_.copy(row);
  blocks_.walk(place, keys, std::span(&kValueTable, 1), [&](std::span<const Reg> at, Reg tokens) {
    Reg token = at[0], stride = b_.arg(AttentionArgs::v_token_stride);
    b_.loop(tokens, [&] {
      fetch_keys(1, ahead);
      const std::vector<Reg> p = weights_of(Element::f32, weights, sums.heads);
      for (int v = 0; v < sums.count; ++v) {
        Reg value = load(b_, spec_.cache, token, head_.columns(sums.first + v));
        for (int head = 0; head < sums.heads; ++head) {
          b_.fma(sums.at(head, v), p[static_cast<std::size_t>(head)], value);
        }
      }
      b_.add_to(token, stride);
      b_.add_to(weights, 4);
    });
  });
}

// The same by vdpbf16ps, a step for two keys, the chunk's first and second, third and fourth ...
// wherever blocks end: half the products, and no widening.
void WeightedValues::add_pairs_of_keys(const KeyBlocks::Place& place, Reg keys, Reg row, Reg ahead,
                                       Sums& sums) {
  Reg weights = b_.copy(row);
  Reg first = b_.constant(0);  // the address of a key whose second is in the next block, or 0
  blocks_.walk(place, keys, std::span(&kValueTable, 1), [&](std::span<const Reg> at, Reg tokens) {
    Reg token = at[0], stride = b_.arg(AttentionArgs::v_token_stride);
    b_.if_nonzero(first, [&] {
      add_pair_of_keys(first, token, weights, sums);
      b_.assign(first, b_.constant(0));
      b_.add_to(token, stride);
      b_.add_to(tokens, -1);
    });
    b_.loop(b_.shift_right(tokens, 1), [&] {
      fetch_keys(2, ahead);
      Reg second = b_.add(token, stride);
      add_pair_of_keys(token, second, weights, sums);
      b_.assign(token, b_.add(second, stride));
    });
    b_.if_nonzero(b_.bit_and(tokens, 1), [&] { b_.assign(first, token); });
  });
  b_.if_nonzero(first, [&] { add_pair_of_keys(first, {}, weights, sums); });
  order_columns(sums);
}

// With the weights in planes from `row` on (integer_products.h): four keys at a time, whose bytes
// of a column are brought together. The sums become f32, times the weights' units. What is left of
// a run is taken key by key: sums of integers are the same.
void WeightedValues::add_integers(const KeyBlocks::Place& place, Reg keys, Reg row, Reg factor,
                                  Reg ahead, Sums& sums) {
  Reg weights = b_.copy(row);
  blocks_.walk(place, keys, std::span(&kValueTable, 1), [&](std::span<const Reg> at, Reg tokens) {
    Reg token = at[0], stride = b_.arg(AttentionArgs::v_token_stride);
    b_.loop(b_.shift_right(tokens, 2), [&] {
      fetch_keys(4, ahead);
      Reg third = b_.lea(b_.at(token, stride, 2));
      add_four_keys({b_.at(token), b_.at(token, stride, 1), b_.at(third), b_.at(third, stride, 1)},
                    weights, sums);
      b_.add_to(weights, 4);
      b_.assign(token, b_.lea(b_.at(third, stride, 2)));
    });
    b_.loop(b_.bit_and(tokens, 3), [&] {
      add_four_keys({b_.at(token)}, weights, sums);
      b_.add_to(weights, 1);
      b_.add_to(token, stride);
    });
  });
  const std::int64_t unit = at_.units - at_.factors;
  for (int head = 0; head < sums.heads; ++head) {
    for (int v = 0; v < sums.count; ++v) {
      Reg upper = b_.vshift_left(sums.at(head, v), 8);
      Reg sum = b_.to_f32(b_.iadd(upper, sums.at(sums.heads + head, v)));
      sums.at(head, v) = b_.vmul(sum, b_.broadcast(Element::f32, b_.at(factor, unit + 4 * head)));
    }
  }
  order_integers(sums);
}

// Of fewer keys the others' values are zero, whatever weights lie behind.
void WeightedValues::add_four_keys(const std::vector<Address>& keys, Reg weights, Sums& sums) {
  const auto pair = [&](std::size_t key) {
    const auto row = [&](std::size_t i) {
      if (i >= keys.size()) return b_.zero();
      Address address = keys[i];
      address.disp += static_cast<std::int64_t>(sums.first) * spec_.lanes;
      return b_.load(Element::i32, address);
    };
    Reg a = row(key), b = row(key + 1);
    return std::pair(b_.interleave_low(a, b), b_.interleave_high(a, b));
  };
  const auto [low, high] = pair(0);
  const auto [low2, high2] = keys.size() > 1 ? pair(2) : std::pair(b_.zero(), b_.zero());
  const std::array values{b_.interleave_halves_low(low, low2), b_.interleave_halves_high(low, low2),
                          b_.interleave_halves_low(high, high2),
                          b_.interleave_halves_high(high, high2)};
  static_assert(values.size() == kIntegerVectors);
  for (int head = 0; head < sums.heads; ++head) {
    for (int plane = 0; plane < 2; ++plane) {
      Reg weight =
          b_.broadcast(Element::i32, b_.at(weights, head * at_.weight_bytes + plane * kChunkKeys));
      for (int v = 0; v < kIntegerVectors; ++v) {
        b_.dot_bytes(sums.at(plane * sums.heads + head, v), weight,
                     values[static_cast<std::size_t>(v)]);
      }
    }
  }
}

// Run r of vector v has the 4 columns from 16 * r + 4 * v on: runs and vectors change places.
void WeightedValues::order_integers(Sums& sums) {
  for (int head = 0; head < sums.heads; ++head) {
    std::array<Reg, kIntegerVectors> vectors;
    for (int v = 0; v < kIntegerVectors; ++v) {
      vectors[static_cast<std::size_t>(v)] = sums.at(head, v);
    }
    vectors = transpose_runs(b_, vectors);
    for (int v = 0; v < kIntegerVectors; ++v) {
      sums.at(head, v) = vectors[static_cast<std::size_t>(v)];
    }
  }
}

// Without a second key its weight is zero; what lies there could be anything.
void WeightedValues::add_pair_of_keys(Reg first, Reg second, Reg weights, Sums& sums) {
  const std::vector<Reg> p = weights_of(Element::i32, weights, sums.heads);
  const auto add = [&](int vector, Reg values) {
    for (int head = 0; head < sums.heads; ++head) {
      b_.dot_bf16(sums.at(head, vector), values, p[static_cast<std::size_t>(head)]);
    }
  };
  for (int v = 0; v < sums.count; ++v) {
    if (!is_of_pair(sums.first + v)) {
      Reg values = b_.vshift_right(load(b_, spec_.cache, first, head_.columns(sums.first + v)), 16);
      if (second.valid()) {
        values = b_.vor(values, load(b_, spec_.cache, second, head_.columns(sums.first + v)));
      }
      add(v, values);
      continue;
    }
    const std::int64_t offset = (sums.first + v) / 2 * b_.vector_bytes();
    Reg a = b_.load(Element::i32, b_.at(first, offset));
    Reg b = second.valid() ? b_.load(Element::i32, b_.at(second, offset)) : b_.zero();
    add(v, b_.interleave_halves_low(a, b));
    add(++v, b_.interleave_halves_high(a, b));
  }
  b_.add_to(weights, 4);
}

// Of each 8 columns of a pair, its first vector has the lower 4 and the second the upper.
void WeightedValues::order_columns(Sums& sums) {
  for (int head = 0; head < sums.heads; ++head) {
    for (int v = 0; v < sums.count && is_of_pair(sums.first + v); v += 2) {
      Reg &low = sums.at(head, v), &high = sums.at(head, v + 1);
      Reg even = b_.even_runs(low, high), odd = b_.odd_runs(low, high);
      low = b_.even_runs(even, odd);
      high = b_.odd_runs(even, odd);
    }
  }
}

}  // namespace tilewright::ops
