// See tile_kernel.h. A block of 32 rows and a panel of 32 columns are 2 x 2 tiles of sums, two of x
// and two of weights: all eight, and four products for four loads, which both take their time.
// Measured on Granite Rapids: operands in L1 run at the registers' peak, in L2 at 73 % of it. So a
// piece of 512 k of a panel (32 KB) stays in L1 while the blocks of x, from L2, pass by; the sums
// wait in memory meanwhile.
//
// Tested by tile_kernel_test, tests/python/test_avx512_machine.py (the emitted bytes).
#include "ops/gemm/tile_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
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
constexpr int kWeightRowBytes = 128;                    // a pair of k of both tiles of columns
constexpr int kWeightStepBytes = 16 * kWeightRowBytes;  // 16 pairs of k
constexpr int kColumnTiles = 2;
constexpr std::int64_t kPieceSteps = 16;
constexpr std::int64_t kStretchSteps = 4;  // of 12 bits: 128 k
constexpr int kLineBytes = 64;

// Of the weights, asked for in each step of each block: the next piece, once 8 blocks have passed.
constexpr int kPrefetchedBytes = 256;

std::int64_t step_count(std::int64_t k) { return (k + kStepLength - 1) / kStepLength; }

int parts(Arithmetic arithmetic) { return arithmetic == Arithmetic::split_tiles ? 3 : 1; }

class TileBuilder {
 public:
  explicit TileBuilder(const LinearKernel& spec)
      : spec_(spec),
        row_tiles_(spec.rows / kTileRows),
        parts_(parts(spec.arithmetic)),
        b_(function_name(spec), spec.lanes, LinearArgs::count),
        reader_(b_) {}

  jit::vir::Function run() && {
    b_.save_tiles(b_.at(b_.arg(LinearArgs::tile_state)));
    b_.configure_tiles();
    x_row_bytes_ = b_.constant(kRowBytes);
    weight_row_bytes_ = b_.constant(kWeightRowBytes);
    panels_left_ = b_.arg(LinearArgs::panel_count);
    b_.loop(panels_left_, [&] { emit_panel(); });
    b_.restore_tiles(b_.at(b_.arg(LinearArgs::tile_state)));
    return std::move(b_).finish();
  }

 private:
  std::int64_t x_step_bytes() const { return std::int64_t{parts_} * spec_.rows * kRowBytes; }
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
      weight_ = b_.add(packed, b_.mul(panel(), bytes));
    }
    x_ = b_.arg(LinearArgs::x);
    const std::int64_t steps = step_count(spec_.k);
    const std::int64_t whole = (steps - 1) / kPieceSteps;
    if (whole > 0) emit_piece({kPieceSteps, true, false});
    if (whole > 1) {
      b_.loop(b_.constant(whole - 1), [&] { emit_piece({kPieceSteps, false, false}); });
    }
    emit_piece({steps - whole * kPieceSteps, whole == 0, true});
    finish_panel(b_, spec_, panel(), b_.arg(LinearArgs::row_count),
                 b_.arg(LinearArgs::partial_sums));
  }

  struct Piece {
    std::int64_t steps;  // of 32 k
    bool first, last;
  };

  // The next piece for all blocks: sums = products if it is the first, or sums += products.
  void emit_piece(const Piece& piece) {
    if (spec_.twelve_bits) {
      emit_unpack(piece);
    } else {
      ahead_ = b_.add(weight_, kPieceSteps * kWeightStepBytes);
    }
    const Reg x = b_.copy(x_), sums = b_.arg(LinearArgs::partial_sums);
    b_.loop(b_.arg(LinearArgs::block_count), [&] {
      begin_sums(sums, piece.first);
      const Reg weight = b_.copy(weight_), block = b_.copy(x);
      b_.loop(b_.constant(piece.steps), [&] {
        emit_step(weight, block);
        b_.add_to(weight, kWeightStepBytes);
        b_.add_to(block, x_step_bytes());
      });
      each_sum(sums, [&](Reg tile, Address at) { b_.tile_store(at, weight_row_bytes_, tile); });
      b_.add_to(x, x_block_bytes());
      b_.add_to(sums, spec_.rows * kPartialSumsBytesPerRow);
    });
    b_.add_to(x_, piece.steps * x_step_bytes());
    if (!spec_.twelve_bits) b_.add_to(weight_, piece.steps * kWeightStepBytes);
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
      for (int i = 0; i < row_tiles_ * kColumnTiles; ++i) sums_.push_back(b_.tile_zero());
      return;
    }
    each_sum(sums, [&](Reg tile, Address at) { b_.tile_load_into(tile, at, weight_row_bytes_); });
  }

  // 32 of k. Each weight meets all parts of x, the smallest first.
  void emit_step(Reg weight, Reg x) {
    std::array<Reg, kColumnTiles> w;
    for (int part = 0; part < parts_; ++part) {
      std::array<Reg, 2> a;
      for (std::size_t column = 0; column < w.size(); ++column) {
        for (std::size_t row = 0; row < static_cast<std::size_t>(row_tiles_); ++row) {
          if (column == 0) a[row] = load_x(x, part, static_cast<int>(row));
          if (!w[column].valid()) w[column] = load_weight(weight, static_cast<int>(column));
          b_.tile_dot_bf16(sums_[row * kColumnTiles + column], a[row], w[column]);
        }
      }
    }
    if (spec_.twelve_bits) return;
    for (int line = 0; line < kPrefetchedBytes; line += kLineBytes) {
      b_.prefetch(b_.at(ahead_, line), 1);
    }
    b_.add_to(ahead_, kPrefetchedBytes);
  }

  Reg load_x(Reg x, int part, int row) {
    const std::int64_t offset = part * spec_.rows * kRowBytes + row * kTileBytes;
    return b_.tile_load(b_.at(x, offset), x_row_bytes_);
  }

  Reg load_weight(Reg weight, int column) {
    return b_.tile_load(b_.at(weight, column * kRowBytes), weight_row_bytes_);
  }

  // The piece in 16 bits, with weight_ at it.
  void emit_unpack(const Piece& piece) {
    const Reg to = b_.arg(LinearArgs::unpacked);
    const std::int64_t stretches = (piece.steps - 1) / kStretchSteps;
    const std::int64_t distance =
        kPieceSteps * kStepLength / twelve_bits::kStepLength * twelve_bits::kStepBytes;
    const auto unpack = [&](std::int64_t count) {
      reader_.begin_stretch();
      reader_.unpack_stretch(count, to, distance);
    };
    const std::int64_t length = kStretchSteps * kStepLength;
    if (stretches > 0) b_.loop(b_.constant(stretches), [&] { unpack(length); });
    // All of k may end inside a step of 32; there is no padding in 12 bits.
    const std::int64_t count = piece.last ? (spec_.k - 1) % length + 1 : length;
    unpack(count);
    const std::int64_t there = (count + twelve_bits::kStepLength - 1) / twelve_bits::kStepLength;
    const std::int64_t wanted =
        (piece.steps - stretches * kStretchSteps) * kStepLength / twelve_bits::kStepLength;
    const Reg zero = b_.zero();  // times x = 0, where what lies here may be NaN
    for (std::int64_t i = 0; i < (wanted - there) * twelve_bits::kPlainStepBytes; i += kLineBytes) {
      b_.store(Element::i32, b_.at(to, i), zero);
    }
    weight_ = b_.arg(LinearArgs::unpacked);
  }

  const LinearKernel& spec_;
  int row_tiles_, parts_;
  Builder b_;
  TwelveBitsReader reader_;
  Reg panels_left_;                     // this one included
  Reg x_row_bytes_, weight_row_bytes_;  // strides
  Reg x_;                               // the piece of the first block
  Reg weight_, ahead_;                  // the piece; what is asked for
  std::vector<Reg> sums_;               // tiles: rows, in each the columns
};

