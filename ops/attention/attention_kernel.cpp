// The attention kernel, three phases for each chunk of keys:
//
//   scores    [group][chunk] in scratch: as many keys at a time as a vector has lanes, so that
//             their horizontal sums are made together and end up in one vector, in order. Heads are
//             the inner loop: the keys of a step stay in L1 for the whole group. In integers:
//             integer_products.cpp
//   softmax   in place, a row of a head at a time; what the larger scores of this chunk leave of
//             the sums before is kept for the last phase
//   output    heads x head_dim sums in registers, keys outside; added to the part
//             (token_products.cpp)
//
// A key's score and a column's sum are added in the same order wherever the key lies in its block.
// Fetching ahead costs a prefetch per line: cold keys and values of 570 tokens took 33 us a head of
// 64 (group of 3, Zen 3) where computing took 12 and reading 12. What is asked for into L1 waits
// for the few requests that a core may have there: into L2 is 1.2 to 1.3 times as fast on Zen 4.
// Where keys and values lie behind one another, in the order of the phases, its hardware reads them
// by itself, and each line asked for takes a request from it (perf/results/attention-zen4.md).
//
// Tested by attention_test.
#include "ops/attention/attention_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <span>
#include <vector>

#include "jit/math.h"
#include "jit/vir/builder.h"
#include "ops/attention/head_vectors.h"
#include "ops/attention/integer_products.h"
#include "ops/attention/key_blocks.h"
#include "ops/attention/lane_sums.h"
#include "ops/attention/token_products.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

class AttentionBuilder {
 public:
  explicit AttentionBuilder(const AttentionKernel& spec)
      : spec_(spec),
        b_(name(spec), spec.lanes, AttentionArgs::count),
        blocks_(b_, {AttentionArgs::first_key, AttentionArgs::key_count,
                     AttentionArgs::block_tokens, AttentionArgs::scratch, TokenLayout::blocks}),
        at_(spec),
        part_(spec),
        head_(spec.head_dim, spec.lanes) {}

  jit::vir::Function run() && {
    blocks_.find_first();
    head_.make_mask(b_);
    copy_queries();
    begin_part();
    Reg mask;
    if (spec_.mask != MaskKind::none) {
      mask = b_.arg(AttentionArgs::mask);
      b_.add_to(mask, b_.mul(b_.arg(AttentionArgs::first_key), mask_bytes()));
    }
    const KeyBlocks::Place place = blocks_.first();
    Reg remaining = blocks_.key_count(), chunk = b_.arg(AttentionArgs::first_chunk);
    b_.loop(remaining, [&] {
      Reg keys = blocks_.take(remaining, chunk);
      b_.assign(chunk, b_.constant(kChunkKeys));
      vectors_ = b_.shift_right(b_.add(keys, spec_.lanes - 1), log2_lanes());
      const KeyBlocks::Place values{b_.copy(place.entry), b_.copy(place.token)};
      score(place, b_.copy(keys), mask);
      if (spec_.has_scales()) copy_value_scales(values, b_.copy(keys));
      softmax();
      Reg ahead = b_.arg(AttentionArgs::next_key);  // fetched meanwhile
      b_.if_nonzero(b_.add(remaining, -1),
                    [&] { b_.assign(ahead, blocks_.address(kKeys, place)); });
      if (spec_.prefetch_only_jumps) forget_if_next(ahead, values, keys);
      WeightedValues(b_, spec_, blocks_, head_).add(values, keys, ahead);
      save(TokenLayout::chunk_place, b_.add(saved(TokenLayout::chunk_place), keys));
    });
    return std::move(b_).finish();
  }

 private:
  static constexpr KeyBlocks::Table kKeys{AttentionArgs::k_blocks, AttentionArgs::k_token_stride};
  static constexpr KeyBlocks::Table kKeyScales{AttentionArgs::k_blocks,
                                               AttentionArgs::k_token_stride, true};
  static constexpr KeyBlocks::Table kValueScales{AttentionArgs::v_blocks,
                                                 AttentionArgs::v_token_stride, true};

  static std::string name(const AttentionKernel& spec) {
    std::string text = print(spec);
    std::replace(text.begin(), text.end(), ' ', '.');
    return text;
  }

  int log2_lanes() const { return std::countr_zero(static_cast<unsigned>(spec_.lanes)); }
  int mask_bytes() const { return spec_.mask == MaskKind::boolean ? 1 : 4; }

