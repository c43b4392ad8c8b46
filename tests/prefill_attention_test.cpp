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
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using ops::AttentionArgs;
using ops::AttentionKernel;
using ops::MaskKind;
using ops::MergeArgs;
using ops::PrefillArgs;
using Rows = std::unique_ptr<GuardedRows>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};
constexpr std::array kCaches{DataType::f32, DataType::bf16, DataType::f16, DataType::i8};
constexpr std::array kMasks{MaskKind::none, MaskKind::boolean, MaskKind::additive};

using Keys = DrawnKeys;

// A tile whose rows see ranges of keys of all kinds: none, all, and drawn ones.
class Problem {
 public:
  Problem(const AttentionKernel& kernel, const Keys& key_range, unsigned seed,
          GuardedRows::Flush flush)
      : spec(kernel),
        keys(key_range),
        random_(seed),
        flush_(flush),
        k_(keys, spec.cache, spec.head_dim, flush, random_),
        v_(keys, spec.cache, spec.head_dim, flush, random_) {
    const std::int64_t rows = ops::prefill_rows(spec.lanes), end = keys.first + keys.count;
    q = drawn(rows, spec.head_dim, spec.input);
    output = guarded(rows, spec.head_dim, spec.input);
    mask = guarded(rows, std::max<std::int64_t>(end, 1), mask_type());
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t from = row % 5 == 0 ? 0 : below(keys.count);
      const std::int64_t until = row % 7 == 0 ? keys.count : from + below(keys.count - from);
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
    scratch = std::make_unique<GuardedRows>(1, prefill_scratch_bytes(spec, keys.count), 0,
                                            GuardedRows::Flush::end);
    scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim));
  }

  std::vector<std::int64_t> args() {
    std::vector<std::int64_t> list(PrefillArgs::count);
    list[PrefillArgs::q_rows] = address(q_rows_.data());
    list[PrefillArgs::output_rows] = address(output_rows_.data());
    list[PrefillArgs::mask_rows] = address(mask_rows_.data());
    list[PrefillArgs::first_keys] = address(first_keys.data());
    list[PrefillArgs::end_keys] = address(end_keys.data());
    list[PrefillArgs::k_blocks] = k_.table();
    list[PrefillArgs::v_blocks] = v_.table();
    list[PrefillArgs::k_token_stride] = k_.stride();
    list[PrefillArgs::v_token_stride] = v_.stride();
    list[PrefillArgs::block_tokens] = keys.block_tokens;
    list[PrefillArgs::first_key] = keys.first;
    list[PrefillArgs::key_count] = keys.count;
    list[PrefillArgs::scale] = std::bit_cast<std::int32_t>(scale);
    list[PrefillArgs::softcap] = std::bit_cast<std::int32_t>(softcap);
    list[PrefillArgs::slopes] = address(slopes.data());
    list[PrefillArgs::sinks] = address(sinks.data());
    list[PrefillArgs::scratch] = scratch->address();
    return list;
  }

  void run(Engine engine) { run_kernel(engine, build_prefill(spec), args()); }

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

  AttentionKernel spec;
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
};

// Scores, and so the logarithms of weights, are below 200 with slopes and below 10 without: their
// rounding errors are what counts. Both sides are rounded to the output.
double tolerance(const AttentionKernel& spec, double wanted) {
  const double unit = spec.input == DataType::bf16  ? 0x1p-7
                      : spec.input == DataType::f16 ? 0x1p-10
                                                    : 0;
  return (spec.slopes ? 1e-4 : 4e-6) + unit * std::abs(wanted);
}

void expect_as_reference(Problem& problem, std::string_view by) {
  for (std::int64_t row = 0; row < ops::prefill_rows(problem.spec.lanes); ++row) {
    const std::vector<double> wanted = problem.expected(row), got = problem.row(row);
    for (std::size_t d = 0; d < got.size(); ++d) {
      ASSERT_LE(std::abs(got[d] - wanted[d]), tolerance(problem.spec, wanted[d]))
          << by << ": " << print_prefill(problem.spec) << " first=" << problem.keys.first
          << " count=" << problem.keys.count << " block_tokens=" << problem.keys.block_tokens
          << " row " << row << " element " << d << ": " << got[d] << " for " << wanted[d];
    }
  }
  ASSERT_TRUE(problem.output->intact()) << by << ": wrote between rows";
}

