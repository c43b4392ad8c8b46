// The products of prefill attention by vectors: fused multiply-adds of f32, or vdpbf16ps of pairs
// of bf16, which differ in what a step multiplies: a column and a key, or two of them.
//
// Scores have rows in their lanes: of each unit of a head, the queries of a strip are loaded once
// for a few keys, each element of which is broadcast. Sums have columns in theirs: a few rows x two
// vectors of the head, keys outside. A chunk is one chain of additions from zero, which is then
// added to the totals: one chain over 4096 keys had five times the rounding error of PyTorch's
// blocked product.
//
// Tested by prefill_attention_test.
#include <algorithm>
#include <bit>
#include <vector>

#include "ops/attention/head_vectors.h"
#include "ops/attention/prefill_products.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

// A score is one chain of additions up to so many columns of a head, chunks of these beyond: at 256
// one chain had 1.8 times the rounding error of PyTorch's product.
constexpr int kMostColumns = 128;
constexpr int kChunkColumns = 64;

constexpr int kColumnVectors = 2;  // of the sums
constexpr int kUnroll = 4;         // of units, and of keys or pairs of them

}  // namespace

VectorProducts::VectorProducts(Builder& builder, const PrefillKernel& spec)
    : PrefillScratch(builder, spec),
      head_(spec.attention.head_dim, spec.attention.lanes),
      total_bytes_(std::int64_t{head_.count()} * builder.vector_bytes()) {}

void VectorProducts::prepare_values() {
  if (!spec_.is_paired()) return;
  // The columns of two tokens, side by side.
  Reg token = scratch(at_.tokens), to = scratch(at_.values);
  b_.loop(b_.constant(kChunkKeys / 2), [&] {
    Reg next = b_.add(token, at_.token_bytes);
    for_columns(b_, {head_columns(), {}}, 4, Block::Part::vector, [&](const Block& block) {
      Reg low = load(b_, DataType::bf16, token, block);
      Reg high = load(b_, DataType::bf16, next, block);
      b_.store(Element::i32, address(b_, to, 4, block), b_.vor(b_.vshift_right(low, 16), high));
    });
    b_.add_to(token, 2 * at_.token_bytes);
    b_.add_to(to, total_bytes_);
  });
}

void VectorProducts::score(Reg strip, Reg keys) {
  const int granule = key_granule(spec_);
  Reg token = scratch(at_.keys), scores = scratch(at_.scores);
  b_.loop(b_.shift_right(keys, std::countr_zero(static_cast<unsigned>(granule))), [&] {
    score_keys(granule, token, b_.add(strip, at_.query), scores);
    b_.add_to(token, granule * at_.token_bytes);
    b_.add_to(scores, granule * at_.row_bytes);
  });
}

void VectorProducts::add_values(Reg strip, Reg keys) {
  Reg totals = b_.add(strip, at_.totals), values = scratch(at_.values);
  const int step_keys = (spec_.is_paired() ? 2 : 1) * kUnroll;
  Reg steps = b_.shift_right(keys, std::countr_zero(static_cast<unsigned>(step_keys)));
  const auto columns = [&](int width) {
    add_columns(width, totals, values, steps);
    b_.add_to(totals, width * b_.vector_bytes());
    b_.add_to(values, width * b_.vector_bytes());
  };
  b_.loop(b_.constant(head_.count() / kColumnVectors), [&] { columns(kColumnVectors); });
  if (head_.count() % kColumnVectors != 0) columns(1);
}

void VectorProducts::finish(Reg strip, Reg output_rows) {
  Reg total = b_.add(strip, at_.totals), divisor = b_.add(strip, at_.sum);
  b_.loop(b_.constant(at_.rows), [&] {
    Reg to = b_.load_gpr(Element::i64, b_.at(output_rows));
    Reg over = b_.broadcast(Element::f32, b_.at(divisor));
    for_columns(b_, {spec_.attention.head_dim, {}}, 2, Block::Part::masked,
                [&](const Block& block) {
                  Reg value = load(b_, DataType::f32, total, block);
                  store(b_, spec_.attention.input, to, block, b_.vdiv(value, over));
                });
    b_.add_to(output_rows, 8);
    b_.add_to(divisor, 4);
    b_.add_to(total, total_bytes_);
  });
}

std::int64_t VectorProducts::head_columns() const {
  return std::int64_t{head_.count()} * b_.lanes();
}

Element VectorProducts::unit() const { return spec_.is_paired() ? Element::i32 : Element::f32; }

void VectorProducts::multiply(Reg sum, Reg a, Reg b) {
  spec_.is_paired() ? b_.dot_bf16(sum, a, b) : b_.fma(sum, a, b);
}

