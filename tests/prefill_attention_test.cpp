// The attention kernel for tiles of rows against the double-precision reference, row by row, over
// block tables of one block and many, in guarded memory. Keys that no row sees are NaN (of i8 their
// scales).
#include "ops/attention/prefill_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <random>

#include "drawn_blocks.h"
#include "guarded_rows.h"
#include "kernel_run.h"
#include "ops/attention/merge_kernel.h"
#include "ops/gemm/arithmetic.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::Arithmetic;
using ops::AttentionArgs;
using ops::AttentionKernel;
using ops::MaskKind;
using ops::MergeArgs;
using ops::PrefillArgs;
using ops::PrefillKernel;
using ops::StripKeys;
using Rows = std::unique_ptr<GuardedRows>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};
constexpr std::array kCaches{DataType::f32, DataType::bf16, DataType::f16, DataType::i8};
constexpr std::array kMasks{MaskKind::none, MaskKind::boolean, MaskKind::additive};

using Keys = DrawnKeys;

// The engines that this host has for a kernel.
std::vector<Engine> engines(const PrefillKernel& kernel) {
  const Isa needed = kernel.arithmetic == Arithmetic::tiles ? Isa::amx_bf16
                     : kernel.arithmetic == Arithmetic::dot ? Isa::avx512_bf16
                                                            : Isa::avx2;
  if (!Target::host().has(needed)) return {Engine::interpreter};
  return tilewright::engines(kernel.attention.lanes);
}

// A tile of two strips. Those of the first see ranges of keys of all kinds: none, all, and drawn
// ones; those of the second all but a few at both ends.
class Problem {
 public:
  static constexpr int kStrips = 2;

