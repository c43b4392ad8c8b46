// See tile_kernel.h. A block of 32 rows and a panel of 32 columns are 2 x 2 tiles of sums, two of x
// and two of weights: all eight, and four products for four loads, which both take their time.
// Measured on Granite Rapids: operands in L1 run at the registers' peak, in L2 at 73 % of it. So a
// piece of 512 k of a panel (32 KB) stays in L1 while the blocks of x, from L2, pass by; the sums
// wait in memory meanwhile.
//
// Each half of a piece of fp32 is summed in tiles from zero, product by product, the smallest over
// all of its k first; vectors add both halves to the sums: one addition for 96 or 192 products of
// tiles. A piece's weights in three parts are 96 KB, which stay in L2.
//
// Tested by tile_kernel_test, tests/python/test_avx512_machine.py (the emitted bytes).
#include "ops/gemm/tile_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "jit/vir/builder.h"
#include "ops/gemm/epilogue.h"
#include "ops/gemm/pack.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/gemm/twelve_bits_reader.h"

namespace tilewright::ops {
namespace {

using jit::vir::Address;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr int kStepLength = 32;  // of k: a row of a tile
constexpr int kRowBytes = 64;    // of a tile
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kWeightRowBytes = 128;  // a pair of k of both tiles of columns
constexpr int kStepPairs = 16;        // of k
constexpr int kWeightStepBytes = kStepPairs * kWeightRowBytes;
constexpr int kColumnTiles = 2;
constexpr std::int64_t kMostPieceSteps = 16;
constexpr std::int64_t kStretchSteps = 4;  // of 12 bits: 128 k
constexpr int kLineBytes = 64;

// Of the weights, asked for in each step of each block: the next piece, once 8 blocks have passed.
constexpr int kPrefetchedBytes = 256;

constexpr int kParts = 3;  // of an fp32, from the lowest up

std::int64_t step_count(std::int64_t k) { return (k + kStepLength - 1) / kStepLength; }

bool splits(Arithmetic arithmetic) { return arithmetic == Arithmetic::split_tiles; }
int x_parts(Arithmetic arithmetic) { return splits(arithmetic) ? kParts : 1; }
bool splits_weights(const LinearKernel& spec) {
  return splits(spec.arithmetic) && spec.weight != graph::DataType::bf16;
}
// In fp32 a short k has short pieces.
std::int64_t piece_steps(const LinearKernel& spec) {
  return splits(spec.arithmetic) && spec.k < 1024 ? kMostPieceSteps / 2 : kMostPieceSteps;
}
// In 16 bits.
std::int64_t piece_bytes(const LinearKernel& spec) { return piece_steps(spec) * kWeightStepBytes; }
// Of scratch, in front of unpacked weights: the sums of a piece's halves, on their way from tiles
// to vectors.
std::int64_t block_sums_bytes(const LinearKernel& spec) {
  return spec.rows * kPartialSumsBytesPerRow;
}
std::int64_t piece_sums_bytes(const LinearKernel& spec) {
  return splits(spec.arithmetic) ? 2 * block_sums_bytes(spec) : 0;
}

// A part of x times a part of the weights. Those of a pass have about the same size; passes go from
// the smallest up.
struct Product {
  int x, weight;
};
using Pass = std::vector<Product>;

std::vector<Pass> passes(const LinearKernel& spec) {
  if (splits_weights(spec)) return {{{0, 2}, {1, 1}, {2, 0}}, {{1, 2}, {2, 1}}, {{2, 2}}};
  std::vector<Pass> each;
  for (int part = 0; part < x_parts(spec.arithmetic); ++part) each.push_back({{part, 0}});
  return each;
}

// Emits the split of fp32 into three bf16, in the upper halves of the lanes.
class Splitter {
 public:
  explicit Splitter(Builder& builder) : b_(builder) {}

  void begin() {
    upper_ = b_.splat_bits(0xffff0000u);
    half_ = b_.splat_bits(0x8000u);
  }