  Reg scratch(std::int64_t offset) { return b_.add(b_.arg(AttentionArgs::scratch), offset); }
  Reg saved(std::int64_t offset) {
    return b_.load_gpr(Element::i64, b_.at(b_.arg(AttentionArgs::scratch), offset));
  }
  void save(std::int64_t offset, Reg value) {
    b_.store_gpr(Element::i64, b_.at(b_.arg(AttentionArgs::scratch), offset), value);
  }

  // Where those that lie behind `tokens` tokens of a block from `address` on begin.
  Reg behind(Reg address, int stride_slot, Reg tokens) {
    Reg end = b_.add(address, b_.mul(b_.arg(stride_slot), tokens));
    if (spec_.has_scales()) {
      b_.add_to(end, b_.mul(b_.arg(AttentionArgs::block_tokens), kScaleBytes));
    }
    return end;
  }

  // The keys at `ahead` need not be asked for where they lie behind `keys` values from `values` on,
  // and those in one block: across blocks, keys and values are parts of blocks by turns.
  void forget_if_next(Reg ahead, const KeyBlocks::Place& values, Reg keys) {
    Reg next = behind(blocks_.address(kValueTable, values), AttentionArgs::v_token_stride, keys);
    Reg across = b_.sub(b_.add(values.token, keys), b_.arg(AttentionArgs::block_tokens));
    b_.if_nonzero(
        b_.sub(ahead, next), [] {},
        [&] {
          b_.if_nonzero(
              b_.max(across, b_.constant(0)), [] {}, [&] { b_.assign(ahead, b_.constant(0)); });
        });
  }

  Address query_vector(Reg query, int vector) const {
    return b_.at(query, vector * b_.vector_bytes());
  }

  void begin_part() {
    save(TokenLayout::chunk_place,
         b_.sub(b_.arg(AttentionArgs::first_key), b_.arg(AttentionArgs::origin)));
    Reg part = b_.arg(AttentionArgs::part), zero = b_.zero();
    b_.loop(b_.constant(spec_.group), [&] {
      for (int v = 0; v < head_.count(); ++v) {
        b_.store(Element::f32, b_.at(part, v * b_.vector_bytes()), zero);
      }
      b_.store_one(Element::f32, b_.at(part, part_.most), b_.splat(kMinusInfinity));
      b_.store_one(Element::f32, b_.at(part, part_.sum), zero);
      b_.add_to(part, part_.bytes);
    });
  }

  // Vectors of bf16 that a key is read in as a whole. With vdpbf16ps they are multiplied as they
  // are. Otherwise their even columns and their odd ones are two vectors of f32, a shift and an
  // and, where widening takes a shuffle and a shift each. The query lies so too. Worth 1.07 of cold
  // keys, 1.15 of warm ones (perf/results/attention-avx2.md).
  int pairs() const { return bf16_pairs(spec_); }
  std::int64_t pair_offset(int pair) const { return pair * b_.vector_bytes(); }
  Reg even_columns(Reg pairs) { return b_.vshift_left(pairs, 16); }
  Reg odd_columns(Reg pairs) { return b_.vand(pairs, upper_); }
  // For odd_columns, in each phase anew: the last phase has no register left for it.
  void make_upper() {
    if (pairs() > 0 && !spec_.dots) upper_ = b_.splat_bits(0xffff0000);
  }

  void copy_queries() {
    make_upper();
    Reg from = b_.arg(AttentionArgs::q), to = scratch(TokenLayout::queries);
    Reg stride = b_.arg(AttentionArgs::q_head_stride);
    b_.loop(b_.constant(spec_.group), [&] {
      if (spec_.integers) {
        split_query(b_, spec_, from, to);
      } else {
        copy_query(from, to);
      }
      b_.add_to(from, stride);
      b_.add_to(to, at_.query_bytes);
    });
  }

  void copy_query(Reg from, Reg to) {
    for (int pair = 0; pair < pairs(); ++pair) {
      Reg columns = b_.load(Element::i32, b_.at(from, pair_offset(pair)));
      if (spec_.dots) {
        b_.store(Element::i32, query_vector(to, 2 * pair), columns);
        continue;
      }
      b_.store(Element::f32, query_vector(to, 2 * pair), even_columns(columns));
      b_.store(Element::f32, query_vector(to, 2 * pair + 1), odd_columns(columns));
    }
    for (int v = 2 * pairs(); v < head_.count(); ++v) {
      b_.store(Element::f32, query_vector(to, v), load(b_, spec_.input, from, head_.columns(v)));
    }
  }

