// The attention kernel for many queries, in phases over scratch that only this thread sees:
//
//   transpose  q becomes [head_dim][rows], so that lanes are rows
//   scores     [keys][rows]: a few keys at a time, each q of the tile loaded once for them; of i8
//              they are widened into scratch first, where one element after another is read
//   finish     softcap, slopes, mask, the rows' ranges of keys; each row's largest score
//   softmax    down the keys, all rows of a vector at once: nothing is summed across lanes; of i8
//              the weights then take in the scales of the values
//   output     a few rows x two vectors of head_dim in registers, keys outside
//
// Phases are separate loops because an activation beside the accumulators would spill; a score is
// read and written three times for 4 * head_dim operations.
//
// Tested by prefill_attention_test.
#include "ops/attention/prefill_kernel.h"

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "jit/math.h"
#include "jit/vir/builder.h"
#include "ops/attention/chunk_sums.h"
#include "ops/attention/head_vectors.h"
#include "ops/attention/key_blocks.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// With the vectors of a tile's rows, as many accumulators as leave room for q and a key.
constexpr int kRowVectors = 3;
int keys_at_once(int lanes) { return lanes == 16 ? 8 : 4; }
constexpr int kOutputVectors = 2;  // columns of the output phase
int output_rows_at_once(int lanes) { return prefill_rows(lanes) / 4; }

// A score is one chain of additions up to so many columns of a head, chunks of these beyond: at 256
// one chain had 1.8 times the rounding error of PyTorch's product.
constexpr int kMostColumns = 128;
constexpr int kChunkColumns = 64;

constexpr std::int64_t kHeaderBytes = 64;  // KeyBlocks

// Of a key that was widened.
std::int64_t wide_bytes(const AttentionKernel& spec) {
  return static_cast<std::int64_t>(HeadVectors(spec.head_dim, spec.lanes).count()) * 4 * spec.lanes;
}

// Scratch: the header, a row's numbers, the totals of the output phase, q, widened keys, the
// weights.
struct ScratchLayout {
  explicit ScratchLayout(const AttentionKernel& spec)
      : row_bytes(4 * prefill_rows(spec.lanes)),
        most(kHeaderBytes),
        divisor(most + row_bytes),
        totals(divisor + row_bytes),
        query(totals + output_rows_at_once(spec.lanes) * kOutputVectors * 4 * spec.lanes),
        wide(query + spec.head_dim * row_bytes),
        weights(wide + (spec.has_scales() ? keys_at_once(spec.lanes) * wide_bytes(spec) : 0)) {}
  std::int64_t row_bytes;  // of a number per row
  std::int64_t most, divisor, totals, query, wide, weights;
};

class PrefillBuilder {
 public:
  explicit PrefillBuilder(const AttentionKernel& spec)
      : spec_(spec),
        at_(spec),
        b_(name(spec), spec.lanes, PrefillArgs::count),
        blocks_(b_, {PrefillArgs::first_key, PrefillArgs::key_count, PrefillArgs::block_tokens,
                     PrefillArgs::scratch, 0}),
        head_(spec.head_dim, spec.lanes) {}

  jit::vir::Function run() && {
    blocks_.find_first();
    transpose_queries();
    score();
    if (spec_.softcap || spec_.slopes) bend_scores();
    if (spec_.mask != MaskKind::none) add_masks();
    limit_keys();
    softmax();
    if (spec_.has_scales()) scale_weights();
    output();
    return std::move(b_).finish();
  }

 private:
  static std::string name(const AttentionKernel& spec) {
    std::string text = print_prefill(spec);
    std::replace(text.begin(), text.end(), ' ', '.');
    return text;
  }

  int rows() const { return prefill_rows(spec_.lanes); }
  Reg scratch(std::int64_t offset) { return b_.add(b_.arg(PrefillArgs::scratch), offset); }
  Address vector(Reg base, int index) const { return b_.at(base, index * b_.vector_bytes()); }
  // Of first_keys, end_keys, slopes, sinks.
  Reg row_numbers(PrefillArgs::Slot slot, int index) {
    return b_.load(Element::f32, vector(b_.arg(slot), index));
  }