// Packs rows of x; see TilePack.
class PackBuilder {
 public:
  explicit PackBuilder(const TilePack& spec)
      : spec_(spec), b_("tile_pack", 16, TilePackArgs::count) {}

  jit::vir::Function run() && {
    if (splits()) upper_ = b_.splat_bits(0xffff0000u);
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
      b_.loop(b_.constant(step_count(spec_.k) * parts(spec_.arithmetic)), [&] {
        b_.store(Element::i32, b_.at(to), zero);
        b_.add_to(to, spec_.rows * kRowBytes);
      });
      b_.add_to(y, kRowBytes);
    });
    return std::move(b_).finish();
  }

 private:
  static constexpr int kVector = 16;
  bool splits() const { return spec_.arithmetic == Arithmetic::split_tiles; }
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
        b_.add_to(to, parts(spec_.arithmetic) * spec_.rows * kRowBytes);
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
    // Cut, not rounded: differences are exact, and nothing overflows.
    put(2, x);
    const Reg rest = b_.vsub(x, b_.vand(x, upper_));
    put(1, rest);
    put(0, b_.vsub(rest, b_.vand(rest, upper_)));
  }

  const TilePack& spec_;
  Builder b_;
  Reg upper_, magnitude_;
};

}  // namespace

std::int64_t block_bytes(const TilePack& spec) {
  return step_count(spec.k) * parts(spec.arithmetic) * spec.rows * kRowBytes;
}

std::string print(const TilePack& spec) {
  return fmt::format("tile_pack {} rows={} k={}",
                     spec.arithmetic == Arithmetic::split_tiles ? "fp32" : "bf16", spec.rows,
                     spec.k);
}

jit::vir::Function build(const TilePack& spec) { return PackBuilder(spec).run(); }

std::int64_t tile_unpacked_bytes() { return kPieceSteps * kWeightStepBytes; }

bool in_range(std::span<const std::uint32_t> magnitudes, float largest_weight, std::int64_t k) {
  // Patterns of |x| are ordered as their values are, NaN above infinity.
  constexpr std::uint32_t infinity = 0x7f800000;
  const double weight = largest_weight;
  for (std::size_t row = 0; row < magnitudes.size(); row += kMagnitudeBytes / 4) {
    const auto lanes = magnitudes.subspan(row, kMagnitudeBytes / 4);
    const std::uint32_t largest = *std::max_element(lanes.begin(), lanes.end());
    if (largest == 0) continue;
    if (largest >= infinity) return false;
    const double x = std::bit_cast<float>(largest);
    const double product = x * weight;
    if (x < kSmallestFactor || product < kSmallestFactor) return false;
    if (product * static_cast<double>(k) > 0x1p126) return false;
  }
  return weight >= kSmallestFactor && std::isfinite(weight);
}

jit::vir::Function build_tiled(const LinearKernel& spec) { return TileBuilder(spec).run(); }

}  // namespace tilewright::ops