  // From the lowest up. Rounded, so that the products that are left out have no common sign; the
  // differences are exact. The lowest has all bits that are left, but of a subnormal.
  std::array<Reg, kParts> parts(Reg x) {
    const Reg upper = rounded(x), rest = b_.vsub(x, upper), middle = rounded(rest);
    return {b_.vand(b_.vsub(rest, middle), upper_), middle, upper};
  }

 private:
  Reg rounded(Reg x) { return b_.vand(b_.iadd(x, half_), upper_); }

  Builder& b_;
  Reg upper_, half_;
};

class TileBuilder {
 public:
  explicit TileBuilder(const LinearKernel& spec)
      : spec_(spec),
        row_tiles_(spec.rows / kTileRows),
        piece_steps_(piece_steps(spec)),
        piece_bytes_(piece_bytes(spec)),
        b_(function_name(spec), spec.lanes, LinearArgs::count),
        reader_(b_),
        splitter_(b_) {}

  jit::vir::Function run() && {
    b_.save_tiles(b_.at(b_.arg(LinearArgs::tile_state)));
    b_.configure_tiles();
    x_row_bytes_ = b_.constant(kRowBytes);
    weight_row_bytes_ = b_.constant(kWeightRowBytes);
    if (splits_weights(spec_)) splitter_.begin();
    panels_left_ = b_.arg(LinearArgs::panel_count);
    b_.loop(panels_left_, [&] { emit_panel(); });
    b_.restore_tiles(b_.at(b_.arg(LinearArgs::tile_state)));
    return std::move(b_).finish();
  }

 private:
  bool splits() const { return ops::splits(spec_.arithmetic); }
  // Whether a piece is written to scratch in 16 bits before blocks of rows meet it.
  bool unpacks() const { return spec_.twelve_bits || splits_weights(spec_); }
  std::int64_t x_step_bytes() const {
    return std::int64_t{x_parts(spec_.arithmetic)} * spec_.rows * kRowBytes;
  }
  std::int64_t x_block_bytes() const { return step_count(spec_.k) * x_step_bytes(); }

  Reg panel() {
    const Reg end = b_.add(b_.arg(LinearArgs::panel_begin), b_.arg(LinearArgs::panel_count));
    return b_.sub(end, panels_left_);
  }

  void emit_panel() {
    const Reg packed = b_.arg(LinearArgs::weight);
    if (spec_.twelve_bits) {
      reader_.begin_panel(packed, panel(), spec_.k);
    } else {
      const std::int64_t bytes = packed_bytes(panel_columns(), spec_.k, spec_.weight);
      (splits_weights(spec_) ? source_ : weight_) = b_.add(packed, b_.mul(panel(), bytes));
    }
    x_ = b_.arg(LinearArgs::x);
    const std::int64_t length = piece_steps_ * kStepLength;
    const std::int64_t whole = (spec_.k - 1) / length;
    if (whole > 0) emit_piece({length, true});
    if (whole > 1) b_.loop(b_.constant(whole - 1), [&] { emit_piece({length, false}); });
    emit_piece({spec_.k - whole * length, whole == 0});
    PanelRows(b_, spec_, panel())
        .finish(b_.arg(LinearArgs::row_count), b_.arg(LinearArgs::partial_sums));
  }

  struct Piece {
    std::int64_t length;  // of k
    bool first;
    std::int64_t steps() const { return step_count(length); }
  };

  // The next piece for all blocks: sums = products if it is the first, or sums += products.
  void emit_piece(const Piece& piece) {
    if (spec_.twelve_bits) {
      emit_unpack(piece);
    } else if (splits_weights(spec_)) {
      emit_split(piece);
    } else {
      ahead_ = b_.add(weight_, piece_bytes_);
    }
    const Reg x = b_.copy(x_), sums = b_.arg(LinearArgs::partial_sums);
    b_.loop(b_.arg(LinearArgs::block_count), [&] {
      if (splits()) {
        add_halves(piece, x, sums);
      } else {
        begin_sums(sums, piece.first);
        multiply({0, piece.steps()}, x);
        store_sums(sums);
      }
      b_.add_to(x, x_block_bytes());
      b_.add_to(sums, block_sums_bytes(spec_));
    });
    b_.add_to(x_, piece.steps() * x_step_bytes());
    if (!unpacks()) b_.add_to(weight_, piece.steps() * kWeightStepBytes);
  }