  // --- scores

  // Of `keys` keys from `place` on, which moves behind them.
  void score(const KeyBlocks::Place& place, Reg keys, Reg mask) {
    scale_ = b_.splat(b_.arg(AttentionArgs::scale));
    make_upper();
    Reg scores = scratch(at_.scores);
    // Behind the last score of each head, so that the softmax needs no tail.
    Reg last = b_.add(b_.shift_left(vectors_, log2_lanes() + 2), -b_.vector_bytes());
    b_.add_to(last, scores);
    Reg nothing = b_.splat(kMinusInfinity);
    for (int head = 0; head < spec_.group; ++head) {
      b_.store(Element::f32, b_.at(last, head * TokenLayout::score_bytes), nothing);
    }
    std::vector<KeyBlocks::Table> tables{kKeys, kValueTable};
    if (spec_.has_scales()) tables.push_back(kKeyScales);
    blocks_.walk(place, keys, tables, [&](std::span<const Reg> at, Reg tokens) {
      Reg token = at[0], value = at[1], jump;
      if (spec_.prefetch_only_jumps) {
        jump = b_.sub(value, behind(token, AttentionArgs::k_token_stride, tokens));
      }
      for (int count : {spec_.lanes, 1}) {
        Reg steps =
            count == 1 ? b_.bit_and(tokens, spec_.lanes - 1) : b_.shift_right(tokens, log2_lanes());
        b_.loop(steps, [&] {
          prefetch_tokens(b_, spec_, count, value, AttentionArgs::v_token_stride, jump);
          Reg scale = scale_;
          if (spec_.has_scales()) {
            scale = key_scales(at[2], count);
            b_.add_to(at[2], kScaleBytes * count);
          }
          score_step(count, token, scores, mask, scale);
          b_.add_to(token, b_.mul(b_.arg(AttentionArgs::k_token_stride), count));
          b_.add_to(scores, 4 * count);
          if (mask.valid()) b_.add_to(mask, mask_bytes() * count);
        });
      }
    });
  }

  // What the products with `keys` keys are multiplied by.
  Reg key_scales(Reg scales, int keys) {
    Reg of_keys = keys == 1 ? b_.broadcast(Element::f32, b_.at(scales))
                            : b_.load(Element::f32, b_.at(scales));
    return b_.vmul(of_keys, scale_);
  }

  // Of `keys` keys from `values` on: for the softmax, as it meets the scores, in one run, whatever
  // the blocks, and zero behind the last. Not while scores are computed: the scales lie between the
  // keys and the values, which are read in their order.
  void copy_value_scales(const KeyBlocks::Place& values, Reg keys) {
    const KeyBlocks::Place place{b_.copy(values.entry), b_.copy(values.token)};
    Reg to = scratch(at_.value_scales);
    Reg last = b_.add(b_.shift_left(vectors_, log2_lanes() + 2), -b_.vector_bytes());
    b_.store(Element::f32, b_.at(to, last, 1), b_.zero());
    blocks_.walk(place, keys, std::span(&kValueScales, 1), [&](std::span<const Reg> at, Reg count) {
      for (int width : {spec_.lanes, 1}) {
        const bool one = width == 1;
        b_.loop(one ? b_.bit_and(count, spec_.lanes - 1) : b_.shift_right(count, log2_lanes()),
                [&] {
                  const Address from = b_.at(at[0]);
                  if (one) {
                    b_.store_one(Element::f32, b_.at(to), b_.load_one(Element::f32, from));
                  } else {
                    b_.store(Element::f32, b_.at(to), b_.load(Element::f32, from));
                  }
                  b_.add_to(at[0], kScaleBytes * width);
                  b_.add_to(to, kScaleBytes * width);
                });
      }
    });
  }