void VectorProducts::score_keys(int keys, Reg first, Reg queries, Reg to) {
  Reg token = b_.copy(first), query = b_.copy(queries);
  std::vector<std::vector<Reg>> sums(static_cast<std::size_t>(keys));
  for (auto& of_key : sums) {
    for (int v = 0; v < kRowVectors; ++v) of_key.push_back(b_.zero());
  }
  const auto each_sum = [&](const auto& body) {
    for (int key = 0; key < keys; ++key) {
      for (int v = 0; v < kRowVectors; ++v) {
        body(sums[static_cast<std::size_t>(key)][static_cast<std::size_t>(v)],
             b_.at(to, key * at_.row_bytes + v * b_.vector_bytes()));
      }
    }
  };
  const auto multiply_unit = [&](int u) {
    std::vector<Reg> q;
    for (int v = 0; v < kRowVectors; ++v) {
      q.push_back(b_.load(unit(), b_.at(query, u * at_.row_bytes + v * b_.vector_bytes())));
    }
    for (int key = 0; key < keys; ++key) {
      Reg k = b_.broadcast(unit(), b_.at(token, key * at_.token_bytes + 4 * u));
      for (std::size_t v = 0; v < q.size(); ++v) {
        multiply(sums[static_cast<std::size_t>(key)][v], k, q[v]);
      }
    }
  };
  const auto multiply_units = [&](int count) {
    b_.loop(b_.constant(count / kUnroll), [&] {
      for (int u = 0; u < kUnroll; ++u) multiply_unit(u);
      b_.add_to(query, kUnroll * at_.row_bytes);
      b_.add_to(token, kUnroll * 4);
    });
    for (int u = 0; u < count % kUnroll; ++u) multiply_unit(u);
  };
  // With pairs bf16's own rounding is what counts.
  const bool in_chunks = !spec_.is_paired() && at_.units > kMostColumns;
  const int chunks = in_chunks ? (at_.units - 1) / kChunkColumns : 0;
  if (chunks > 0) {
    each_sum([&](Reg sum, const Address& at) { b_.store(Element::f32, at, sum); });
    b_.loop(b_.constant(chunks), [&] {
      multiply_units(kChunkColumns);
      each_sum([&](Reg sum, const Address& at) {
        b_.store(Element::f32, at, b_.vadd(b_.load(Element::f32, at), sum));
        b_.assign(sum, b_.zero());
      });
    });
  }
  multiply_units(at_.units - chunks * kChunkColumns);
  Reg scale = b_.splat(b_.arg(PrefillArgs::scale));  // no register is free for it before
  each_sum([&](Reg sum, const Address& at) {
    if (chunks > 0) sum = b_.vadd(b_.load(Element::f32, at), sum);
    b_.store(Element::f32, at, b_.vmul(sum, scale));
  });
}

void VectorProducts::add_columns(int width, Reg totals, Reg values, Reg steps) {
  const int rows = at_.rows / 4;  // at once
  Reg total = b_.copy(totals), weights = scratch(at_.weights), rescale = scratch(at_.rescale);
  b_.loop(b_.constant(at_.rows / rows), [&] {
    std::vector<Reg> sums;
    for (int i = 0; i < rows * width; ++i) sums.push_back(b_.zero());
    const auto sum = [&](int row, int v) {
      return sums[static_cast<std::size_t>(row * width + v)];
    };
    Reg weight = b_.copy(weights), value = b_.copy(values);
    b_.loop(b_.copy(steps), [&] {
      for (int step = 0; step < kUnroll; ++step) {
        std::vector<Reg> columns;
        for (int v = 0; v < width; ++v) {
          columns.push_back(
              b_.load(unit(), b_.at(value, step * total_bytes_ + v * b_.vector_bytes())));
        }
        for (int row = 0; row < rows; ++row) {
          Reg w = b_.broadcast(unit(), b_.at(weight, step * at_.row_bytes + 4 * row));
          for (int v = 0; v < width; ++v) {
            multiply(sum(row, v), w, columns[static_cast<std::size_t>(v)]);
          }
        }
      }
      b_.add_to(weight, kUnroll * at_.row_bytes);
      b_.add_to(value, kUnroll * total_bytes_);
    });
    for (int row = 0; row < rows; ++row) {
      Reg factor = b_.broadcast(Element::f32, b_.at(rescale, 4 * row));
      for (int v = 0; v < width; ++v) {
        const Address at = b_.at(total, row * total_bytes_ + v * b_.vector_bytes());
        b_.fma_load(sum(row, v), factor, at);
        b_.store(Element::f32, at, sum(row, v));
      }
    }
    b_.add_to(weights, 4 * rows);
    b_.add_to(rescale, 4 * rows);
    b_.add_to(total, rows * total_bytes_);
  });
}

}  // namespace tilewright::ops