  Problem(const PrefillKernel& prefill, const Keys& key_range, unsigned seed,
          GuardedRows::Flush flush)
      : kernel(prefill),
        spec(prefill.attention),
        keys(key_range),
        random_(seed),
        flush_(flush),
        k_(keys, spec.cache, spec.head_dim, flush, random_),
        v_(keys, spec.cache, spec.head_dim, flush, random_) {
    const std::int64_t end = keys.first + keys.count;
    rows = kStrips * ops::strip_rows(spec.lanes);
    q = drawn(rows, spec.head_dim, spec.input);
    output = guarded(rows, spec.head_dim, spec.input);
    mask = guarded(rows, std::max<std::int64_t>(end, 1), mask_type());
    for (std::int64_t row = 0; row < rows; ++row) {
      const bool most = row >= ops::strip_rows(spec.lanes);
      const std::int64_t edge = std::min<std::int64_t>(keys.count, 2);
      const std::int64_t from = row % 5 == 0 ? 0 : below(most ? edge : keys.count);
      const std::int64_t until = row % 7 == 0 ? keys.count
                                 : most       ? std::max(keys.count - below(edge), from)
                                              : from + below(keys.count - from);
      first_keys.push_back(static_cast<std::int32_t>(keys.first + from));
      end_keys.push_back(static_cast<std::int32_t>(keys.first + until));
      slopes.push_back(static_cast<float>(draw()));
      sinks.push_back(static_cast<float>(draw()));
      for (std::int64_t key = 0; key < end; ++key) {
        const bool out = row % 11 == 3 || random_() % 3 == 0;
        const double value = spec.mask == MaskKind::boolean ? (out ? 0 : 1)
                             : out                          ? -kInfinity
                                                            : draw();
        ops::write_scalar(mask_type(), mask->row(row) + key * size_in_bytes(mask_type()), value);
      }
      q_rows_.push_back(q->row(row));
      output_rows_.push_back(output->row(row));
      mask_rows_.push_back(mask->row(row));
    }
    set_strips();
    scratch = std::make_unique<GuardedRows>(1, prefill_scratch_bytes(kernel, kStrips), 0,
                                            GuardedRows::Flush::end);
    scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim));
  }

  // From the rows' ranges.
  void set_strips() {
    strips_.clear();
    for (int strip = 0; strip < kStrips; ++strip) strips_.push_back(keys_of(strip));
  }

  std::vector<std::int64_t> args() {
    std::vector<std::int64_t> list(PrefillArgs::count);
    list[PrefillArgs::q_rows] = address(q_rows_.data());
    list[PrefillArgs::output_rows] = address(output_rows_.data());
    list[PrefillArgs::mask_rows] = address(mask_rows_.data());
    list[PrefillArgs::first_keys] = address(first_keys.data());
    list[PrefillArgs::end_keys] = address(end_keys.data());
    list[PrefillArgs::strips] = address(strips_.data());
    list[PrefillArgs::strip_count] = kStrips;
    list[PrefillArgs::k_blocks] = k_.table();
    list[PrefillArgs::v_blocks] = v_.table();
    list[PrefillArgs::k_token_stride] = k_.stride();
    list[PrefillArgs::v_token_stride] = v_.stride();
    list[PrefillArgs::block_tokens] = keys.block_tokens;
    list[PrefillArgs::scale] = std::bit_cast<std::int32_t>(scale);
    list[PrefillArgs::softcap] = std::bit_cast<std::int32_t>(softcap);
    list[PrefillArgs::slopes] = address(slopes.data());
    list[PrefillArgs::sinks] = address(sinks.data());
    list[PrefillArgs::scratch] = scratch->address();
    return list;
  }

  void run(Engine engine) { run(engine, keys.first, keys.count); }
  void run(Engine engine, std::int64_t first, std::int64_t count) {
    std::vector<std::int64_t> list = args();
    list[PrefillArgs::first_key] = first;
    list[PrefillArgs::key_count] = count;
    list[PrefillArgs::first_chunk] = ops::kChunkKeys - first % ops::kChunkKeys;
    run_kernel(engine, build(kernel), list);
  }

  std::vector<double> row(std::int64_t index) const {
    std::vector<double> list;
    for (int d = 0; d < spec.head_dim; ++d) {
      list.push_back(
          ops::read_scalar(spec.input, output->row(index) + d * size_in_bytes(spec.input)));
    }
    return list;
  }

  // What the other kernel's reference says of a row.
  std::vector<double> expected(std::int64_t index) {
    const auto i = static_cast<std::size_t>(index);
    AttentionKernel one = spec;
    one.group = 1;
    std::vector<char> part(static_cast<std::size_t>(ops::PartLayout(one).bytes));
    std::vector<char> result(static_cast<std::size_t>(spec.head_dim) * 4);
    std::vector<std::int64_t> list(AttentionArgs::count);
    list[AttentionArgs::q] = address(q_rows_[i]);
    list[AttentionArgs::part] = address(part.data());
    list[AttentionArgs::k_blocks] = k_.table();
    list[AttentionArgs::v_blocks] = v_.table();
    list[AttentionArgs::k_token_stride] = k_.stride();
    list[AttentionArgs::v_token_stride] = v_.stride();
    list[AttentionArgs::block_tokens] = keys.block_tokens;
    list[AttentionArgs::first_key] = list[AttentionArgs::origin] = first_keys[i];
    list[AttentionArgs::key_count] = end_keys[i] - first_keys[i];
    list[AttentionArgs::first_chunk] = ops::kChunkKeys;
    list[AttentionArgs::mask] = address(mask_rows_[i]);
    list[AttentionArgs::scale] = std::bit_cast<std::int32_t>(scale);
    list[AttentionArgs::softcap] = std::bit_cast<std::int32_t>(softcap);
    list[AttentionArgs::slopes] = address(&slopes[i]);
    reference(one, list.data());
    std::vector<std::int64_t> merge(MergeArgs::count);
    merge[MergeArgs::parts] = address(part.data());
    merge[MergeArgs::part_count] = 1;
    merge[MergeArgs::output] = address(result.data());
    merge[MergeArgs::sinks] = address(&sinks[i]);
    reference_merge(one, merge.data());
    std::vector<double> values;
    for (int d = 0; d < spec.head_dim; ++d) {
      values.push_back(ops::read_scalar(spec.input, result.data() + d * size_in_bytes(spec.input)));
    }
    return values;
  }

  void swap_rows(std::size_t a, std::size_t b) {
    std::swap(q_rows_[a], q_rows_[b]);
    std::swap(output_rows_[a], output_rows_[b]);
    std::swap(mask_rows_[a], mask_rows_[b]);
    std::swap(first_keys[a], first_keys[b]);
    std::swap(end_keys[a], end_keys[b]);
    std::swap(slopes[a], slopes[b]);
    std::swap(sinks[a], sinks[b]);
  }

  PrefillKernel kernel;
  AttentionKernel spec;
  std::int64_t rows;
  Keys keys;
  Rows q, output, mask, scratch;
  std::vector<std::int32_t> first_keys, end_keys;
  std::vector<float> slopes, sinks;
  float scale, softcap = 1.5f;

 private:
  static std::int64_t address(const void* pointer) { return std::bit_cast<std::int64_t>(pointer); }
  double draw() { return std::normal_distribution<double>()(random_); }
  std::int64_t below(std::int64_t count) {
    return static_cast<std::int64_t>(random_() % static_cast<unsigned>(count + 1));
  }
  DataType mask_type() const {
    return spec.mask == MaskKind::boolean ? DataType::boolean : DataType::f32;
  }

  StripKeys keys_of(int strip) const {
    StripKeys result{0, 0, std::numeric_limits<std::int64_t>::max()};
    const int count = ops::strip_rows(spec.lanes);
    for (int row = strip * count; row < (strip + 1) * count; ++row) {
      const std::int64_t first = first_keys[static_cast<std::size_t>(row)];
      const std::int64_t end = end_keys[static_cast<std::size_t>(row)];
      result.end = std::max(result.end, end);
      result.sure_first = std::max(result.sure_first, first);
      result.sure_end = std::min(result.sure_end, end);
    }
    return result;
  }

  Rows guarded(std::int64_t count, std::int64_t columns, DataType type) {
    return std::make_unique<GuardedRows>(count, columns * size_in_bytes(type),
                                         3 * size_in_bytes(type), flush_);
  }

  Rows drawn(std::int64_t count, std::int64_t columns, DataType type) {
    Rows rows = guarded(count, columns, type);
    for (std::int64_t r = 0; r < count; ++r) fill(*rows, type, r, columns);
    return rows;
  }

  void fill(const GuardedRows& rows, DataType type, std::int64_t row, std::int64_t columns) {
    for (std::int64_t c = 0; c < columns; ++c) {
      ops::write_scalar(type, rows.row(row) + c * size_in_bytes(type), draw());
    }
  }

  std::mt19937 random_;
  GuardedRows::Flush flush_;
  DrawnBlocks k_, v_;
  std::vector<void*> q_rows_, output_rows_, mask_rows_;
  std::vector<StripKeys> strips_;
};