  // The body for each key, with `weights` at its row and `key` its number.
  template <class Body>
  void each_key(
      const Body& body, const std::function<void()>& end_chunk = [] {}) {
    Reg weights = scratch(at_.weights);
    Reg key = b_.arg(PrefillArgs::first_key);
    blocks_.loop_chunks(
        blocks_.key_count(),
        [&] {
          body(weights, key);
          b_.add_to(weights, at_.row_bytes);
          b_.add_to(key, 1);
        },
        end_chunk);
  }

  void transpose_queries() {
    constexpr int unroll = 4;
    const int bytes = size_in_bytes(spec_.input);
    Reg row = b_.arg(PrefillArgs::q_rows), column = scratch(at_.query);
    b_.loop(b_.constant(rows()), [&] {
      Reg from = b_.load_gpr(Element::i64, b_.at(row));
      Reg to = b_.copy(column);
      const auto copy = [&](int count) {
        for (int d = 0; d < count; ++d) {
          b_.store_one(Element::f32, b_.at(to, d * at_.row_bytes),
                       b_.load_one(load_element(spec_.input), b_.at(from, d * bytes)));
        }
      };
      b_.loop(b_.constant(spec_.head_dim / unroll), [&] {
        copy(unroll);
        b_.add_to(from, unroll * bytes);
        b_.add_to(to, unroll * at_.row_bytes);
      });
      copy(spec_.head_dim % unroll);
      b_.add_to(row, 8);
      b_.add_to(column, 4);
    });
  }

  // --- scores

  void score() {
    if (spec_.has_scales()) head_.make_mask(b_);
    Reg weights = scratch(at_.weights);
    std::vector<KeyBlocks::Table> tables{{PrefillArgs::k_blocks, PrefillArgs::k_token_stride}};
    if (spec_.has_scales()) tables.push_back({tables[0].blocks, tables[0].stride, true});
    blocks_.walk(blocks_.first(), blocks_.key_count(), tables,
                 [&](std::span<const Reg> at, Reg tokens) {
                   Reg token = at[0];
                   const int most = keys_at_once(spec_.lanes);
                   for (int keys : {most, 1}) {
                     Reg steps = keys == 1 ? b_.bit_and(tokens, most - 1)
                                           : b_.shift_right(tokens, most == 8 ? 3 : 2);
                     b_.loop(steps, [&] {
                       if (spec_.has_scales()) {
                         widen(keys, token, at[1]);
                         score_keys(keys, DataType::f32, scratch(at_.wide), weights);
                       } else {
                         score_keys(keys, spec_.cache, token, weights);
                       }
                       b_.add_to(token, b_.mul(b_.arg(PrefillArgs::k_token_stride), keys));
                       b_.add_to(weights, keys * at_.row_bytes);
                     });
                   }
                 });
  }

  // The keys of i8 from `token` on times their scales, as f32; `scales` moves behind theirs.
  void widen(int keys, Reg token, Reg scales) {
    Reg from = b_.copy(token), to = scratch(at_.wide);
    for (int key = 0; key < keys; ++key) {
      Reg scale = b_.broadcast(Element::f32, b_.at(scales, key * kScaleBytes));
      for (int v = 0; v < head_.count(); ++v) {
        Reg numbers = load(b_, spec_.cache, from, head_.columns(v));
        b_.store(Element::f32, vector(to, v), b_.vmul(numbers, scale));
      }
      b_.add_to(from, b_.arg(PrefillArgs::k_token_stride));
      b_.add_to(to, wide_bytes(spec_));
    }
    b_.add_to(scales, keys * kScaleBytes);
  }

