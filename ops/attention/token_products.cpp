// See token_products.h.
//
// Tested by attention_test.
#include "ops/attention/token_products.h"

#include <algorithm>
#include <span>

#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// How the sums cut the group and head_dim.
struct SumsTile {
  int heads;    // divides the group; at most 4
  int vectors;  // of head_dim
};

SumsTile sums_tile(const AttentionKernel& spec) {
  SumsTile tile{4, 0};
  while (spec.group % tile.heads != 0) --tile.heads;
  // Beside the accumulators: a weight per head, a value, and with AVX2 the mask of a tail.
  const int registers = spec.lanes == 16 ? 32 : 16;
  const int mask = spec.lanes == 8 && spec.head_dim % spec.lanes != 0 ? 1 : 0;
  const int accumulators = std::min(registers - tile.heads - 1 - mask, registers * 3 / 4);
  const int vectors = static_cast<int>(round_up(spec.head_dim, spec.lanes)) / spec.lanes;
  const int most = accumulators / tile.heads;
  const int passes = (vectors + most - 1) / most;
  tile.vectors = (vectors + passes - 1) / passes;
  if (spec.dots) tile.vectors = static_cast<int>(round_up(tile.vectors, 2));  // a pair's columns
  return tile;
}

}  // namespace

TokenLayout::TokenLayout(const AttentionKernel& spec)
    : query_bytes(round_up(spec.head_dim, spec.lanes) * 4),
      factors(queries + round_up(spec.group * query_bytes, 64)),
      scores(factors + round_up(4 * spec.group, 64)),
      value_scales(scores + spec.group * score_bytes),
      bytes(value_scales + (spec.has_scales() ? kScaleBytes * kChunkKeys : 0)) {
  static_assert(kScaleBytes == 4);  // scales lie as scores do
}

int bf16_pairs(const AttentionKernel& spec) {
  const bool possible = spec.input == DataType::bf16 && spec.cache == DataType::bf16;
  return possible ? spec.head_dim / (2 * spec.lanes) : 0;
}

void prefetch_tokens(Builder& builder, const AttentionKernel& spec, int tokens, Reg address,
                     int stride_slot) {
  const int bytes = spec.head_dim * static_cast<int>(size_in_bytes(spec.cache));
  Reg stride = builder.arg(stride_slot);
  const auto ask = [&](int end) {
    for (int token = 0; token < tokens; ++token) {
      for (int line = 0; line < end; line += 64) {
        builder.prefetch(builder.at(address, line), spec.prefetch_level);
      }
      builder.add_to(address, stride);
    }
  };
  if (!spec.prefetch_first_lines) return ask(bytes);
  builder.if_nonzero(
      builder.add(stride, -bytes), [&] { ask(bytes); }, [&] { ask(1); });
}

void WeightedValues::add(const KeyBlocks::Place& values, Reg keys, Reg ahead) {
  const SumsTile tile = sums_tile(spec_);
  Reg row = b_.add(b_.arg(AttentionArgs::scratch), at_.scores);
  Reg factor = b_.add(b_.arg(AttentionArgs::scratch), at_.factors);
  Reg part = b_.arg(AttentionArgs::part);
  b_.loop(b_.constant(spec_.group / tile.heads), [&] {
    for (int first = 0; first < head_.count(); first += tile.vectors) {
      const KeyBlocks::Place place{b_.copy(values.entry), b_.copy(values.token)};
      Sums sums{tile.heads, first, std::min(tile.vectors, head_.count() - first), {}};
      for (int i = 0; i < sums.heads * sums.count; ++i) sums.vectors.push_back(b_.zero());
      const Reg fetched = first == 0 ? b_.copy(ahead) : Reg{};
      if (spec_.dots) {
        add_pairs_of_keys(place, b_.copy(keys), row, fetched, sums);
      } else {
        add_keys(place, b_.copy(keys), row, fetched, sums);
      }
      for (int head = 0; head < sums.heads; ++head) {
        for (int v = 0; v < sums.count; ++v) {
          Reg left = b_.broadcast(Element::f32, b_.at(factor, 4 * head));
          const Address total = b_.at(part, head * part_.bytes + (first + v) * b_.vector_bytes());
          b_.fma_load(sums.at(head, v), left, total);
          b_.store(Element::f32, total, sums.at(head, v));
        }
      }
    }
    b_.add_to(row, tile.heads * TokenLayout::score_bytes);
    b_.add_to(part, tile.heads * part_.bytes);
    b_.add_to(factor, 4 * tile.heads);
  });
}

void WeightedValues::fetch_keys(int tokens, Reg ahead) {
  if (ahead.valid()) prefetch_tokens(b_, spec_, tokens, ahead, AttentionArgs::k_token_stride);
}

// The weights of each head for the key, or pair of keys, at `weights`.
std::vector<Reg> WeightedValues::weights_of(Element element, Reg weights, int heads) {
  std::vector<Reg> result;
  for (int head = 0; head < heads; ++head) {
    result.push_back(b_.broadcast(element, b_.at(weights, head * TokenLayout::score_bytes)));
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