// Scores, and so the logarithms of weights, are below 200 with slopes and below 10 without: their
// rounding errors are what counts. Both sides are rounded to the output. Products of bf16 have
// their weights rounded, to 2^-9, and values are below 5.
double tolerance(const PrefillKernel& kernel, double wanted) {
  const AttentionKernel& spec = kernel.attention;
  const double weights = kernel.is_paired() ? 5 * 0x1p-9 : 0;
  const double unit = spec.input == DataType::bf16  ? 0x1p-7
                      : spec.input == DataType::f16 ? 0x1p-10
                                                    : 0;
  return (spec.slopes ? 1e-4 : 4e-6) + weights + unit * std::abs(wanted);
}

void expect_as_reference(Problem& problem, std::string_view by) {
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    const std::vector<double> wanted = problem.expected(row), got = problem.row(row);
    for (std::size_t d = 0; d < got.size(); ++d) {
      ASSERT_LE(std::abs(got[d] - wanted[d]), tolerance(problem.kernel, wanted[d]))
          << by << ": " << print(problem.kernel) << " first=" << problem.keys.first
          << " count=" << problem.keys.count << " block_tokens=" << problem.keys.block_tokens
          << " row " << row << " element " << d << ": " << got[d] << " for " << wanted[d];
    }
  }
  ASSERT_TRUE(problem.output->intact()) << by << ": wrote between rows";
}

