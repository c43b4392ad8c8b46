// Liveness and linear scan: intervals worked out by hand, and for random programs that no two
// registers that live at the same time share a home.
#include "jit/vir/linear_scan.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>

#include "jit/vir/builder.h"
#include "jit/vir/liveness.h"
#include "vir_case.h"

namespace tilewright::jit::vir {
namespace {

// The interval of each register of the text, and its beginning and end.
std::map<std::string, std::pair<int, int>> intervals_of(const Function& function) {
  std::map<std::string, std::pair<int, int>> result;
  for (const Interval& interval : live_intervals(function)) {
    const char letter = interval.reg.kind == Kind::gpr   ? 'g'
                        : interval.reg.kind == Kind::vec ? 'v'
                                                         : 'm';
    const std::string name =
        interval.reg == kArgsPointer ? "args" : letter + std::to_string(interval.reg.id);
    result[name] = {interval.begin, interval.end};
  }
  return result;
}

using Range = std::pair<int, int>;

TEST(Liveness, StraightLine) {
  Builder b("straight", 8, 2);
  const Reg x = b.arg(0);                 // 0: defines g0
  const Reg y = b.add(x, 8);              // 1: defines g1, last use of g0
  const Reg unused = b.constant(3);       // 2
  b.store_gpr(Element::i64, b.at(y), y);  // 3
  (void)unused;
  const auto intervals = intervals_of(std::move(b).finish());
  EXPECT_EQ(intervals.at("args"), Range(-1, 0));
  EXPECT_EQ(intervals.at("g0"), Range(1, 2));
  EXPECT_EQ(intervals.at("g1"), Range(3, 6));
  EXPECT_EQ(intervals.at("g2"), Range(5, 5));  // needs a home where it is written
}

TEST(Liveness, ALoopKeepsWhatItReads) {
  Builder b("loop", 8, 2);
  const Reg x = b.arg(0);                          // 0
  const Reg n = b.constant(4);                     // 1
  const Reg c = b.splat(2.0f);                     // 2: v0, read in the loop only
  b.loop(n, [&] {                                  // 3
    const Reg v = b.load(Element::f32, b.at(x));   // 4: v1
    b.store(Element::f32, b.at(x), b.vmul(v, c));  // 5: v2, 6
    b.add_to(x, 32);                               // 7
  });                                              // 8
  b.constant(1);                                   // 9
  const auto intervals = intervals_of(std::move(b).finish());
  EXPECT_EQ(intervals.at("v0"), Range(5, 17));  // to the back edge
  EXPECT_EQ(intervals.at("g0"), Range(1, 17));
  EXPECT_EQ(intervals.at("g1"), Range(3, 17));
  EXPECT_EQ(intervals.at("v1"), Range(9, 10));  // of one iteration
  EXPECT_EQ(intervals.at("v2"), Range(11, 12));
}

TEST(Liveness, AnAccumulatorLivesThroughTheLoopAndBeyond) {
  Builder b("sum", 8, 2);
  const Reg x = b.arg(0), n = b.arg(1);  // 0, 1
  const Reg sum = b.zero();              // 2
  b.loop(n, [&] {                        // 3
    b.fma_load(sum, sum, b.at(x));       // 4
  });                                    // 5
  b.store(Element::f32, b.at(x), sum);   // 6
  EXPECT_EQ(intervals_of(std::move(b).finish()).at("v0"), Range(5, 12));
}

TEST(Liveness, BothArmsOfAnIf) {
  Builder b("if", 8, 2);
  const Reg x = b.arg(0);       // 0
  const Reg y = b.constant(1);  // 1
  b.if_nonzero(
      x, [&] { b.assign(y, x); },         // 2, 3, else 4
      [&] { b.constant(7); });            // 5, endif 6
  b.store_gpr(Element::i64, b.at(x), y);  // 7
  const auto intervals = intervals_of(std::move(b).finish());
  EXPECT_EQ(intervals.at("g1"), Range(3, 14));  // the second arm passes the first value on
  EXPECT_EQ(intervals.at("g0"), Range(1, 14));
}

TEST(Liveness, WeightGrowsWithDepth) {
  Builder b("depth", 8, 2);
  const Reg n = b.arg(0), m = b.arg(1);
  const Reg v = b.zero();
  b.loop(n, [&] {
    const Reg inner = b.copy(m);
    b.loop(inner, [&] { b.fma(v, v, v); });
  });
  const Function function = std::move(b).finish();
  double weight = 0;
  bool inner = false;
  for (const Interval& interval : live_intervals(function)) {
    if (interval.reg == v) {
      weight = interval.weight;
      inner = interval.in_inner_loop;
    }
  }
  EXPECT_EQ(weight, 1 + 4 * 100);  // a definition outside; three uses and a definition at depth 2
  EXPECT_TRUE(inner);
}

// --- allocation

std::vector<int> numbers(int count) {
  std::vector<int> result(static_cast<std::size_t>(count));
  std::iota(result.begin(), result.end(), 0);
  return result;
}

Allocation allocate_with(const Function& function, int gprs, int vectors, int masks) {
  const std::vector<std::uint8_t> temporaries(function.code.size(), 0);
  return allocate(function, {numbers(gprs), numbers(vectors), numbers(masks), {}}, temporaries);
}

// Checks an allocation against the intervals: overlapping lives have different homes.
void expect_disjoint(const Function& function, const Allocation& allocation, bool masks_in_vec) {
  const std::vector<Interval> intervals = live_intervals(function);
  const auto scratch = [&](Reg reg) -> const std::vector<int>& {
    if (reg.kind == Kind::gpr) return allocation.gpr_scratch;
    if (reg.kind == Kind::vec || masks_in_vec) return allocation.vec_scratch;
    return allocation.mask_scratch;
  };
  const auto same_class = [&](Kind a, Kind b) {
    return a == b || (masks_in_vec && a != Kind::gpr && b != Kind::gpr);
  };
  for (std::size_t i = 0; i < intervals.size(); ++i) {
    const Interval& a = intervals[i];
    const Home& home = allocation.home(a.reg);
    ASSERT_TRUE(home.exists());
    ASSERT_NE(home.reg >= 0, home.spilled());
    for (int reserved : scratch(a.reg)) ASSERT_NE(home.reg, reserved);
    for (std::size_t j = i + 1; j < intervals.size(); ++j) {
      const Interval& b = intervals[j];
      const Home& other = allocation.home(b.reg);
      if (home.spilled() && other.spilled()) {
        ASSERT_NE(home.slot, other.slot);
      }
      if (!same_class(a.reg.kind, b.reg.kind) || home.reg < 0 || home.reg != other.reg) continue;
      ASSERT_TRUE(a.end < b.begin || b.end < a.begin)
          << "registers " << a.reg.id << " and " << b.reg.id << " share " << home.reg;
    }
  }
}

TEST(LinearScan, RandomProgramsHaveDisjointHomes) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    for (int lanes : {8, 16}) {
      const int registers = seed % 2 == 0 ? 4 : 40;
      const Function function = testing::random_program(seed, lanes, registers, 150).function;
      const Allocation allocation =
          lanes == 16 ? allocate_with(function, 14, 32, 7) : allocate_with(function, 14, 16, 0);
      expect_disjoint(function, allocation, lanes == 8);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(LinearScan, ArgumentsStayWhereTheyArrive) {
  Builder b("args", 8, 2);
  const Reg x = b.arg(0), y = b.arg(1);
  b.store_gpr(Element::i64, b.at(x), y);
  EXPECT_EQ(allocate_with(std::move(b).finish(), 14, 16, 0).args.reg, 0);
}

TEST(LinearScan, AResultTakesTheRegisterOfADyingSource) {
  Builder b("hint", 8, 1);
  const Reg x = b.arg(0), other = b.constant(1);
  const Reg sum = b.add(x, other);  // x dies, `other` does not
  b.store_gpr(Element::i64, b.at(sum), other);
  const Allocation allocation = allocate_with(std::move(b).finish(), 14, 16, 0);
  EXPECT_EQ(allocation.home(sum).reg, allocation.home(x).reg);
}

// Three long lives in a loop and room for two, after scratch: the one used least is spilled.
TEST(LinearScan, SpillsTheLightest) {
  Builder b("pressure", 8, 1);
  const Reg n = b.arg(0);
  std::vector<Reg> values;
  for (int i = 0; i < 6; ++i) values.push_back(b.zero());
  b.loop(n, [&] {
    for (int i = 1; i < 6; ++i) {
      b.fma(values[static_cast<std::size_t>(i)], values[1], values[2]);
    }
  });
  for (Reg value : values) b.store(Element::f32, b.at(n), value);
  const Function function = std::move(b).finish();
  const Allocation all_fit = allocate_with(function, 14, 6, 0);
  EXPECT_EQ(all_fit.spills, 0);
  EXPECT_TRUE(all_fit.vec_scratch.empty());  // nothing is set aside without a spill
  const Allocation allocation = allocate_with(function, 14, 8 - 3, 0);
  EXPECT_TRUE(allocation.home(values[0]).spilled());
  EXPECT_FALSE(allocation.home(values[1]).spilled());
  EXPECT_FALSE(allocation.home(values[2]).spilled());
  EXPECT_EQ(allocation.vec_scratch, (std::vector<int>{2, 3, 4}));
  EXPECT_EQ(allocation.spills, 4);
  EXPECT_EQ(allocation.inner_loop_spills, 3);  // values[0] is not touched in the loop
  EXPECT_EQ(allocation.frame_bytes, 4 * 32);
}

TEST(LinearScan, TemporariesAliasNothing) {
  Builder b("temporary", 8, 1);
  const Reg x = b.arg(0);
  const Reg v = b.zero();
  b.store(Element::f32, b.at(x), v);
  const Function function = std::move(b).finish();
  std::vector<std::uint8_t> temporaries(function.code.size(), 0);
  temporaries[2] = 2;
  const Allocation allocation = allocate(function, {numbers(14), numbers(16), {}, {}}, temporaries);
  const int first = allocation.temporaries[2 * kTemporaries];
  const int second = allocation.temporaries[2 * kTemporaries + 1];
  EXPECT_GE(first, 0);
  EXPECT_GE(second, 0);
  EXPECT_NE(first, second);
  EXPECT_NE(first, allocation.home(v).reg);
  EXPECT_NE(second, allocation.home(v).reg);
}

}  // namespace
}  // namespace tilewright::jit::vir