  struct Steps {
    std::int64_t first, count;
  };

  // Adds products of a piece to a block's tiles of sums.
  void multiply(Steps steps, Reg x) {
    const std::vector<Pass> all = passes(spec_);
    for (const Pass& pass : all) {
      const Reg weight = b_.add(weight_, steps.first * kWeightStepBytes);
      const Reg block = b_.add(x, steps.first * x_step_bytes());
      b_.loop(b_.constant(steps.count), [&] {
        for (const Product& product : pass) emit_product(product, weight, block);
        if (&pass == &all.back() && !unpacks()) prefetch_lines();
        b_.add_to(weight, kWeightStepBytes);
        b_.add_to(block, x_step_bytes());
      });
    }
  }

  // Of a block. Each half of a piece is summed from zero; both are added before they meet the sums
  // of the pieces before, which are the larger ones.
  void add_halves(const Piece& piece, Reg x, Reg sums) {
    const std::int64_t half = (piece.steps() + 1) / 2;
    std::vector<std::int64_t> parts;  // where in scratch halves are that are not in sums
    for (const Steps& steps : {Steps{0, half}, Steps{half, piece.steps() - half}}) {
      if (steps.count == 0) continue;
      begin_sums(sums, true);
      multiply(steps, x);
      if (piece.first && steps.first == 0) {
        store_sums(sums);
      } else {
        parts.push_back(static_cast<std::int64_t>(parts.size()) * block_sums_bytes(spec_));
        store_sums(b_.add(b_.arg(LinearArgs::unpacked), parts.back()));
      }
    }
    if (parts.empty()) return;
    const Reg from = b_.copy(b_.arg(LinearArgs::unpacked)), to = b_.copy(sums);
    b_.loop(b_.constant(spec_.rows), [&] {
      for (int offset = 0; offset < kPartialSumsBytesPerRow; offset += b_.vector_bytes()) {
        Reg sum = b_.load(Element::f32, b_.at(from, offset));
        for (std::size_t i = 1; i < parts.size(); ++i) {
          sum = b_.vadd(sum, b_.load(Element::f32, b_.at(from, parts[i] + offset)));
        }
        b_.store(Element::f32, b_.at(to, offset),
                 b_.vadd(sum, b_.load(Element::f32, b_.at(to, offset))));
      }
      b_.add_to(from, kPartialSumsBytesPerRow);
      b_.add_to(to, kPartialSumsBytesPerRow);
    });
  }

  void store_sums(Reg to) {
    each_sum(to, [&](Reg tile, Address at) { b_.tile_store(at, weight_row_bytes_, tile); });
  }

  // Sums lie as weights do: 16 columns of one tile beside those of the other.
  template <class Visit>
  void each_sum(Reg sums, const Visit& visit) {
    for (int row = 0; row < row_tiles_; ++row) {
      for (int column = 0; column < kColumnTiles; ++column) {
        const std::int64_t offset = row * kTileRows * kPartialSumsBytesPerRow + column * kRowBytes;
        visit(sums_[static_cast<std::size_t>(row * kColumnTiles + column)], b_.at(sums, offset));
      }
    }
  }

  void begin_sums(Reg sums, bool first) {
    if (first) {
      sums_.clear();
      for (int i = 0; i < row_tiles_ * kColumnTiles; ++i) sums_.push_back(b_.tile_zero());
      return;
    }
    each_sum(sums, [&](Reg tile, Address at) { b_.tile_load_into(tile, at, weight_row_bytes_); });
  }

