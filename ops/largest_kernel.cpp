// See largest_kernel.h.
//
// Tested by greedy_search_test.
#include "ops/largest_kernel.h"

#include <fmt/format.h>

#include <limits>
#include <vector>

#include "jit/vir/builder.h"
#include "ops/columns.h"

namespace tilewright::ops {

std::string print(const LargestKernel& spec) {
  return fmt::format("largest lanes={} input={}", spec.lanes, graph::name(spec.input));
}

jit::vir::Function build(const LargestKernel& spec) {
  using jit::vir::Builder;
  using jit::vir::Element;
  using jit::vir::Reg;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr int chains = 4;  // vmax waits for the one before
  Builder b("largest", spec.lanes, LargestArgs::count);
  Reg x = b.arg(LargestArgs::x), largest = b.arg(LargestArgs::largest);
  Reg instead = b.splat(infinity);
  b.loop(b.arg(LargestArgs::blocks), [&] {
    std::vector<Reg> most;
    for (int i = 0; i < chains; ++i) most.push_back(b.splat(-infinity));
    b.loop(b.constant(kLargestBlock / (chains * spec.lanes)), [&] {
      for (int i = 0; i < chains; ++i) {
        Reg value = load(b, spec.input, x, {.part = Block::Part::vector, .first = i * spec.lanes});
        value = b.select(b.not_equal(value, value), instead, value);
        Reg& so_far = most[static_cast<std::size_t>(i)];
        b.assign(so_far, b.vmax(so_far, value));
      }
      b.add_to(x, static_cast<std::int64_t>(chains) * spec.lanes * size_in_bytes(spec.input));
    });
    Reg all = b.vmax(b.vmax(most[0], most[1]), b.vmax(most[2], most[3]));
    b.store_one(Element::f32, b.at(largest), b.reduce_max(all));
    b.add_to(largest, 4);
  });
  return std::move(b).finish();
}

}  // namespace tilewright::ops