  // The scores of all heads for `keys` keys (a vector of them, or one) from `token` on.
  void score_step(int keys, Reg token, Reg scores, Reg mask, Reg scale) {
    std::vector<Reg> tokens{token};  // every fourth
    Reg stride, stride3;
    if (keys > 1) {
      stride = b_.arg(AttentionArgs::k_token_stride);
      stride3 = b_.mul(stride, 3);
      while (static_cast<int>(tokens.size()) * 4 < keys) {
        tokens.push_back(b_.lea(b_.at(tokens.back(), stride, 4)));
      }
    }
    const auto address = [&](int key, std::int64_t offset) {
      Reg base = tokens[static_cast<std::size_t>(key / 4)];
      if (key % 4 == 0) return b_.at(base, offset);
      if (key % 4 == 3) return b_.at(base, stride3, 1, offset);
      return b_.at(base, stride, key % 4, offset);
    };
    if (spec_.integers) IntegerKeySums(b_, spec_).write(keys, scores, address);
    Reg query = scratch(TokenLayout::queries), to = b_.copy(scores), slope;
    if (spec_.slopes) slope = b_.arg(AttentionArgs::slopes);
    b_.loop(b_.constant(spec_.group), [&] {
      Reg sums = spec_.integers ? b_.load(Element::f32, b_.at(to)) : key_sums(keys, query, address);
      Reg value = b_.vmul(sums, scale);
      if (spec_.softcap) value = capped(value);
      if (spec_.slopes) {
        value = b_.vadd(value, b_.vmul(b_.broadcast(Element::f32, b_.at(slope)), places(scores)));
        b_.add_to(slope, 4);
      }
      value = masked(value, mask, keys);
      if (keys == 1) {
        b_.store_one(Element::f32, b_.at(to), value);
      } else {
        b_.store(Element::f32, b_.at(to), value);
      }
      b_.add_to(query, at_.query_bytes);
      b_.add_to(to, TokenLayout::score_bytes);
    });
  }

  // The products of a query with `keys` keys, a vector of them or one (in all lanes).
  template <class KeyAddress>
  Reg key_sums(int keys, Reg query, const KeyAddress& address) {
    std::vector<Reg> sums;
    for (int key = 0; key < keys; ++key) sums.push_back(b_.zero());
    add_products(sums, query, address);
    return keys == 1 ? lane_sum(b_, &Builder::vadd, sums[0])
                     : lane_sums(b_, &Builder::vadd, std::move(sums));
  }

  // Adds to each key's sum its products with a query; address(key, offset in its token). Key by key
  // as they lie in memory, in pieces of as many columns as there are registers for the query:
  // column by column over 16 keys took 1.2 times as long (perf/results/attention-zen4.md).
  template <class KeyAddress>
  void add_products(const std::vector<Reg>& sums, Reg query, const KeyAddress& address) {
    const int registers = spec_.lanes == 16 ? 8 : 1;  // with AVX2 there are none left
    const int of_pair = spec_.dots ? 1 : 2;
    const int pairs_at_once = std::max(registers / of_pair, 1);
    const auto in_pieces = [&](int begin, int end, int width, auto&& load, auto&& add) {
      for (int first = begin; first < end; first += width) {
        const int last = std::min(first + width, end);
        std::vector<Reg> queries;
        for (int i = first; i < last; ++i) load(i, queries);
        for (std::size_t key = 0; key < sums.size(); ++key) {
          for (int i = first; i < last; ++i)
            add(key, i, static_cast<std::size_t>(i - first), queries);
        }
      }
    };
    in_pieces(
        0, pairs(), pairs_at_once,
        [&](int pair, std::vector<Reg>& queries) {
          for (int i = 0; i < of_pair; ++i) {
            queries.push_back(b_.load(spec_.dots ? Element::i32 : Element::f32,
                                      query_vector(query, 2 * pair + i)));
          }
        },
        [&](std::size_t key, int pair, std::size_t place, const std::vector<Reg>& queries) {
          Reg columns = b_.load(Element::i32, address(static_cast<int>(key), pair_offset(pair)));
          if (spec_.dots) {
            b_.dot_bf16(sums[key], columns, queries[place]);
          } else {
            b_.fma(sums[key], queries[2 * place], even_columns(columns));
            b_.fma(sums[key], queries[2 * place + 1], odd_columns(columns));
          }
        });
    in_pieces(
        2 * pairs(), head_.count(), registers,
        [&](int v, std::vector<Reg>& queries) {
          queries.push_back(b_.load(Element::f32, query_vector(query, v)));
        },
        [&](std::size_t key, int v, std::size_t place, const std::vector<Reg>& queries) {
          add_product(sums[key], queries[place], v, address(static_cast<int>(key), key_offset(v)));
        });
  }

