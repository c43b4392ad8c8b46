// The attention kernel in three phases over scratch that only this thread sees:
//
//   scores    [group][keys]: as many keys at a time as a vector has lanes, so that their horizontal
//             sums share one butterfly and end up in one vector, in order. Heads are the inner
//             loop: the keys of a step stay in L1 for the whole group.
//   softmax   in place, a row of a head at a time; the divisor is kept for the last phase
//   output    heads x head_dim accumulators in registers, keys outside
//
// A key's score and a column's sum are added in the same order wherever the key lies in its block.
//
// Tested by attention_test.
#include "ops/attention/attention_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <vector>

#include "jit/math.h"
#include "jit/vir/builder.h"
#include "ops/attention/chunk_sums.h"
#include "ops/attention/head_vectors.h"
#include "ops/attention/key_blocks.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Scratch: a header, the queries as f32 padded to full vectors, a divisor per head, the totals of
// the output phase, the scores.
constexpr std::int64_t kKeyBlocks = 0;    // of KeyBlocks
constexpr std::int64_t kScoreBytes = 16;  // i64: bytes of a head's scores
constexpr std::int64_t kHeaderBytes = 64;

std::int64_t query_bytes(const AttentionKernel& spec) {
  return round_up(spec.head_dim, spec.lanes) * 4;
}
std::int64_t divisors_offset(const AttentionKernel& spec) {
  return kHeaderBytes + round_up(spec.group * query_bytes(spec), 64);
}
std::int64_t totals_offset(const AttentionKernel& spec) {
  return divisors_offset(spec) + round_up(4 * spec.group, 64);
}

// How the output phase cuts the group and head_dim.
struct OutputTile {
  int heads;    // divides the group; at most 4, which two index registers reach
  int vectors;  // of head_dim
};

OutputTile output_tile(const AttentionKernel& spec) {
  OutputTile tile{4, 0};
  while (spec.group % tile.heads != 0) --tile.heads;
  // Beside the accumulators: a weight per head, a value, and with AVX2 the mask of a tail.
  const int registers = spec.lanes == 16 ? 32 : 16;
  const int mask = spec.lanes == 8 && spec.head_dim % spec.lanes != 0 ? 1 : 0;
  const int accumulators = std::min(registers - tile.heads - 1 - mask, registers * 3 / 4);
  const int vectors = static_cast<int>(round_up(spec.head_dim, spec.lanes)) / spec.lanes;
  const int most = accumulators / tile.heads;
  const int passes = (vectors + most - 1) / most;
  tile.vectors = (vectors + passes - 1) / passes;
  return tile;
}

std::int64_t scores_offset(const AttentionKernel& spec) {
  const OutputTile tile = output_tile(spec);
  return totals_offset(spec) + round_up(tile.heads * tile.vectors * 4 * spec.lanes, 64);
}

class AttentionBuilder {
 public:
  explicit AttentionBuilder(const AttentionKernel& spec)
      : spec_(spec),
        b_(name(spec), spec.lanes, AttentionArgs::count),
        blocks_(b_, {AttentionArgs::first_key, AttentionArgs::key_count,
                     AttentionArgs::block_tokens, AttentionArgs::scratch, kKeyBlocks}),
        head_(spec.head_dim, spec.lanes) {}

  jit::vir::Function run() && {
    prepare();
    head_.make_mask(b_);
    copy_queries();
    score();
    b_.loop(heads_with(scores_offset(spec_), 1), [&] { softmax_row(); });
    output();
    return std::move(b_).finish();
  }

 private:
  static std::string name(const AttentionKernel& spec) {
    std::string text = print(spec);
    std::replace(text.begin(), text.end(), ' ', '.');
    return text;
  }

  int log2_lanes() const { return std::countr_zero(static_cast<unsigned>(spec_.lanes)); }

  Reg scratch(std::int64_t offset) { return b_.add(b_.arg(AttentionArgs::scratch), offset); }
  Reg saved(std::int64_t offset) {
    return b_.load_gpr(Element::i64, b_.at(b_.arg(AttentionArgs::scratch), offset));
  }
  void save(std::int64_t offset, Reg value) {
    b_.store_gpr(Element::i64, b_.at(b_.arg(AttentionArgs::scratch), offset), value);
  }
  // Full vectors that hold a head's scores.
  Reg score_vectors() {
    return b_.shift_right(b_.add(blocks_.key_count(), spec_.lanes - 1), log2_lanes());
  }