  // 32 of k.
  void emit_product(const Product& product, Reg weight, Reg x) {
    std::array<Reg, 2> a;
    for (int column = 0; column < kColumnTiles; ++column) {
      Reg w;
      for (std::size_t row = 0; row < static_cast<std::size_t>(row_tiles_); ++row) {
        if (column == 0) a[row] = load_x(x, product.x, static_cast<int>(row));
        if (!w.valid()) w = load_weight(weight, product.weight, column);
        b_.tile_dot_bf16(sums_[row * kColumnTiles + static_cast<std::size_t>(column)], a[row], w);
      }
    }
  }

  void prefetch_lines() {
    for (int line = 0; line < kPrefetchedBytes; line += kLineBytes) {
      b_.prefetch(b_.at(ahead_, line), 1);
    }
    b_.add_to(ahead_, kPrefetchedBytes);
  }

  Reg load_x(Reg x, int part, int row) {
    const std::int64_t offset = part * spec_.rows * kRowBytes + row * kTileBytes;
    return b_.tile_load(b_.at(x, offset), x_row_bytes_);
  }

  Reg load_weight(Reg weight, int part, int column) {
    const std::int64_t offset = part * piece_bytes_ + column * kRowBytes;
    return b_.tile_load(b_.at(weight, offset), weight_row_bytes_);
  }

  // Where a piece is written to.
  Reg unpacked() { return b_.add(b_.arg(LinearArgs::unpacked), piece_sums_bytes(spec_)); }

  // The piece in 16 bits, with weight_ at it.
  void emit_unpack(const Piece& piece) {
    weight_ = unpacked();
    const Reg to = b_.copy(weight_);
    const std::int64_t stretches = (piece.steps() - 1) / kStretchSteps;
    const std::int64_t distance =
        piece_steps_ * kStepLength / twelve_bits::kStepLength * twelve_bits::kStepBytes;
    const auto unpack = [&](std::int64_t count) {
      reader_.begin_stretch();
      reader_.unpack_stretch(count, to, distance);
    };
    const std::int64_t length = kStretchSteps * kStepLength;
    if (stretches > 0) b_.loop(b_.constant(stretches), [&] { unpack(length); });
    // All of k may end inside a step of 32; there is no padding in 12 bits.
    const std::int64_t count = piece.length - stretches * length;
    unpack(count);
    const std::int64_t there = (count + twelve_bits::kStepLength - 1) / twelve_bits::kStepLength;
    emit_padding(
        to, 1,
        piece.steps() * kStepPairs - (stretches * length + there * twelve_bits::kStepLength) / 2);
  }

  // Pairs of k of so many parts: times x = 0, where what lies here may be NaN.
  void emit_padding(Reg to, int parts, std::int64_t pairs) {
    if (pairs == 0) return;
    const Reg zero = b_.zero();
    b_.loop(b_.constant(pairs), [&] {
      for (int part = 0; part < parts; ++part) store_pair(to, part, {zero, zero});
      b_.add_to(to, kWeightRowBytes);
    });
  }

  void store_pair(Reg to, int part, const std::array<Reg, kColumnTiles>& columns) {
    for (int column = 0; column < kColumnTiles; ++column) {
      b_.store(Element::i32, b_.at(to, part * piece_bytes_ + column * kRowBytes),
               columns[static_cast<std::size_t>(column)]);
    }
  }

  // The piece in three parts, with weight_ at them; source_ moves behind it.
  void emit_split(const Piece& piece) {
    weight_ = unpacked();
    const Reg to = b_.copy(weight_);
    const std::int64_t pairs = piece.steps() * kStepPairs;
    // Weights of 16 bits have padding.
    const std::int64_t whole = has_pairs() ? pairs : piece.length / 2;
    const std::int64_t odd = has_pairs() ? 0 : piece.length % 2;
    if (whole > 0) b_.loop(b_.constant(whole), [&] { emit_split_pair(to, 2); });
    if (odd != 0) emit_split_pair(to, 1);
    emit_padding(to, kParts, pairs - whole - odd);
  }

  bool has_pairs() const { return spec_.weight == graph::DataType::f16; }