  std::int64_t key_offset(int vector) const {
    return static_cast<std::int64_t>(vector) * spec_.lanes * size_in_bytes(spec_.cache);
  }

  void add_product(Reg sum, Reg q, int vector, const Address& key) {
    const bool partial = head_.is_partial(vector);
    if (spec_.cache == DataType::f32 && !partial) return b_.fma_load(sum, q, key);
    const Element element = load_element(spec_.cache);
    b_.fma(sum, q, partial ? b_.load_masked(element, key, head_.mask()) : b_.load(element, key));
  }

  Reg capped(Reg value) {
    Reg cap = b_.splat(b_.arg(AttentionArgs::softcap));
    return b_.vmul(jit::math::tanh(b_, b_.vdiv(value, cap)), cap);
  }

  // (float)(key - origin) of the keys whose scores go to the first head's row at `scores`. Small
  // integers become floats by being the last bits of one of 2^23.
  Reg places(Reg scores) {
    Reg first = b_.shift_right(b_.sub(scores, scratch(at_.scores)), 2);
    b_.add_to(first, saved(TokenLayout::chunk_place));
    Reg lane = b_.vor(b_.iota(), b_.splat(0x1p23f));
    return b_.vadd(b_.splat_converted(first), b_.vsub(lane, b_.splat(0x1p23f)));
  }

  Reg masked(Reg value, Reg mask, int keys) {
    if (spec_.mask == MaskKind::none) return value;
    const bool additive = spec_.mask == MaskKind::additive;
    const Element element = additive ? Element::f32 : Element::u8;
    Reg bits = keys == 1 ? b_.load_one(element, b_.at(mask)) : b_.load(element, b_.at(mask));
    if (additive) return b_.vadd(value, bits);
    Reg allowed = b_.igreater(bits, b_.zero());
    return b_.select(allowed, value, b_.splat(kMinusInfinity));
  }

  // --- softmax

  // Each head's scores become weights: exp(score - largest), the largest of all chunks until now;
  // of i8 times the value's scale.
  void softmax() {
    Reg row = scratch(at_.scores), factor = scratch(at_.factors), planes;
    if (spec_.integers) planes = scratch(at_.weights);
    Reg part = b_.arg(AttentionArgs::part);
    b_.loop(b_.constant(spec_.group), [&] {
      softmax_row(row, part, factor, planes);
      b_.add_to(row, TokenLayout::score_bytes);
      b_.add_to(part, part_.bytes);
      b_.add_to(factor, 4);
      if (spec_.integers) b_.add_to(planes, at_.weight_bytes);
    });
  }

  // planes: where the weights go as integers.
  void softmax_row(Reg row, Reg part, Reg factor, Reg planes) {
    Reg before = b_.broadcast(Element::f32, b_.at(part, part_.most));
    Reg most = b_.copy(before);
    Reg at = b_.copy(row);
    b_.loop(b_.copy(vectors_), [&] {
      b_.assign(most, b_.vmax(most, b_.load(Element::f32, b_.at(at))));
      b_.add_to(at, b_.vector_bytes());
    });
    most = b_.reduce_max(most);
    b_.store_one(Element::f32, b_.at(part, part_.most), most);
    // All masked: subtract 0, and every exp is 0.
    most = b_.select(b_.equal(most, b_.splat(kMinusInfinity)), b_.zero(), most);
    Reg sum = b_.zero(), scales, half, weights, most_weight, zero;
    if (spec_.has_scales()) scales = scratch(at_.value_scales);
    if (spec_.dots) {
      half = b_.splat_bits(0x8000u);
      weights = b_.copy(row);  // over scores that have been read
    }
    if (spec_.integers) {
      most_weight = b_.zero();
      zero = b_.zero();
    }
    b_.assign(at, row);
    b_.loop(b_.copy(vectors_), [&] {
      Reg e = jit::math::exp(b_, b_.vsub(b_.load(Element::f32, b_.at(at)), most));
      b_.assign(sum, b_.vadd(sum, e));
      if (spec_.has_scales()) {
        e = b_.vmul(e, b_.load(Element::f32, b_.at(scales)));
        b_.add_to(scales, b_.vector_bytes());
      }
      if (spec_.integers) {
        b_.assign(most_weight, b_.vmax(most_weight, e));
        b_.fma(sum, e, zero);  // of a scale that is NaN no integer tells
      }
      if (spec_.dots) {
        b_.store(Element::u16, b_.at(weights), b_.vshift_right(b_.iadd(e, half), 16));
        b_.add_to(weights, 2 * spec_.lanes);
      } else {
        b_.store(Element::f32, b_.at(at), e);
      }
      b_.add_to(at, b_.vector_bytes());
    });
    if (spec_.integers) {
      split_weights(b_, row, vectors_, b_.reduce_max(most_weight), planes,
                    b_.add(factor, at_.units - at_.factors));
    }
    Reg left = jit::math::exp(b_, b_.vsub(before, most));
    b_.store_one(Element::f32, b_.at(factor), left);
    sum = lane_sum(b_, &Builder::vadd, sum);
    b_.fma(sum, left, b_.broadcast(Element::f32, b_.at(part, part_.sum)));
    b_.store_one(Element::f32, b_.at(part, part_.sum), sum);
  }