  // `type`: the cache's, or f32 if they were widened.
  void score_keys(int keys, DataType type, Reg token, Reg weights) {
    constexpr int unroll = 4;
    const int bytes = size_in_bytes(type);
    std::vector<Reg> tokens{b_.copy(token)};  // every fourth
    Reg stride, stride3;
    if (keys > 1) {
      stride =
          spec_.has_scales() ? b_.constant(wide_bytes(spec_)) : b_.arg(PrefillArgs::k_token_stride);
      stride3 = b_.mul(stride, 3);
    }
    while (static_cast<int>(tokens.size()) * 4 < keys) {
      tokens.push_back(b_.lea(b_.at(tokens.back(), stride, 4)));
    }
    const auto key_element = [&](int key, int d) {
      Reg base = tokens[static_cast<std::size_t>(key / 4)];
      if (key % 4 == 0) return b_.at(base, d * bytes);
      if (key % 4 == 3) return b_.at(base, stride3, 1, d * bytes);
      return b_.at(base, stride, key % 4, d * bytes);
    };
    std::vector<std::vector<Reg>> sums(static_cast<std::size_t>(keys));
    for (auto& of_key : sums) {
      for (int v = 0; v < kRowVectors; ++v) of_key.push_back(b_.zero());
    }
    const auto each_sum = [&](const auto& body) {
      for (int key = 0; key < keys; ++key) {
        for (int v = 0; v < kRowVectors; ++v) {
          body(sums[static_cast<std::size_t>(key)][static_cast<std::size_t>(v)],
               b_.at(weights, key * at_.row_bytes + v * b_.vector_bytes()));
        }
      }
    };
    Reg query = scratch(at_.query);
    const auto multiply = [&](int count) {
      for (int d = 0; d < count; ++d) {
        std::vector<Reg> q;
        for (int v = 0; v < kRowVectors; ++v) {
          q.push_back(
              b_.load(Element::f32, b_.at(query, d * at_.row_bytes + v * b_.vector_bytes())));
        }
        for (int key = 0; key < keys; ++key) {
          Reg k = b_.broadcast(load_element(type), key_element(key, d));
          for (std::size_t v = 0; v < q.size(); ++v) {
            b_.fma(sums[static_cast<std::size_t>(key)][v], k, q[v]);
          }
        }
      }
    };
    const auto multiply_columns = [&](int count) {
      b_.loop(b_.constant(count / unroll), [&] {
        multiply(unroll);
        b_.add_to(query, unroll * at_.row_bytes);
        for (Reg base : tokens) b_.add_to(base, unroll * bytes);
      });
      multiply(count % unroll);
    };
    // Long sums are added up in chunks, as those over keys are.
    const int chunks = spec_.head_dim > kMostColumns ? (spec_.head_dim - 1) / kChunkColumns : 0;
    if (chunks > 0) {
      each_sum([&](Reg sum, const Address& to) { b_.store(Element::f32, to, sum); });
      b_.loop(b_.constant(chunks), [&] {
        multiply_columns(kChunkColumns);
        each_sum([&](Reg sum, const Address& to) {
          b_.store(Element::f32, to, b_.vadd(b_.load(Element::f32, to), sum));
          b_.assign(sum, b_.zero());
        });
      });
    }
    multiply_columns(spec_.head_dim - chunks * kChunkColumns);
    Reg scale = b_.splat(b_.arg(PrefillArgs::scale));
    each_sum([&](Reg sum, const Address& to) {
      if (chunks > 0) sum = b_.vadd(b_.load(Element::f32, to), sum);
      b_.store(Element::f32, to, b_.vmul(sum, scale));
    });
  }

  // --- from scores to weights

  void bend_scores() {
    each_key([&](Reg weights, Reg key) {
      for (int v = 0; v < kRowVectors; ++v) {
        Reg value = b_.load(Element::f32, vector(weights, v));
        if (spec_.softcap) {
          Reg cap = b_.splat(b_.arg(PrefillArgs::softcap));
          value = b_.vmul(jit::math::tanh(b_, b_.vdiv(value, cap)), cap);
        }
        if (spec_.slopes) {
          Reg place = b_.isub(b_.splat(key), row_numbers(PrefillArgs::first_keys, v));
          value = b_.vadd(value, b_.vmul(row_numbers(PrefillArgs::slopes, v), b_.to_f32(place)));
        }
        b_.store(Element::f32, vector(weights, v), value);
      }
    });
  }