  // `count` of the next two k.
  void emit_split_pair(Reg to, int count) {
    const int bytes = has_pairs() ? kWeightRowBytes : 2 * kWeightRowBytes;
    for (int line = 0; line < bytes; line += kLineBytes) {
      b_.prefetch(b_.at(source_, piece_steps_ * kStepPairs * bytes + line), 1);
    }
    std::array<std::array<Reg, kColumnTiles>, kParts> parts;
    for (std::size_t column = 0; column < kColumnTiles; ++column) {
      const auto [even, odd] = load_pair(static_cast<int>(column), count);
      const std::array<Reg, kParts> low = splitter_.parts(even), high = splitter_.parts(odd);
      for (std::size_t part = 0; part < kParts; ++part) {
        parts[part][column] = b_.vor(b_.vshift_right(low[part], 16), high[part]);
      }
    }
    for (int part = 0; part < kParts; ++part) {
      store_pair(to, part, parts[static_cast<std::size_t>(part)]);
    }
    b_.add_to(source_, bytes);
    b_.add_to(to, kWeightRowBytes);
  }

  // As fp32.
  std::array<Reg, 2> load_pair(int column, int count) {
    const std::int64_t offset = column * kRowBytes;
    if (has_pairs()) {
      const Reg pairs = b_.load(Element::i32, b_.at(source_, offset));
      return {b_.low_f16_to_f32(pairs), b_.low_f16_to_f32(b_.vshift_right(pairs, 16))};
    }
    return {
        b_.load(Element::f32, b_.at(source_, offset)),
        count == 1 ? b_.zero() : b_.load(Element::f32, b_.at(source_, kWeightRowBytes + offset))};
  }

  const LinearKernel& spec_;
  int row_tiles_;
  std::int64_t piece_steps_, piece_bytes_;
  Builder b_;
  TwelveBitsReader reader_;
  Splitter splitter_;
  Reg panels_left_;                     // this one included
  Reg x_row_bytes_, weight_row_bytes_;  // strides
  Reg x_;                               // the piece of the first block
  Reg weight_, ahead_;                  // the piece; what is asked for
  Reg source_;                          // weights that are not split yet
  std::vector<Reg> sums_;               // tiles: rows, in each the columns
};

// Packs rows of x; see TilePack.
class PackBuilder {
 public:
  explicit PackBuilder(const TilePack& spec)
      : spec_(spec), b_("tile_pack", 16, TilePackArgs::count), splitter_(b_) {}

  jit::vir::Function run() && {
    if (splits()) splitter_.begin();
    const Reg x = b_.arg(TilePackArgs::x), y = b_.arg(TilePackArgs::y);
    const Reg magnitudes = splits() ? b_.arg(TilePackArgs::magnitudes) : Reg{};
    b_.loop(b_.arg(TilePackArgs::row_count), [&] {
      emit_row(x, y);
      if (splits()) {
        b_.store(Element::i32, b_.at(magnitudes), magnitude_);
        b_.add_to(magnitudes, kMagnitudeBytes);
      }
      b_.add_to(x, b_.arg(TilePackArgs::x_row_stride));
      b_.add_to(y, kRowBytes);
    });
    const Reg zero = b_.zero();
    b_.loop(b_.sub(b_.constant(spec_.rows), b_.arg(TilePackArgs::row_count)), [&] {
      const Reg to = b_.copy(y);
      b_.loop(b_.constant(step_count(spec_.k) * x_parts(spec_.arithmetic)), [&] {
        b_.store(Element::i32, b_.at(to), zero);
        b_.add_to(to, spec_.rows * kRowBytes);
      });
      b_.add_to(y, kRowBytes);
    });
    return std::move(b_).finish();
  }

 private:
  static constexpr int kVector = 16;
  bool splits() const { return ops::splits(spec_.arithmetic); }
  int element_bytes() const { return splits() ? 4 : 2; }

