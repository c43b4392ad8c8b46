// See transpose.h.
//
// Tested by transpose_test.
#include "ops/attention/transpose.h"

#include <array>
#include <cassert>

namespace tilewright::ops {
namespace {

using jit::vir::Builder;
using jit::vir::Reg;
using Four = std::array<Reg, 4>;
using Unzip = Reg (Builder::*)(Reg, Reg);

// Place j of vector i becomes place i of vector j, for what `even` and `odd` take for places.
Four turn_four(Builder& b, const Four& x, Unzip even, Unzip odd) {
  const Reg even01 = (b.*even)(x[0], x[1]), odd01 = (b.*odd)(x[0], x[1]);
  const Reg even23 = (b.*even)(x[2], x[3]), odd23 = (b.*odd)(x[2], x[3]);
  const Reg first = (b.*even)(even01, even23), third = (b.*odd)(even01, even23);
  const Reg second = (b.*even)(odd01, odd23), fourth = (b.*odd)(odd01, odd23);
  return {first, second, third, fourth};
}

}  // namespace

Four transpose_runs(Builder& b, const Four& vectors) {
  return turn_four(b, vectors, &Builder::even_runs, &Builder::odd_runs);
}

std::vector<Reg> transpose(Builder& b, const std::vector<Reg>& square) {
  const std::size_t lanes = square.size(), runs = lanes / 4;
  assert(static_cast<int>(lanes) == b.lanes());
  // by_column[c][g]: columns c, 4 + c ... of rows 4 * g ... 4 * g + 3, a column in a run.
  std::array<std::vector<Reg>, 4> by_column;
  for (std::size_t group = 0; group < runs; ++group) {
    const Reg* rows = &square[4 * group];
    const Four turned = turn_four(b, {rows[0], rows[1], rows[2], rows[3]}, &Builder::even_lanes,
                                  &Builder::odd_lanes);
    for (std::size_t c = 0; c < 4; ++c) by_column[c].push_back(turned[c]);
  }
  std::vector<Reg> result(lanes);
  for (std::size_t c = 0; c < 4; ++c) {
    const std::vector<Reg>& groups = by_column[c];
    if (runs == 2) {
      result[c] = b.even_runs(groups[0], groups[1]);
      result[4 + c] = b.odd_runs(groups[0], groups[1]);
      continue;
    }
    const Four turned = transpose_runs(b, {groups[0], groups[1], groups[2], groups[3]});
    for (std::size_t run = 0; run < runs; ++run) result[4 * run + c] = turned[run];
  }
  return result;
}

}  // namespace tilewright::ops