  const AttentionKernel& spec_;
  Builder b_;
  KeyBlocks blocks_;
  TokenLayout at_;
  PartLayout part_;
  HeadVectors head_;
  Reg vectors_;  // of a head's scores in the current chunk
  Reg scale_;
  Reg upper_;  // the upper halves of lanes
};

}  // namespace

std::int64_t row_bytes(const AttentionKernel& spec) {
  return spec.head_dim * size_in_bytes(spec.cache) + (spec.has_scales() ? kScaleBytes : 0);
}

std::int64_t scratch_bytes(const AttentionKernel& spec) { return TokenLayout(spec).bytes; }

std::string print(const AttentionKernel& spec) {
  constexpr std::array masks{"none", "boolean", "additive"};
  std::string text =
      fmt::format("attention lanes={} group={} head_dim={} input={} cache={} mask={}", spec.lanes,
                  spec.group, spec.head_dim, graph::name(spec.input), graph::name(spec.cache),
                  masks[static_cast<std::size_t>(spec.mask)]);
  if (spec.softcap) text += " softcap";
  if (spec.slopes) text += " slopes";
  if (spec.sinks) text += " sinks";
  if (spec.dots) text += " dots";
  if (spec.integers) text += " integers";
  if (spec.prefetch_level > 0) text += fmt::format(" prefetch_level={}", spec.prefetch_level);
  if (spec.prefetch_only_jumps) text += " prefetch_only_jumps";
  return text;
}

Status supported(const AttentionKernel& spec) {
  if (spec.lanes != 8 && spec.lanes != 16) return Error{fmt::format("{} lanes", spec.lanes)};
  if (spec.group < 1 || spec.head_dim < 1) return Error{"attention without heads or head_dim"};
  if (spec.prefetch_level < 0 || spec.prefetch_level > 1) {
    return Error{fmt::format("keys asked for into level {}", spec.prefetch_level)};
  }
  if (spec.dots &&
      (spec.lanes != 16 || spec.input != DataType::bf16 || spec.cache != DataType::bf16)) {
    return Error{"products by vdpbf16ps of other than bf16 with AVX-512"};
  }
  if (spec.integers &&
      (spec.lanes != 16 || size_in_bytes(spec.input) != 2 || spec.cache != DataType::i8 ||
       spec.head_dim % kBytesOfVector != 0 || spec.head_dim > kMostIntegerColumns)) {
    return Error{"products by vpdpbusd of other than 16 bits with i8, in whole vectors of AVX-512"};
  }
  for (DataType type : {spec.input, spec.cache}) {
    const bool is_float = type == DataType::f32 || type == DataType::bf16 || type == DataType::f16;
    if (!is_float && (type != DataType::i8 || type == spec.input)) {
      return Error{fmt::format("attention in {}", graph::name(type))};
    }
    if (spec.head_dim % spec.lanes != 0 && !has_masked_moves(type, spec.lanes)) {
      return Error{fmt::format("head_dim {} in {} is not a multiple of {} lanes", spec.head_dim,
                               graph::name(type), spec.lanes)};
    }
  }
  return {};
}

jit::vir::Function build(const AttentionKernel& spec) { return AttentionBuilder(spec).run(); }

}  // namespace tilewright::ops