  void emit_row(Reg x, Reg y) {
    const Reg from = b_.copy(x), to = b_.copy(y);
    if (splits()) magnitude_ = b_.zero();
    const std::int64_t whole = spec_.k / kStepLength, rest = spec_.k % kStepLength;
    if (whole > 0) {
      b_.loop(b_.constant(whole), [&] {
        if (splits()) {
          for (int half = 0; half < 2; ++half) emit_half(from, to, half, kVector);
        } else {
          b_.store(Element::i32, b_.at(to), b_.load(Element::i32, b_.at(from)));
        }
        b_.add_to(from, kStepLength * element_bytes());
        b_.add_to(to, x_parts(spec_.arithmetic) * spec_.rows * kRowBytes);
      });
    }
    for (int half = 0; half < 2 && rest > 0; ++half) {
      const std::int64_t count = std::clamp<std::int64_t>(rest - half * kVector, 0, kVector);
      emit_half(from, to, half, static_cast<int>(count));
    }
  }

  // `count` of k, and zeros, to half a row of a tile.
  void emit_half(Reg from, Reg to, int half, int count) {
    Reg x;
    if (count == 0) {
      x = b_.zero();
    } else {
      const Element element = splits() ? Element::f32 : Element::bf16;
      const Address address = b_.at(from, half * kVector * element_bytes());
      x = count == kVector ? b_.load(element, address)
                           : b_.load_masked(element, address, b_.tail_mask(b_.constant(count)));
    }
    const auto put = [&](int part, Reg value) {
      b_.store(Element::u16, b_.at(to, part * spec_.rows * kRowBytes + half * kRowBytes / 2),
               b_.vshift_right(value, 16));
    };
    if (!splits()) return put(0, x);
    const Reg magnitude = b_.vandn(b_.splat_bits(0x80000000u), x);
    b_.assign(magnitude_, b_.select(b_.igreater(magnitude, magnitude_), magnitude, magnitude_));
    const std::array<Reg, kParts> parts = splitter_.parts(x);
    for (int part = 0; part < kParts; ++part) put(part, parts[static_cast<std::size_t>(part)]);
  }

  const TilePack& spec_;
  Builder b_;
  Splitter splitter_;
  Reg magnitude_;
};

}  // namespace

std::int64_t block_bytes(const TilePack& spec) {
  return step_count(spec.k) * x_parts(spec.arithmetic) * spec.rows * kRowBytes;
}

std::string print(const TilePack& spec) {
  return fmt::format("tile_pack {} rows={} k={}", splits(spec.arithmetic) ? "fp32" : "bf16",
                     spec.rows, spec.k);
}

jit::vir::Function build(const TilePack& spec) { return PackBuilder(spec).run(); }

std::int64_t tile_scratch_bytes(const LinearKernel& spec) {
  const int parts = splits_weights(spec) ? kParts : spec.twelve_bits ? 1 : 0;
  return piece_sums_bytes(spec) + parts * piece_bytes(spec);
}

bool in_range(float largest_weight) {
  return largest_weight >= kSmallestFactor && largest_weight <= kLargestFactor;
}

bool in_range(std::span<const std::uint32_t> magnitudes, float largest_weight, std::int64_t k) {
  // Patterns of |x| are ordered as their values are, NaN above infinity.
  constexpr auto most = std::bit_cast<std::uint32_t>(kLargestFactor);
  if (!in_range(largest_weight)) return false;
  const double weight = largest_weight;
  for (std::size_t row = 0; row < magnitudes.size(); row += kMagnitudeBytes / 4) {
    const auto lanes = magnitudes.subspan(row, kMagnitudeBytes / 4);
    const std::uint32_t largest = *std::max_element(lanes.begin(), lanes.end());
    if (largest == 0) continue;
    if (largest > most) return false;
    const double x = std::bit_cast<float>(largest);
    const double product = x * weight;
    if (x < kSmallestFactor || product < kSmallestFactor) return false;
    if (product * static_cast<double>(k) > 0x1p126) return false;
  }
  return true;
}

jit::vir::Function build_tiled(const LinearKernel& spec) { return TileBuilder(spec).run(); }

}  // namespace tilewright::ops
