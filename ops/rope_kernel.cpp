// The rotary kernel: both halves of a row at once, so that a row may be rotated in place.
//
// Tested by rope_kernel_test.
#include "ops/rope_kernel.h"

#include <fmt/format.h>

#include "jit/vir/builder.h"
#include "ops/columns.h"

namespace tilewright::ops {
namespace {

using jit::vir::Builder;
using jit::vir::Reg;

constexpr int kUnroll = 8;  // vectors of half a head: straight-line code up to head_dim 128 (AVX2)

struct Halves {
  Reg low, high;
};

class RopeBuilder {
 public:
  explicit RopeBuilder(const RopeKernel& spec)
      : spec_(spec), b_("rope", spec.lanes, RopeArgs::count), half_(spec.head_dim / 2) {}

  jit::vir::Function build() && {
    const bool masked = has_masked_moves(spec_.input, spec_.lanes) &&
                        has_masked_moves(spec_.table, spec_.lanes) &&
                        has_masked_moves(spec_.output, spec_.lanes);
    const Block::Part tail = masked ? Block::Part::masked : Block::Part::single;
    Reg x = b_.arg(RopeArgs::x);
    Reg y = b_.arg(RopeArgs::y);
    Reg cos = b_.arg(RopeArgs::cos);
    Reg sin = b_.arg(RopeArgs::sin);
    Reg rows = b_.arg(RopeArgs::rows);
    b_.loop(rows, [&] {
      for_columns(b_, {.constant = half_}, kUnroll, tail,
                  [&](const Block& block) { rotate(block, x, y, cos, sin); });
      b_.add_to(x, b_.arg(RopeArgs::x_row_stride));
      b_.add_to(y, b_.arg(RopeArgs::y_row_stride));
    });
    return std::move(b_).finish();
  }

 private:
  // Products and sums round as in the composed form (no FMA), so that the bits are ATen's.
  void rotate(const Block& block, Reg x, Reg y, Reg cos, Reg sin) {
    const Halves value = load_halves(spec_.input, x, block);
    const Halves c = load_halves(spec_.table, cos, block);
    const Halves s = load_halves(spec_.table, sin, block);
    Reg low = b_.vsub(b_.vmul(value.low, c.low), b_.vmul(value.high, s.low));
    Reg high = b_.vadd(b_.vmul(value.high, c.high), b_.vmul(value.low, s.high));
    store(b_, spec_.output, y, block, low);
    store(b_, spec_.output, y, upper(block), high);
  }

  Halves load_halves(graph::DataType type, Reg base, const Block& block) {
    return {load(b_, type, base, block), load(b_, type, base, upper(block))};
  }

  Block upper(Block block) const {
    block.first += half_;
    return block;
  }

  const RopeKernel& spec_;
  Builder b_;
  std::int64_t half_;
};

}  // namespace

std::string print(const RopeKernel& spec) {
  return fmt::format("rope lanes={} head_dim={} input={} table={} output={}\n", spec.lanes,
                     spec.head_dim, name(spec.input), name(spec.table), name(spec.output));
}

jit::vir::Function build(const RopeKernel& spec) { return RopeBuilder(spec).build(); }

}  // namespace tilewright::ops