  // One element at a time: a row of the mask lies across the lanes.
  void add_masks() {
    const bool additive = spec_.mask == MaskKind::additive;
    const int bytes = additive ? 4 : 1;
    Reg row = b_.arg(PrefillArgs::mask_rows), column = scratch(at_.weights);
    b_.loop(b_.constant(rows()), [&] {
      Reg mask = b_.load_gpr(Element::i64, b_.at(row));
      b_.add_to(mask, b_.mul(b_.arg(PrefillArgs::first_key), bytes));
      Reg weight = b_.copy(column);
      b_.loop(blocks_.key_count(), [&] {
        Reg value = b_.load_one(Element::f32, b_.at(weight));
        if (additive) {
          value = b_.vadd(value, b_.load_one(Element::f32, b_.at(mask)));
        } else {
          Reg allowed = b_.igreater(b_.load_one(Element::u8, b_.at(mask)), b_.zero());
          value = b_.select(allowed, value, b_.splat(kMinusInfinity));
        }
        b_.store_one(Element::f32, b_.at(weight), value);
        b_.add_to(weight, at_.row_bytes);
        b_.add_to(mask, bytes);
      });
      b_.add_to(row, 8);
      b_.add_to(column, 4);
    });
  }

  // Keys outside a row's range get minus infinity; finds each row's largest score.
  void limit_keys() {
    Reg nothing = b_.splat(kMinusInfinity);
    for (int v = 0; v < kRowVectors; ++v) {
      Reg most = spec_.sinks ? row_numbers(PrefillArgs::sinks, v) : b_.copy(nothing);
      Reg first = row_numbers(PrefillArgs::first_keys, v);
      Reg end = row_numbers(PrefillArgs::end_keys, v);
      each_key([&](Reg weights, Reg key) {
        Reg number = b_.splat(key);
        Reg value = b_.load(Element::f32, vector(weights, v));
        value = b_.select(b_.igreater(end, number), value, nothing);
        value = b_.select(b_.igreater(first, number), nothing, value);
        b_.store(Element::f32, vector(weights, v), value);
        b_.assign(most, b_.vmax(most, value));
      });
      b_.store(Element::f32, vector(scratch(at_.most), v), most);
    }
  }

  void softmax() {
    for (int v = 0; v < kRowVectors; ++v) {
      Reg most = b_.load(Element::f32, vector(scratch(at_.most), v));
      // All masked: subtract 0, and every exp is 0.
      most = b_.select(b_.equal(most, b_.splat(kMinusInfinity)), b_.zero(), most);
      Reg sum = b_.zero(), chunk = b_.zero();
      each_key(
          [&](Reg weights, Reg) {
            Reg score = b_.load(Element::f32, vector(weights, v));
            Reg weight = jit::math::exp(b_, b_.vsub(score, most));
            b_.store(Element::f32, vector(weights, v), weight);
            b_.assign(chunk, b_.vadd(chunk, weight));
          },
          [&] {
            b_.assign(sum, b_.vadd(sum, chunk));
            b_.assign(chunk, b_.zero());
          });
      if (spec_.sinks) {
        Reg sink = row_numbers(PrefillArgs::sinks, v);
        sum = b_.vadd(sum, jit::math::exp(b_, b_.vsub(sink, most)));
      }
      // A sum of zero (no key, or all masked) must give zeros: 0 / infinity.
      Reg infinity = b_.splat(-kMinusInfinity);
      Reg divisor = b_.select(b_.equal(sum, b_.zero()), infinity, sum);
      b_.store(Element::f32, vector(scratch(at_.divisor), v), divisor);
    }
  }