void check(const AttentionKernel& spec, const Keys& keys, unsigned seed) {
  for (GuardedRows::Flush flush : {GuardedRows::Flush::end, GuardedRows::Flush::start}) {
    Problem problem(spec, keys, seed, flush);
    for (Engine engine : engines(spec.lanes)) {
      problem.run(engine);
      expect_as_reference(problem, name(engine));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

class PrefillAttention : public ::testing::TestWithParam<int> {
 protected:
  AttentionKernel kernel(int head_dim) const {
    AttentionKernel spec;
    spec.lanes = GetParam();
    spec.head_dim = head_dim;
    return spec;
  }
};

TEST_P(PrefillAttention, MatchesTheReferenceForEveryShape) {
  unsigned turn = 0;
  for (int head_dim : {1, 7, 8, 16, 20, 64, 80, 128}) {
    for (std::int64_t count : {0, 1, 3, 8, 13, 70}) {
      AttentionKernel spec = kernel(head_dim);
      spec.mask = kMasks[turn % 3];
      if (head_dim % 16 == 0) {
        spec.input = kFloats[turn / 3 % 3];
        spec.cache = kCaches[turn / 2 % 4];
      }
      constexpr std::array<std::int64_t, 5> blocks{1, 5, 16, 64, 1000};
      constexpr std::array<std::int64_t, 4> firsts{0, 3, 16, 40};
      check(spec, {firsts[turn / 5 % 4], count, blocks[turn % 5]}, turn);
      if (HasFatalFailure()) return;
      turn += 1 + (turn % 11 == 0 ? 1 : 0);  // out of step with the loops
    }
  }
}

TEST_P(PrefillAttention, MatchesTheReferenceWithSoftcapSlopesAndSinks) {
  for (int which = 1; which < 8; ++which) {
    for (MaskKind mask : kMasks) {
      AttentionKernel spec = kernel(32);
      spec.softcap = (which & 1) != 0;
      spec.slopes = (which & 2) != 0;
      spec.sinks = (which & 4) != 0;
      spec.mask = mask;
      for (DataType cache : {DataType::f32, DataType::i8}) {
        spec.cache = cache;
        for (std::int64_t count : {0, 1, 50}) check(spec, {9, count, 16}, 3);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PrefillAttention, BitsDependNeitherOnBlocksNorOnTheOtherRows) {
  AttentionKernel spec = kernel(64);
  spec.mask = MaskKind::additive;
  const std::int64_t rows = ops::prefill_rows(spec.lanes);
  for (DataType cache : {DataType::f32, DataType::i8}) {
    spec.cache = cache;
    std::vector<std::vector<double>> wanted;
    for (std::int64_t block_tokens : {100, 1, 3, 8, 17}) {
      Problem problem(spec, {4, 61, block_tokens}, 6, GuardedRows::Flush::end);
      for (Engine engine : engines(spec.lanes)) {
        problem.run(engine);
        for (std::int64_t row = 0; row < rows; ++row) {
          if (static_cast<std::int64_t>(wanted.size()) == row) wanted.push_back(problem.row(row));
          EXPECT_EQ(problem.row(row), wanted[static_cast<std::size_t>(row)]) << block_tokens;
        }
      }
      for (std::size_t row = 0; row + 1 < wanted.size(); row += 2) problem.swap_rows(row, row + 1);
      problem.run(Engine::interpreter);
      for (std::int64_t row = 0; row < rows; ++row) {
        EXPECT_EQ(problem.row(row), wanted[static_cast<std::size_t>(row)]) << "swapped";
      }
    }
  }
}

TEST_P(PrefillAttention, InnerLoopsDoNotSpill) {
  for (int head_dim : {20, 64, 80, 128, 256}) {
    for (DataType type : kCaches) {
      for (MaskKind mask : kMasks) {
        AttentionKernel spec = kernel(head_dim);
        spec.input = type == DataType::i8 ? DataType::bf16 : type;
        spec.cache = type;
        spec.mask = mask;
        if (!supported(spec).ok()) continue;
        const auto code = jit::emit(build_prefill(spec), target_with_lanes(spec.lanes));
        ASSERT_TRUE(code.ok()) << print_prefill(spec) << ": " << code.error().message;
        EXPECT_EQ(code->inner_loop_spills, 0) << print_prefill(spec) << " " << code->spills;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lanes, PrefillAttention, ::testing::Values(8, 16),
                         [](const auto& test) { return std::to_string(test.param); });

}  // namespace
}  // namespace tilewright
