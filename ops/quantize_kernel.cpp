// The quantising kernel. Magnitudes are compared as integers, their order being that of the floats
// but for NaN, which is above all of them: it is found, where vmaxps might lose it.
//
// Tested by quantize_kernel_test.
#include "ops/quantize_kernel.h"

#include <fmt/format.h>

#include <bit>
#include <limits>

#include "jit/base/eight_bits.h"
#include "jit/vir/builder.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

constexpr int kUnroll = 8;

class QuantizeBuilder {
 public:
  explicit QuantizeBuilder(const QuantizeKernel& spec)
      : spec_(spec), b_("quantize", spec.lanes, QuantizeArgs::count) {}

  jit::vir::Function build() && {
    Reg x = b_.arg(QuantizeArgs::x), y = b_.arg(QuantizeArgs::y);
    Reg to = b_.arg(QuantizeArgs::scales);
    b_.loop(b_.arg(QuantizeArgs::rows), [&] {
      Reg scale = scale_of(largest_magnitude(x));
      b_.store_one(Element::f32, b_.at(to), scale);
      // x / 0 and x / NaN are integers without a value, whose low byte is 0 (vcvt_i32).
      for_columns(b_, {.constant = spec_.head_dim}, kUnroll, tail(), [&](const Block& block) {
        Reg integers = b_.to_i32(b_.vdiv(load(b_, spec_.input, x, block), scale));
        store_bytes(y, block, integers);
      });
      b_.add_to(x, b_.arg(QuantizeArgs::x_row_stride));
      b_.add_to(y, b_.arg(QuantizeArgs::y_row_stride));
      b_.add_to(to, b_.arg(QuantizeArgs::y_row_stride));
    });
    return std::move(b_).finish();
  }

 private:
  // Masked stores of bytes need AVX-512, whatever the loads.
  Block::Part tail() const {
    return has_masked_moves(graph::DataType::i8, spec_.lanes) ? Block::Part::masked
                                                              : Block::Part::single;
  }

  Reg larger(Reg a, Reg b) { return b_.select(b_.igreater(a, b), a, b); }

  // Of the row at x, in every lane, as bits.
  Reg largest_magnitude(Reg x) {
    Reg most = b_.zero(), magnitude = b_.splat_bits(0x7fffffffu);
    for_columns(b_, {.constant = spec_.head_dim}, kUnroll, tail(), [&](const Block& block) {
      b_.assign(most, larger(b_.vand(load(b_, spec_.input, x, block), magnitude), most));
    });
    for (int distance = 1; distance < spec_.lanes; distance *= 2) {
      most = larger(b_.swap(most, distance), most);
    }
    return most;
  }

  Reg scale_of(Reg most) {
    Reg scale = b_.vdiv(most, b_.splat(eight_bits::kMost));
    Reg is_zero = b_.less(scale, b_.splat(eight_bits::kSmallestScale));
    scale = b_.iadd(scale, b_.splat_bits(eight_bits::kDroppedBits));
    scale = b_.vand(scale, b_.splat_bits(~eight_bits::kDroppedBits));
    scale = b_.select(is_zero, b_.zero(), scale);
    Reg has_value = b_.less_equal(most, b_.splat(eight_bits::kLargestRow));
    return b_.select(has_value, scale, b_.splat(std::numeric_limits<float>::quiet_NaN()));
  }

  void store_bytes(Reg y, const Block& block, Reg integers) {
    const jit::vir::Address to = address(b_, y, 1, block);
    switch (block.part) {
      case Block::Part::masked:
        return b_.store_masked(Element::u8, to, integers, block.mask);
      case Block::Part::single:
        return b_.store_one(Element::u8, to, integers);
      case Block::Part::vector:
        return b_.store(Element::u8, to, integers);
    }
  }

  const QuantizeKernel& spec_;
  Builder b_;
};

}  // namespace

std::string print(const QuantizeKernel& spec) {
  return fmt::format("quantize lanes={} head_dim={} input={}\n", spec.lanes, spec.head_dim,
                     name(spec.input));
}

jit::vir::Function build(const QuantizeKernel& spec) { return QuantizeBuilder(spec).build(); }

}  // namespace tilewright::ops