  // The header, and minus infinity behind each head's last score, so that the softmax needs no
  // tail.
  void prepare() {
    blocks_.find_first();
    Reg score_bytes = b_.bit_and(b_.add(b_.shift_left(blocks_.key_count(), 2), 63), -64);
    save(kScoreBytes, score_bytes);

    Reg used = b_.shift_left(score_vectors(), log2_lanes() + 2);
    b_.if_nonzero(used, [&] {
      Reg last = scratch(scores_offset(spec_) - b_.vector_bytes());
      b_.add_to(last, used);
      Reg nothing = b_.splat(kMinusInfinity);
      b_.loop(b_.constant(spec_.group), [&] {
        b_.store(Element::f32, b_.at(last), nothing);
        b_.add_to(last, score_bytes);
      });
    });
  }

  void copy_queries() {
    Reg from = b_.arg(AttentionArgs::q), to = scratch(kHeaderBytes);
    Reg stride = b_.arg(AttentionArgs::q_head_stride);
    b_.loop(b_.constant(spec_.group), [&] {
      for (int v = 0; v < head_.count(); ++v) {
        b_.store(Element::f32, b_.at(to, v * b_.vector_bytes()),
                 load(b_, spec_.input, from, head_.columns(v)));
      }
      b_.add_to(from, stride);
      b_.add_to(to, query_bytes(spec_));
    });
  }

  // --- scores

  void score() {
    scale_ = b_.splat(b_.arg(AttentionArgs::scale));
    for (int distance = 1; distance < spec_.lanes; distance *= 2) {
      Reg bit = b_.splat_bits(static_cast<std::uint32_t>(distance));
      bit = b_.vand(bit, b_.iota());
      lower_.push_back(b_.iequal(bit, b_.zero()));
    }
    Reg scores = scratch(scores_offset(spec_));
    Reg mask;
    const int mask_bytes = spec_.mask == MaskKind::boolean ? 1 : 4;
    if (spec_.mask != MaskKind::none) {
      mask = b_.arg(AttentionArgs::mask);
      b_.add_to(mask, b_.mul(b_.arg(AttentionArgs::first_key), mask_bytes));
    }
    blocks_.walk(AttentionArgs::k_blocks, AttentionArgs::k_token_stride,
                 [&](Reg token, Reg tokens) {
                   for (int keys : {spec_.lanes, 1}) {
                     Reg steps = keys == 1 ? b_.bit_and(tokens, spec_.lanes - 1)
                                           : b_.shift_right(tokens, log2_lanes());
                     b_.loop(steps, [&] {
                       score_step(keys, token, scores, mask);
                       b_.add_to(token, b_.mul(b_.arg(AttentionArgs::k_token_stride), keys));
                       b_.add_to(scores, 4 * keys);
                       if (mask.valid()) b_.add_to(mask, mask_bytes * keys);
                     });
                   }
                 });
  }