void check(const PrefillKernel& kernel, const Keys& keys, unsigned seed) {
  for (GuardedRows::Flush flush : {GuardedRows::Flush::end, GuardedRows::Flush::start}) {
    Problem problem(kernel, keys, seed, flush);
    for (Engine engine : engines(kernel)) {
      problem.run(engine);
      expect_as_reference(problem, name(engine));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

struct Case {
  const char* name;
  int lanes;
  Arithmetic arithmetic;
};

class PrefillAttention : public ::testing::TestWithParam<Case> {
 protected:
  PrefillKernel kernel(int head_dim) const {
    PrefillKernel spec;
    spec.arithmetic = GetParam().arithmetic;
    spec.attention.lanes = GetParam().lanes;
    spec.attention.head_dim = head_dim;
    if (spec.is_paired()) spec.attention.input = spec.attention.cache = DataType::bf16;
    return spec;
  }
};

TEST_P(PrefillAttention, MatchesTheReferenceForEveryShape) {
  unsigned turn = 0;
  for (int head_dim : {1, 7, 8, 16, 20, 64, 80, 96, 128}) {
    for (std::int64_t count : {0, 1, 3, 8, 13, 70, 150}) {
      PrefillKernel spec = kernel(head_dim);
      spec.attention.mask = kMasks[turn % 3];
      if (!spec.is_paired() && head_dim % 16 == 0) {
        spec.attention.input = kFloats[turn / 3 % 3];
        spec.attention.cache = kCaches[turn / 2 % 4];
      }
      constexpr std::array<std::int64_t, 5> blocks{1, 5, 16, 64, 1000};
      constexpr std::array<std::int64_t, 4> firsts{0, 3, 16, 40};
      if (supported(spec).ok()) check(spec, {firsts[turn / 5 % 4], count, blocks[turn % 5]}, turn);
      if (HasFatalFailure()) return;
      turn += 1 + (turn % 11 == 0 ? 1 : 0);  // out of step with the loops
    }
  }
}

TEST_P(PrefillAttention, MatchesTheReferenceWithSoftcapSlopesAndSinks) {
  for (int which = 1; which < 8; ++which) {
    for (MaskKind mask : kMasks) {
      PrefillKernel spec = kernel(32);
      spec.attention.softcap = (which & 1) != 0;
      spec.attention.slopes = (which & 2) != 0;
      spec.attention.sinks = (which & 4) != 0;
      spec.attention.mask = mask;
      for (DataType cache : {spec.attention.cache, DataType::i8}) {
        spec.attention.cache = cache;
        if (!supported(spec).ok()) continue;
        for (std::int64_t count : {0, 1, 50}) check(spec, {9, count, 16}, 3);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PrefillAttention, BitsDependNeitherOnBlocksNorOnTheOtherRows) {
  PrefillKernel spec = kernel(64);
  spec.attention.mask = MaskKind::additive;
  for (DataType cache : {spec.attention.cache, DataType::i8}) {
    spec.attention.cache = cache;
    if (!supported(spec).ok()) continue;
    std::vector<std::vector<double>> wanted;
    for (std::int64_t block_tokens : {200, 1, 3, 8, 17}) {
      Problem problem(spec, {4, 131, block_tokens}, 6, GuardedRows::Flush::end);
      for (Engine engine : engines(spec)) {
        problem.run(engine);
        for (std::int64_t row = 0; row < problem.rows; ++row) {
          if (static_cast<std::int64_t>(wanted.size()) == row) wanted.push_back(problem.row(row));
          EXPECT_EQ(problem.row(row), wanted[static_cast<std::size_t>(row)]) << block_tokens;
        }
      }
      for (std::size_t row = 0; row + 1 < wanted.size(); row += 2) problem.swap_rows(row, row + 1);
      problem.run(Engine::interpreter);
      for (std::int64_t row = 0; row < problem.rows; ++row) {
        EXPECT_EQ(problem.row(row), wanted[static_cast<std::size_t>(row)]) << "swapped";
      }
    }
  }
}

// A row that sees keys of one chunk only, in a tile that begins there or chunks before.
TEST_P(PrefillAttention, BitsDoNotDependOnWhereATileBegins) {
  const PrefillKernel spec = kernel(64);
  std::vector<std::vector<double>> wanted;
  for (std::int64_t first : {70, 64, 63, 5}) {
    Problem problem(spec, {0, 140, 16}, 6, GuardedRows::Flush::end);
    for (std::size_t row = 0; row < problem.first_keys.size(); ++row) {
      problem.first_keys[row] = row == 0 ? static_cast<std::int32_t>(first) : 70 + row % 3;
      problem.end_keys[row] = 100 + static_cast<std::int32_t>(row % 40);
    }
    problem.set_strips();
    problem.run(Engine::interpreter, first, 140 - first);
    for (std::int64_t row = 1; row < problem.rows; ++row) {
      if (static_cast<std::int64_t>(wanted.size()) < row) wanted.push_back(problem.row(row));
      EXPECT_EQ(problem.row(row), wanted[static_cast<std::size_t>(row - 1)]) << first;
    }
  }
}

TEST_P(PrefillAttention, InnerLoopsDoNotSpill) {
  for (int head_dim : {20, 64, 80, 128, 256}) {
    for (DataType type : kCaches) {
      for (MaskKind mask : kMasks) {
        PrefillKernel spec = kernel(head_dim);
        spec.attention.input = type == DataType::i8 ? DataType::bf16 : type;
        spec.attention.cache = type;
        spec.attention.mask = mask;
        if (!supported(spec).ok()) continue;
        const auto code = jit::emit(build(spec), target_with_lanes(spec.attention.lanes));
        ASSERT_TRUE(code.ok()) << print(spec) << ": " << code.error().message;
        EXPECT_EQ(code->inner_loop_spills, 0) << print(spec) << " " << code->spills;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, PrefillAttention,
                         ::testing::Values(Case{"Fma8", 8, Arithmetic::fma},
                                           Case{"Fma16", 16, Arithmetic::fma},
                                           Case{"Dot", 16, Arithmetic::dot},
                                           Case{"Tiles", 16, Arithmetic::tiles}),
                         [](const auto& test) { return test.param.name; });

TEST(PrefillArithmetic, IsAFixedRuleOfTheTarget) {
  const auto choice = [](std::string_view rung, DataType type, int head_dim) {
    const Target target = Target::for_rung(rung).value();
    AttentionKernel spec;
    spec.lanes = target.lanes();
    spec.head_dim = head_dim;
    spec.input = spec.cache = type;
    return choose_arithmetic(target, spec);
  };
  EXPECT_EQ(choice("avx2", DataType::bf16, 64), Arithmetic::fma);
  EXPECT_EQ(choice("avx512", DataType::bf16, 64), Arithmetic::fma);
  EXPECT_EQ(choice("avx512_bf16", DataType::bf16, 64), Arithmetic::dot);
  EXPECT_EQ(choice("avx512_bf16", DataType::f32, 64), Arithmetic::fma);
  EXPECT_EQ(choice("amx_bf16", DataType::bf16, 64), Arithmetic::tiles);
  EXPECT_EQ(choice("amx_bf16", DataType::bf16, 80), Arithmetic::fma);
  EXPECT_EQ(choice("amx_bf16", DataType::f32, 64), Arithmetic::fma);
}

}  // namespace
}  // namespace tilewright
