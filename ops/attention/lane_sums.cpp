// See lane_sums.h.
//
// Tested by attention_test.
#include "ops/attention/lane_sums.h"

namespace tilewright::ops {

using jit::vir::Builder;
using jit::vir::Reg;

Reg lane_sum(Builder& builder, LaneAddition add, Reg a) {
  for (int distance = 1; distance < builder.lanes(); distance *= 2) {
    a = (builder.*add)(a, builder.swap(a, distance));
  }
  return a;
}

Reg lane_sums(Builder& builder, LaneAddition add, std::vector<Reg> a) {
  for (int distance = 1; distance < builder.lanes(); distance *= 2) {
    for (std::size_t i = 0; i < a.size() / 2; ++i) {
      Reg x = a[2 * i], y = a[2 * i + 1];
      a[i] = distance < 4 ? (builder.*add)(builder.even_lanes(x, y), builder.odd_lanes(x, y))
                          : (builder.*add)(builder.even_runs(x, y), builder.odd_runs(x, y));
    }
    a.resize(a.size() / 2);
  }
  return a[0];
}

}  // namespace tilewright::ops