  // The scores of all heads for `keys` keys (a vector of them, or one) from `token` on.
  void score_step(int keys, Reg token, Reg scores, Reg mask) {
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
    Reg query = scratch(kHeaderBytes), to = b_.copy(scores), slope;
    if (spec_.slopes) slope = b_.arg(AttentionArgs::slopes);
    b_.loop(b_.constant(spec_.group), [&] {
      std::vector<Reg> sums;
      for (int key = 0; key < keys; ++key) sums.push_back(b_.zero());
      for (int v = 0; v < head_.count(); ++v) {
        Reg q = b_.load(Element::f32, b_.at(query, v * b_.vector_bytes()));
        for (int key = 0; key < keys; ++key) {
          add_product(sums[static_cast<std::size_t>(key)], q, v, address(key, key_offset(v)));
        }
      }
      Reg value = b_.vmul(keys == 1 ? lane_sum(sums[0]) : lane_sums(sums), scale_);
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
      b_.add_to(query, query_bytes(spec_));
      b_.add_to(to, saved(kScoreBytes));
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

  // The sum of the lanes in every lane, in the order of lane_sums.
  Reg lane_sum(Reg a) {
    for (int distance = 1; distance < spec_.lanes; distance *= 2) {
      a = b_.vadd(a, b_.swap(a, distance));
    }
    return a;
  }

  // Lane i: the sum of the lanes of a[i]. Each step halves the number of vectors: the lower lanes
  // of a pair take partial sums of the first, the upper ones of the second.
  Reg lane_sums(std::vector<Reg> a) {
    for (std::size_t step = 0; step < lower_.size(); ++step) {
      const int distance = 1 << step;
      for (std::size_t i = 0; i < a.size() / 2; ++i) {
        Reg first = a[2 * i], second = a[2 * i + 1];
        Reg own = b_.select(lower_[step], first, second);
        Reg lower_partner = b_.swap(first, distance), upper_partner = b_.swap(second, distance);
        a[i] = b_.vadd(own, b_.select(lower_[step], lower_partner, upper_partner));
      }
      a.resize(a.size() / 2);
    }
    return a[0];
  }

  Reg capped(Reg value) {
    Reg cap = b_.splat(b_.arg(AttentionArgs::softcap));
    return b_.vmul(jit::math::tanh(b_, b_.vdiv(value, cap)), cap);
  }

  // (float)(key - first_key) of the keys whose scores go to the first head's row at `scores`. Small
  // integers become floats by being the last bits of one of 2^23.
  Reg places(Reg scores) {
    Reg first = b_.shift_right(b_.sub(scores, scratch(scores_offset(spec_))), 2);
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

  // For loops over groups of heads: their number; sets row_ to the first one's scores, divisor_ to
  // its divisor and sink_ to its sink.
  Reg heads_with(std::int64_t offset, int heads) {
    row_ = scratch(offset);
    divisor_ = scratch(divisors_offset(spec_));
    if (spec_.sinks) sink_ = b_.arg(AttentionArgs::sinks);
    return b_.constant(spec_.group / heads);
  }

  // row_ becomes exp(row_ - max); its sum becomes the divisor.
  void softmax_row() {
    Reg most = b_.splat(kMinusInfinity);
    Reg at = b_.copy(row_);
    b_.loop(score_vectors(), [&] {
      b_.assign(most, b_.vmax(most, b_.load(Element::f32, b_.at(at))));
      b_.add_to(at, b_.vector_bytes());
    });
    most = b_.reduce_max(most);
    if (spec_.sinks) most = b_.vmax(most, b_.broadcast(Element::f32, b_.at(sink_)));
    // All masked: subtract 0, and every exp is 0.
    Reg nothing = b_.equal(most, b_.splat(kMinusInfinity));
    most = b_.select(nothing, b_.zero(), most);
    Reg sum = b_.zero(), chunk = b_.zero();
    b_.assign(at, row_);
    blocks_.loop_chunks(
        score_vectors(),
        [&] {
          Reg e = jit::math::exp(b_, b_.vsub(b_.load(Element::f32, b_.at(at)), most));
          b_.store(Element::f32, b_.at(at), e);
          b_.assign(chunk, b_.vadd(chunk, e));
          b_.add_to(at, b_.vector_bytes());
        },
        [&] {
          b_.assign(sum, b_.vadd(sum, chunk));
          b_.assign(chunk, b_.zero());
        });
    sum = lane_sum(sum);
    if (spec_.sinks) {
      Reg sink = b_.broadcast(Element::f32, b_.at(sink_));
      sum = b_.vadd(sum, jit::math::exp(b_, b_.vsub(sink, most)));
      b_.add_to(sink_, 4);
    }
    // A sum of zero (no key, or all masked) must give zeros: 0 / infinity.
    Reg infinity = b_.splat(-kMinusInfinity);
    Reg divisor = b_.select(b_.equal(sum, b_.zero()), infinity, sum);
    b_.store_one(Element::f32, b_.at(divisor_), divisor);
    b_.add_to(row_, saved(kScoreBytes));
    b_.add_to(divisor_, 4);
  }

  // --- output

  void output() {
    const OutputTile tile = output_tile(spec_);
    Reg out = b_.arg(AttentionArgs::output);
    b_.loop(heads_with(scores_offset(spec_), tile.heads), [&] {
      for (int first = 0; first < head_.count(); first += tile.vectors) {
        output_tile_of(out, tile.heads, first, std::min(tile.vectors, head_.count() - first));
      }
      b_.add_to(row_, b_.mul(saved(kScoreBytes), tile.heads));
      b_.add_to(divisor_, 4 * tile.heads);
      b_.add_to(out, b_.mul(b_.arg(AttentionArgs::output_head_stride), tile.heads));
    });
  }

  void output_tile_of(Reg out, int heads, int first, int count) {
    ChunkSums sums(b_, AttentionArgs::scratch, totals_offset(spec_), heads * count);
    Reg weights = b_.copy(row_);
    Reg row_bytes, row_bytes3;
    if (heads > 1) row_bytes = saved(kScoreBytes);
    if (heads > 3) row_bytes3 = b_.mul(row_bytes, 3);
    const auto weight = [&](int head) {
      const Address address = head == 0   ? b_.at(weights)
                              : head == 3 ? b_.at(weights, row_bytes3, 1)
                                          : b_.at(weights, row_bytes, head);
      return b_.broadcast(Element::f32, address);
    };
    const auto add_keys = [&](Reg token, Reg tokens) {
      Reg stride = b_.arg(AttentionArgs::v_token_stride);
      b_.loop(tokens, [&] {
        std::vector<Reg> p;
        for (int head = 0; head < heads; ++head) p.push_back(weight(head));
        for (int v = 0; v < count; ++v) {
          Reg value = load(b_, spec_.cache, token, head_.columns(first + v));
          for (int head = 0; head < heads; ++head) {
            b_.fma(sums[head * count + v], p[static_cast<std::size_t>(head)], value);
          }
        }
        b_.add_to(token, stride);
        b_.add_to(weights, 4);
      });
    };
    blocks_.walk_chunks(AttentionArgs::v_blocks, AttentionArgs::v_token_stride, add_keys,
                        [&] { sums.end_chunk(); });
    Reg to = b_.copy(out);
    Reg stride = b_.arg(AttentionArgs::output_head_stride);
    for (int head = 0; head < heads; ++head) {
      Reg divisor = b_.broadcast(Element::f32, b_.at(divisor_, 4 * head));
      for (int v = 0; v < count; ++v) {
        store(b_, spec_.input, to, head_.columns(first + v),
              b_.vdiv(sums.total(head * count + v), divisor));
      }
      b_.add_to(to, stride);
    }
  }

  const AttentionKernel& spec_;
  Builder b_;
  KeyBlocks blocks_;
  HeadVectors head_;
  Reg scale_;
  std::vector<Reg> lower_;  // masks: lanes whose bit 0, 1, 2 ... is clear
  Reg row_, divisor_;       // of the current heads, in scratch
  Reg sink_;                // of the current head
};

}  // namespace

std::int64_t scratch_bytes(const AttentionKernel& spec, std::int64_t keys) {
  return scores_offset(spec) + spec.group * round_up(4 * std::max<std::int64_t>(keys, 0), 64);
}

std::string print(const AttentionKernel& spec) {
  constexpr std::array masks{"none", "boolean", "additive"};
  std::string text =
      fmt::format("attention lanes={} group={} head_dim={} input={} cache={} mask={}", spec.lanes,
                  spec.group, spec.head_dim, graph::name(spec.input), graph::name(spec.cache),
                  masks[static_cast<std::size_t>(spec.mask)]);
  if (spec.softcap) text += " softcap";
  if (spec.slopes) text += " slopes";
  if (spec.sinks) text += " sinks";
  return text;
}

Status supported(const AttentionKernel& spec) {
  if (spec.lanes != 8 && spec.lanes != 16) return Error{fmt::format("{} lanes", spec.lanes)};
  if (spec.group < 1 || spec.head_dim < 1) return Error{"attention without heads or head_dim"};
  for (DataType type : {spec.input, spec.cache}) {
    if (type != DataType::f32 && type != DataType::bf16 && type != DataType::f16) {
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