  // Weights take in what their values are multiplied by.
  void scale_weights() {
    Reg weights = scratch(at_.weights);
    const KeyBlocks::Table scales{PrefillArgs::v_blocks, PrefillArgs::v_token_stride, true};
    blocks_.walk(scales, [&](std::span<const Reg> at, Reg tokens) {
      Reg from = at[0];
      b_.loop(tokens, [&] {
        Reg scale = b_.broadcast(Element::f32, b_.at(from));
        for (int v = 0; v < kRowVectors; ++v) {
          Reg weight = b_.load(Element::f32, vector(weights, v));
          b_.store(Element::f32, vector(weights, v), b_.vmul(weight, scale));
        }
        b_.add_to(weights, at_.row_bytes);
        b_.add_to(from, kScaleBytes);
      });
    });
  }

  // --- output

  void output() {
    head_.make_mask(b_);
    const int count = output_rows_at_once(spec_.lanes);
    row_weights_ = scratch(at_.weights);
    row_divisors_ = scratch(at_.divisor);
    row_addresses_ = b_.arg(PrefillArgs::output_rows);
    b_.loop(b_.constant(rows() / count), [&] {
      for (int first = 0; first < head_.count(); first += kOutputVectors) {
        output_columns(count, first, std::min(kOutputVectors, head_.count() - first));
      }
      b_.add_to(row_weights_, 4 * count);
      b_.add_to(row_divisors_, 4 * count);
      b_.add_to(row_addresses_, 8 * count);
    });
  }

  void output_columns(int count, int first, int width) {
    ChunkSums sums(b_, PrefillArgs::scratch, at_.totals, count * width);
    Reg weights = b_.copy(row_weights_);
    const auto add_keys = [&](std::span<const Reg> at, Reg tokens) {
      Reg token = at[0];
      for (int keys : {4, 1}) {
        Reg steps = keys == 1 ? b_.bit_and(tokens, 3) : b_.shift_right(tokens, 2);
        b_.loop(steps, [&] {
          for (int key = 0; key < keys; ++key) {
            std::vector<Reg> values;
            for (int v = 0; v < width; ++v) {
              values.push_back(load(b_, spec_.cache, token, head_.columns(first + v)));
            }
            for (int row = 0; row < count; ++row) {
              Reg weight =
                  b_.broadcast(Element::f32, b_.at(weights, key * at_.row_bytes + 4 * row));
              for (int v = 0; v < width; ++v) {
                b_.fma(sums[row * width + v], weight, values[static_cast<std::size_t>(v)]);
              }
            }
            b_.add_to(token, b_.arg(PrefillArgs::v_token_stride));
          }
          b_.add_to(weights, keys * at_.row_bytes);
        });
      }
    };
    blocks_.walk_chunks({PrefillArgs::v_blocks, PrefillArgs::v_token_stride}, add_keys,
                        [&] { sums.end_chunk(); });
    for (int row = 0; row < count; ++row) {
      Reg to = b_.load_gpr(Element::i64, b_.at(row_addresses_, 8 * row));
      Reg divisor = b_.broadcast(Element::f32, b_.at(row_divisors_, 4 * row));
      for (int v = 0; v < width; ++v) {
        store(b_, spec_.input, to, head_.columns(first + v),
              b_.vdiv(sums.total(row * width + v), divisor));
      }
    }
  }

  const AttentionKernel& spec_;
  ScratchLayout at_;
  Builder b_;
  KeyBlocks blocks_;
  HeadVectors head_;
  Reg row_weights_, row_divisors_, row_addresses_;  // of the rows whose output is computed
};

}  // namespace

int prefill_rows(int lanes) { return kRowVectors * lanes; }
static_assert(kRowVectors * 16 == kMostPrefillRows);

std::int64_t prefill_scratch_bytes(const AttentionKernel& spec, std::int64_t keys) {
  const ScratchLayout layout(spec);
  return layout.weights + std::max<std::int64_t>(keys, 0) * layout.row_bytes;
}

std::string print_prefill(const AttentionKernel& spec) {
  AttentionKernel any_group = spec;
  any_group.group = 1;
  return "prefill_" + print(any_group);
}

jit::vir::Function build_prefill(const AttentionKernel& spec) { return PrefillBuilder(spec).run(); }

}  // namespace tilewright::ops
