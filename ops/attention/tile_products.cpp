// The products of prefill attention by AMX: tdpbf16ps of tiles of 16 rows of 64 bytes.
//
// Scores are keys x queries, so that rows of a strip lie across the lanes, as the softmax wants
// them: keys are the left tiles as they are, queries the right ones, in pairs of columns. Sums are
// transposed likewise, columns x rows: weights are the right tiles, in pairs of keys, which two
// vectors of the softmax are but for a shift. So only values are transposed, once for all strips,
// and what comes out at the end.
//
// Tested by prefill_attention_test.
#include <array>
#include <vector>

#include "ops/attention/prefill_products.h"
#include "ops/attention/transpose.h"

namespace tilewright::ops {
namespace {

using jit::vir::Element;
using jit::vir::Reg;

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;               // of a row
constexpr int kTileColumns = 32;             // of bf16: keys, or columns of a head
constexpr int kValueBytes = 2 * kChunkKeys;  // of a column of values

}  // namespace

void TileProducts::begin() {
  b_.save_tiles(b_.at(scratch(at_.tile_state)));
  b_.configure_tiles();
}

void TileProducts::end() { b_.restore_tiles(b_.at(scratch(at_.tile_state))); }

// [head_dim][kChunkKeys].
void TileProducts::prepare_values() {
  Reg token = scratch(at_.tokens), to = scratch(at_.values);
  b_.loop(b_.constant(kChunkKeys / kTileColumns), [&] {
    Reg columns = b_.copy(token), values = b_.copy(to);
    b_.loop(b_.constant(spec_.attention.head_dim / kTileRows), [&] {
      std::vector<Reg> square;
      for (int pair = 0; pair < kTileRows; ++pair) {
        const std::int64_t even = 2 * pair * at_.token_bytes;
        Reg low = b_.load(Element::bf16, b_.at(columns, even));
        Reg high = b_.load(Element::bf16, b_.at(columns, even + at_.token_bytes));
        square.push_back(b_.vor(b_.vshift_right(low, 16), high));
      }
      square = transpose(b_, square);
      for (int column = 0; column < kTileRows; ++column) {
        b_.store(Element::i32, b_.at(values, column * kValueBytes),
                 square[static_cast<std::size_t>(column)]);
      }
      b_.add_to(columns, 2 * kTileRows);
      b_.add_to(values, kTileRows * kValueBytes);
    });
    b_.add_to(token, kTileColumns * at_.token_bytes);
    b_.add_to(to, kTileBytes);
  });
}

void TileProducts::score(Reg strip, Reg keys) {
  Reg token = scratch(at_.keys), scores = scratch(at_.scores);
  Reg scale = b_.splat(b_.arg(PrefillArgs::scale));
  b_.loop(b_.shift_right(keys, 4), [&] {
    const std::vector<Reg> sums = zeros(kRowVectors);
    Reg columns = b_.copy(token), query = b_.add(strip, at_.query);
    Reg token_stride = b_.constant(at_.token_bytes), row_stride = b_.constant(at_.row_bytes);
    b_.loop(b_.constant(spec_.attention.head_dim / kTileColumns), [&] {
      Reg key = b_.tile_load(b_.at(columns), token_stride);
      for (int v = 0; v < kRowVectors; ++v) {
        Reg rows = b_.tile_load(b_.at(query, v * kTileBytes), row_stride);
        b_.tile_dot_bf16(sums[static_cast<std::size_t>(v)], key, rows);
      }
      b_.add_to(columns, kTileBytes);
      b_.add_to(query, kTileRows * at_.row_bytes);
    });
    for (int v = 0; v < kRowVectors; ++v) {
      b_.tile_store(b_.at(scores, v * kTileBytes), row_stride, sums[static_cast<std::size_t>(v)]);
    }
    b_.loop(b_.constant(kTileRows), [&] {
      for (int v = 0; v < kRowVectors; ++v) {
        b_.store(Element::f32, vector(scores, v),
                 b_.vmul(b_.load(Element::f32, vector(scores, v)), scale));
      }
      b_.add_to(scores, at_.row_bytes);
    });
    b_.add_to(token, kTileRows * at_.token_bytes);
  });
}

// Two tiles of columns at a time. With all rows of a strip they are six tiles of sums, which
// leaves two: weights are loaded once more for the second, which the products hide.
void TileProducts::add_values(Reg strip, Reg keys) {
  Reg values = scratch(at_.values), total = b_.add(strip, at_.totals);
  Reg steps = b_.shift_right(keys, 5);
  std::array<Reg, kRowVectors> rescale;
  for (int v = 0; v < kRowVectors; ++v) {
    rescale[static_cast<std::size_t>(v)] = b_.load(Element::f32, vector(scratch(at_.rescale), v));
  }
  b_.loop(b_.constant(spec_.attention.head_dim / (2 * kTileRows)), [&] {
    const std::vector<Reg> sums = zeros(2 * kRowVectors);
    Reg value = b_.copy(values), weights = scratch(at_.weights);
    Reg value_stride = b_.constant(kValueBytes), row_stride = b_.constant(at_.row_bytes);
    b_.loop(b_.copy(steps), [&] {
      for (int tile = 0; tile < 2; ++tile) {
        Reg columns = b_.tile_load(b_.at(value, tile * kTileRows * kValueBytes), value_stride);
        for (int v = 0; v < kRowVectors; ++v) {
          Reg rows = b_.tile_load(b_.at(weights, v * kTileBytes), row_stride);
          b_.tile_dot_bf16(sums[static_cast<std::size_t>(tile * kRowVectors + v)], columns, rows);
        }
      }
      b_.add_to(value, kTileBytes);
      b_.add_to(weights, kTileRows * at_.row_bytes);
    });
    Reg sum = scratch(at_.sums);
    for (int tile = 0; tile < 2; ++tile) {
      for (int v = 0; v < kRowVectors; ++v) {
        b_.tile_store(b_.at(sum, tile * kTileRows * at_.row_bytes + v * kTileBytes), row_stride,
                      sums[static_cast<std::size_t>(tile * kRowVectors + v)]);
      }
    }
    b_.loop(b_.constant(2 * kTileRows), [&] {
      for (int v = 0; v < kRowVectors; ++v) {
        Reg added = b_.load(Element::f32, vector(sum, v));
        b_.fma_load(added, rescale[static_cast<std::size_t>(v)], vector(total, v));
        b_.store(Element::f32, vector(total, v), added);
      }
      b_.add_to(sum, at_.row_bytes);
      b_.add_to(total, at_.row_bytes);
    });
    b_.add_to(values, 2 * kTileRows * kValueBytes);
  });
}

void TileProducts::finish(Reg strip, Reg output_rows) {
  Reg divisors = b_.add(strip, at_.sum), totals = b_.add(strip, at_.totals);
  b_.loop(b_.constant(kRowVectors), [&] {
    Reg inverse = b_.vdiv(b_.splat(1.0f), b_.load(Element::f32, b_.at(divisors)));
    Reg total = b_.copy(totals), column = b_.constant(0);
    b_.loop(b_.constant(spec_.attention.head_dim / kTileColumns), [&] {
      std::vector<Reg> square;
      for (int pair = 0; pair < kTileRows; ++pair) {
        Reg low = quotient(total, 2 * pair, inverse);
        Reg high = quotient(total, 2 * pair + 1, inverse);
        square.push_back(b_.vor(low, b_.vshift_left(high, 16)));
      }
      square = transpose(b_, square);
      for (int row = 0; row < kTileRows; ++row) {
        Reg to = b_.load_gpr(Element::i64, b_.at(output_rows, 8 * row));
        b_.store(Element::i32, b_.at(to, column, 1), square[static_cast<std::size_t>(row)]);
      }
      b_.add_to(total, kTileColumns * at_.row_bytes);
      b_.add_to(column, 2 * kTileColumns);
    });
    b_.add_to(divisors, kTileBytes);
    b_.add_to(totals, kTileBytes);
    b_.add_to(output_rows, 8 * kTileRows);
  });
}

std::vector<Reg> TileProducts::zeros(int count) {
  std::vector<Reg> tiles;
  for (int i = 0; i < count; ++i) tiles.push_back(b_.tile_zero());
  return tiles;
}

// Divisions would take as long as the softmax of a chunk; bf16 does not see the difference.
Reg TileProducts::quotient(Reg totals, int column, Reg inverse) {
  Reg total = b_.load(Element::f32, b_.at(totals, column * at_.row_bytes));
  return b_.round_to_bf16_bits(b_.vmul(total, inverse));
}

}  // namespace tilewright::ops
