// The attention kernel and the one that merges its parts against error bounds from double, over
// block tables of one block and many, in guarded memory. Keys that take no part are NaN (of i8
// their scales), so that touching one shows.
#include "ops/attention/attention_kernel.h"

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
using ops::PartLayout;
using Random = std::mt19937;
using Rows = std::unique_ptr<GuardedRows>;

constexpr double kUnit = 0x1p-24;  // rounding error of fp32, relative
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Keys : DrawnKeys {
  Keys(std::int64_t first, std::int64_t count, std::int64_t block_tokens,
       std::int64_t part_keys = ops::kPartKeys)
      : DrawnKeys{first, count, block_tokens}, part(part_keys) {}
  std::int64_t part;  // keys of one
};

// How a mask is drawn.
enum class Masking { some, all, none };

Rows guarded(std::int64_t rows, std::int64_t columns, DataType type, GuardedRows::Flush flush) {
  return std::make_unique<GuardedRows>(rows, columns * size_in_bytes(type), 3 * size_in_bytes(type),
                                       flush);
}

double value_at(const GuardedRows& rows, DataType type, std::int64_t row, std::int64_t column) {
  return ops::read_scalar(type, rows.row(row) + column * size_in_bytes(type));
}

class Problem {
 public:
  Problem(AttentionKernel kernel, const Keys& key_range, unsigned seed, GuardedRows::Flush flush,
          Masking masking = Masking::some)
      : spec(kernel),
        keys(key_range),
        random_(seed),
        flush_(flush),
        k_(keys, spec.cache, spec.head_dim, flush, random_),
        v_(keys, spec.cache, spec.head_dim, flush, random_) {
    q = rows_of(spec.group, spec.input);
    output = guarded(spec.group, spec.head_dim, spec.input, flush);
    draw_mask(masking);
    scratch = std::make_unique<GuardedRows>(1, scratch_bytes(spec), 0, GuardedRows::Flush::end);
    parts = std::make_unique<GuardedRows>(std::max<std::int64_t>(part_count(), 1),
                                          PartLayout(spec).bytes * spec.group, 0,
                                          GuardedRows::Flush::end);
    scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim));
    slopes = head_numbers();
    sinks = head_numbers();
  }

  std::int64_t part_count() const { return (keys.count + keys.part - 1) / keys.part; }

  std::vector<std::int64_t> part_args(std::int64_t part) {
    std::vector<std::int64_t> list(AttentionArgs::count);
    list[AttentionArgs::q] = q->address();
    list[AttentionArgs::q_head_stride] = q->stride();
    list[AttentionArgs::part] = parts->address() + part * parts->stride();
    list[AttentionArgs::k_blocks] = k_.table();
    list[AttentionArgs::v_blocks] = v_.table();
    list[AttentionArgs::k_token_stride] = k_.stride();
    list[AttentionArgs::v_token_stride] = v_.stride();
    list[AttentionArgs::block_tokens] = keys.block_tokens;
    list[AttentionArgs::first_key] = keys.first + part * keys.part;
    list[AttentionArgs::key_count] = std::min(keys.part, keys.count - part * keys.part);
    list[AttentionArgs::first_chunk] = part == 0 ? first_chunk : ops::kChunkKeys;
    list[AttentionArgs::next_key] = part % 2 == 0 ? 0 : k_.table();
    list[AttentionArgs::origin] = keys.first;
    list[AttentionArgs::mask] = mask->address();
    list[AttentionArgs::scale] = std::bit_cast<std::int32_t>(scale);
    list[AttentionArgs::softcap] = std::bit_cast<std::int32_t>(softcap);
    list[AttentionArgs::slopes] = slopes->address();
    list[AttentionArgs::scratch] = scratch->address();
    return list;
  }

  std::vector<std::int64_t> merge_args() {
    std::vector<std::int64_t> list(MergeArgs::count);
    list[MergeArgs::parts] = parts->address();
    list[MergeArgs::part_stride] = parts->stride();
    list[MergeArgs::part_count] = part_count();
    list[MergeArgs::output] = output->address();
    list[MergeArgs::output_head_stride] = output->stride();
    list[MergeArgs::sinks] = sinks->address();
    return list;
  }

  void run(Engine engine) {
    const jit::vir::Function kernel = build(spec);
    for (std::int64_t part = 0; part < part_count(); ++part) {
      run_kernel(engine, kernel, part_args(part));
    }
    run_kernel(engine, build_merge(spec), merge_args());
  }

  void run_reference() {
    for (std::int64_t part = 0; part < part_count(); ++part) {
      reference(spec, part_args(part).data());
    }
    reference_merge(spec, merge_args().data());
  }

  std::vector<double> results() const {
    std::vector<double> list;
    for (int head = 0; head < spec.group; ++head) {
      for (int d = 0; d < spec.head_dim; ++d) {
        list.push_back(value_at(*output, spec.input, head, d));
      }
    }
    return list;
  }

  // Element d of the key (0) or value (1) of a token.
  double cached(std::size_t which, std::int64_t key, int d) const {
    return (which == 0 ? k_ : v_).element(key, d);
  }

  // REQUIRES: a cache of i8
  double value_scale(std::int64_t key) const { return v_.scale(key); }
  void set_value_scale(std::int64_t key, double scale_of_key) { v_.set_scale(key, scale_of_key); }

  double head_number(const Rows& numbers, int head) const {
    return value_at(*numbers, DataType::f32, 0, head);
  }

  // What the mask adds to a score.
  double masked(std::int64_t key) const {
    if (spec.mask == MaskKind::additive) return value_at(*mask, DataType::f32, 0, key);
    if (spec.mask == MaskKind::boolean && mask->row(0)[key] == std::byte{0}) return -kInfinity;
    return 0;
  }

  AttentionKernel spec;
  Keys keys;
  Rows q, output, mask, parts, scratch, slopes, sinks;
  float scale;
  float softcap = 1.5f;
  std::int64_t first_chunk = ops::kChunkKeys;

 private:
  double draw() { return std::normal_distribution<double>()(random_); }

  // One f32 per head.
  Rows head_numbers() {
    Rows numbers = std::make_unique<GuardedRows>(1, 4 * spec.group, 0, flush_);
    for (int head = 0; head < spec.group; ++head) {
      ops::write_scalar(DataType::f32, numbers->row(0) + 4 * head, draw());
    }
    return numbers;
  }

  Rows rows_of(std::int64_t count, DataType type) {
    Rows rows = guarded(count, spec.head_dim, type, flush_);
    for (std::int64_t r = 0; r < count; ++r) fill(*rows, type, r);
    return rows;
  }

  void fill(const GuardedRows& rows, DataType type, std::int64_t row) {
    for (int d = 0; d < spec.head_dim; ++d) {
      ops::write_scalar(type, rows.row(row) + d * size_in_bytes(type), draw());
    }
  }

  void draw_mask(Masking masking) {
    const std::int64_t end = keys.first + keys.count;
    const bool additive = spec.mask == MaskKind::additive;
    mask = std::make_unique<GuardedRows>(1, end * (additive ? 4 : 1), 0, flush_);
    for (std::int64_t key = 0; key < end; ++key) {
      const bool out = masking == Masking::all || (masking == Masking::some && random_() % 3 == 0);
      if (additive) {
        ops::write_scalar(DataType::f32, mask->row(0) + 4 * key, out ? -kInfinity : draw());
      } else {
        mask->row(0)[key] = out ? std::byte{0} : static_cast<std::byte>(1 + random_() % 255);
      }
    }
  }

  Random random_;
  GuardedRows::Flush flush_;
  DrawnBlocks k_, v_;
};

// --- bounds

double gamma(double depth) { return depth * kUnit / (1 - depth * kUnit); }

// The exact scores of a head, and how far the kernel's may be from them.
struct Scores {
  std::vector<double> value, error;
  double most = -kInfinity, largest_error = 0;
};

Scores exact_scores(const Problem& p, int head) {
  const double lanes = p.spec.lanes;
  const double depth = std::ceil(p.spec.head_dim / lanes) + std::log2(lanes);
  Scores scores;
  for (std::int64_t key = p.keys.first; key < p.keys.first + p.keys.count; ++key) {
    double sum = 0, magnitude = 0, of_key = 0, most = 0;
    for (int d = 0; d < p.spec.head_dim; ++d) {
      const double q = value_at(*p.q, p.spec.input, head, d), k = p.cached(0, key, d);
      sum += q * k;
      magnitude += std::abs(q * k);
      of_key += std::abs(k);
      most = std::max(most, std::abs(q));
    }
    // Times scale, of i8 a product itself.
    double error = gamma(depth + (p.spec.has_scales() ? 2 : 1)) * magnitude * p.scale;
    // Half a unit of an integer of the query.
    if (p.spec.integers) error += most / 32639 / 2 * of_key * p.scale;
    double value = sum * p.scale;
    if (p.spec.softcap) {  // tanh contracts; 4 units for it, one each for the quotient and product
      value = p.softcap * std::tanh(value / p.softcap);
      error += kUnit * (8 * std::abs(value) + std::abs(sum * p.scale));
    }
    if (p.spec.slopes) {
      const double bias = p.head_number(p.slopes, head) * static_cast<double>(key - p.keys.first);
      value += bias;
      error += kUnit * (std::abs(bias) + std::abs(value) + error);
    }
    value += p.masked(key);
    if (p.spec.mask == MaskKind::additive && std::isfinite(value)) {
      error += kUnit * (std::abs(value) + error);
    }
    scores.value.push_back(value);
    scores.error.push_back(error);
    scores.most = std::max(scores.most, value);
    scores.largest_error = std::max(scores.largest_error, error);
  }
  return scores;
}

double output_unit(DataType type) {
  return type == DataType::bf16 ? 0x1p-8 : type == DataType::f16 ? 0x1p-11 : 0;
}

// First-order error propagation; 1 % covers the products of errors. The maximum that the kernel
// subtracts may differ from the exact one: that scales all weights alike and cancels.
void expect_within_bounds(const Problem& p, std::string_view by) {
  const double count = static_cast<double>(p.keys.count), lanes = p.spec.lanes;
  const double sum_depth = std::ceil(count / lanes) + std::log2(lanes);
  for (int head = 0; head < p.spec.group; ++head) {
    const Scores scores = exact_scores(p, head);
    std::vector<double> weights, errors;  // errors relative to the weight
    double most = scores.most, sum = 0, sum_error = 0;
    if (p.spec.sinks) {
      const double sink = p.head_number(p.sinks, head);
      most = std::max(most, sink);
      sum = std::exp(sink - most);
      sum_error = sum * kUnit * (std::abs(sink - most) + 2 * scores.largest_error / kUnit + 3);
    }
    for (std::size_t i = 0; i < scores.value.size(); ++i) {
      const double x = scores.value[i] == -kInfinity ? -kInfinity : scores.value[i] - most;
      weights.push_back(std::exp(x));
      const double reach = std::isfinite(x) ? std::abs(x) + 2 * scores.largest_error : 0;
      errors.push_back(scores.error[i] + kUnit * reach + (p.spec.has_scales() ? 3 : 2) * kUnit);
      sum += weights[i];
      sum_error += weights[i] * errors[i];
    }
    // Half a unit of an integer weight.
    const auto key = [&](std::size_t i) { return p.keys.first + static_cast<std::int64_t>(i); };
    double half_unit = 0;
    for (std::size_t i = 0; p.spec.integers && i < weights.size(); ++i) {
      half_unit = std::max(half_unit, weights[i] * p.value_scale(key(i)) / 65535 / 2);
    }
    for (int d = 0; d < p.spec.head_dim; ++d) {
      double wanted = 0, magnitude = 0, error = 0;
      for (std::size_t i = 0; i < weights.size(); ++i) {
        const double v = p.cached(1, key(i), d);
        if (half_unit > 0 && v != 0) error += half_unit * std::abs(v) / p.value_scale(key(i));
        wanted += weights[i] * v;
        magnitude += weights[i] * std::abs(v);
        const double rounding = p.spec.dots ? output_unit(DataType::bf16) : 0;
        error += weights[i] * std::abs(v) * (errors[i] + rounding);
      }
      if (sum > 0) {
        wanted /= sum;
        error = (error + gamma(count) * magnitude) / sum +
                std::abs(wanted) * (sum_error / sum + gamma(sum_depth) + kUnit);
      }
      error = 1.01 * error + output_unit(p.spec.input) * (std::abs(wanted) + error);
      if (p.spec.input == DataType::f16) error += 0x1p-25;
      const double got = value_at(*p.output, p.spec.input, head, d);
      ASSERT_LE(std::abs(got - wanted), error + (sum > 0 ? 1e-37 : 0))
          << by << ": " << print(p.spec) << " first=" << p.keys.first << " count=" << p.keys.count
          << " block_tokens=" << p.keys.block_tokens << " head " << head << " element " << d << ": "
          << got << " for " << wanted;
    }
  }
  ASSERT_TRUE(p.output->intact()) << by << ": " << print(p.spec) << " wrote between heads";
}

std::vector<Engine> engines(const AttentionKernel& spec) {
  const Target& host = Target::host();
  const bool runs =
      (!spec.dots || host.has(Isa::avx512_bf16)) && (!spec.integers || host.has(Isa::avx512_vnni));
  if (!runs) return {Engine::interpreter};
  return tilewright::engines(spec.lanes);
}

void check(const AttentionKernel& spec, const Keys& keys, unsigned seed,
           Masking masking = Masking::some) {
  ASSERT_TRUE(supported(spec).ok()) << print(spec) << ": " << supported(spec).error().message;
  for (GuardedRows::Flush flush : {GuardedRows::Flush::end, GuardedRows::Flush::start}) {
    Problem problem(spec, keys, seed, flush, masking);
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      expect_within_bounds(problem, name(engine));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

// --- cases

constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};
constexpr std::array kCaches{DataType::f32, DataType::bf16, DataType::f16, DataType::i8};
constexpr std::array kMasks{MaskKind::none, MaskKind::boolean, MaskKind::additive};

class Attention : public ::testing::TestWithParam<int> {
 protected:
  AttentionKernel kernel(int group, int head_dim) const {
    AttentionKernel spec;
    spec.lanes = GetParam();
    spec.group = group;
    spec.head_dim = head_dim;
    return spec;
  }
};

TEST_P(Attention, MatchesTheBoundsForEveryShape) {
  unsigned turn = 0;
  for (int group : {1, 2, 3, 4, 5, 7, 8}) {
    for (int head_dim : {1, 7, 8, 16, 20, 64, 80, 128}) {
      for (std::int64_t count : {0, 1, 7, 8, 9, 16, 17, 33, 70}) {
        AttentionKernel spec = kernel(group, head_dim);
        spec.mask = kMasks[turn % 3];
        if (head_dim % 16 == 0) {
          spec.input = kFloats[turn / 3 % 3];
          spec.cache = kCaches[turn / 9 % 4];
        }
        constexpr std::array<std::int64_t, 5> blocks{1, 5, 16, 32, 1000};
        constexpr std::array<std::int64_t, 4> firsts{0, 3, 16, 40};
        constexpr std::array<std::int64_t, 3> parts{ops::kPartKeys, 20, 5};
        check(spec, {firsts[turn / 5 % 4], count, blocks[turn % 5], parts[turn / 7 % 3]}, turn);
        if (HasFatalFailure()) return;
        turn += 1 + (turn % 11 == 0 ? 1 : 0);  // out of step with the loops
      }
    }
  }
}

// Where pairs of vectors end, one vector or a part of one may follow.
TEST_P(Attention, MatchesTheBoundsWhereBf16ComesInPairs) {
  unsigned turn = 0;
  for (int head_dim : {16, 24, 32, 40, 48, 72, 80, 100}) {
    for (std::int64_t count : {1, 9, 70}) {
      AttentionKernel spec = kernel(3, head_dim);
      spec.input = spec.cache = DataType::bf16;
      for (bool dots : {false, true}) {
        spec.dots = dots;
        if (supported(spec).ok()) check(spec, {3, count, 16, 20}, turn++);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(Attention, MatchesTheBoundsInIntegers) {
  unsigned turn = 0;
  for (int head_dim : {64, 128, 192, 512}) {
    for (int group : {1, 2, 3, 4, 7}) {
      for (std::int64_t count : {0, 1, 6, 16, 37, 70}) {
        AttentionKernel spec = kernel(group, head_dim);
        spec.input = turn % 2 == 0 ? DataType::bf16 : DataType::f16;
        spec.cache = DataType::i8;
        spec.integers = true;
        spec.mask = kMasks[turn % 3];
        spec.slopes = turn % 5 == 0;
        constexpr std::array<std::int64_t, 5> blocks{1, 5, 16, 64, 1000};
        if (!supported(spec).ok()) continue;
        check(spec, {turn % 7, count, blocks[turn % 5], turn % 4 == 0 ? 20 : 256}, turn);
        if (HasFatalFailure()) return;
        ++turn;
      }
    }
  }
  EXPECT_EQ(turn > 0, GetParam() == 16);
}

// Integers have no NaN: units carry it.
TEST_P(Attention, WhatIsNotFiniteGivesNaNInIntegers) {
  AttentionKernel spec = kernel(2, 64);
  spec.input = DataType::bf16;
  spec.cache = DataType::i8;
  spec.integers = true;
  if (!supported(spec).ok()) return;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  for (Engine engine : engines(spec)) {
    for (double number : {nan, kInfinity, -kInfinity}) {
      Problem problem(spec, {0, 70, 16}, 3, GuardedRows::Flush::end);
      ops::write_scalar(spec.input, problem.q->row(1) + 2 * 17, number);  // of the second head
      problem.run(engine);
      const std::vector<double> results = problem.results();
      EXPECT_TRUE(std::ranges::all_of(results.begin(), results.begin() + 64,
                                      [](double x) { return std::isfinite(x); }));
      EXPECT_TRUE(std::ranges::all_of(results.begin() + 64, results.end(),
                                      [](double x) { return std::isnan(x); }));
    }
    for (double scale : {nan, kInfinity}) {
      Problem problem(spec, {0, 70, 16}, 3, GuardedRows::Flush::end);
      problem.set_value_scale(41, scale);
      problem.run(engine);
      EXPECT_TRUE(std::ranges::all_of(problem.results(), [](double x) { return std::isnan(x); }));
    }
  }
}

// A window's first chunk can be short, so that the others are those of the whole sequence.
TEST_P(Attention, TheFirstChunkCanBeShort) {
  for (DataType cache : kCaches) {
    for (std::int64_t first_chunk : {1, 16, 23, 63}) {
      AttentionKernel spec = kernel(3, 64);
      spec.cache = cache;
      spec.slopes = true;
      Problem problem(spec, {9, 150, 16}, 5, GuardedRows::Flush::end);
      problem.first_chunk = first_chunk;
      for (Engine engine : engines(spec)) {
        problem.run(engine);
        expect_within_bounds(problem, name(engine));
      }
    }
  }
}

TEST_P(Attention, MatchesTheBoundsForEveryTypeAndMask) {
  for (DataType input : kFloats) {
    for (DataType cache : kCaches) {
      for (MaskKind mask : kMasks) {
        AttentionKernel spec = kernel(3, 64);
        spec.input = input;
        spec.cache = cache;
        spec.mask = mask;
        for (std::int64_t count : {5, 50}) check(spec, {9, count, 16}, 3);
      }
    }
  }
}

TEST_P(Attention, MatchesTheBoundsWithSoftcapSlopesAndSinks) {
  for (int which = 1; which < 8; ++which) {
    for (MaskKind mask : kMasks) {
      AttentionKernel spec = kernel(which == 2 ? 1 : 3, 64);
      spec.softcap = (which & 1) != 0;
      spec.slopes = (which & 2) != 0;
      spec.sinks = (which & 4) != 0;
      spec.mask = mask;
      for (DataType cache : {DataType::f32, DataType::i8}) {
        spec.cache = cache;
        for (std::int64_t count : {0, 1, 16, 50}) check(spec, {9, count, 16, 20}, 3);
      }
    }
  }
}

TEST_P(Attention, AllKeysMaskedWritesZeros) {
  for (MaskKind mask : {MaskKind::boolean, MaskKind::additive}) {
    AttentionKernel spec = kernel(2, 24);
    spec.mask = mask;
    if (spec.head_dim % spec.lanes != 0) spec.head_dim = 32;
    Problem problem(spec, {2, 21, 4}, 1, GuardedRows::Flush::end, Masking::all);
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      for (double value : problem.results()) EXPECT_EQ(value, 0) << name(engine);
    }
    check(spec, {0, 9, 4}, 5, Masking::none);
    check(spec, {0, 30, 4, 3}, 5);  // some parts have no key, others do
  }
}

TEST_P(Attention, ReferenceAgrees) {
  for (MaskKind mask : kMasks) {
    AttentionKernel spec = kernel(3, 20);
    spec.mask = mask;
    spec.softcap = spec.slopes = spec.sinks = mask == MaskKind::additive;
    spec.cache = mask == MaskKind::boolean ? DataType::i8 : DataType::f32;
    for (std::int64_t count : {0, 1, 30}) {
      Problem problem(spec, {3, count, 8}, 2, GuardedRows::Flush::end);
      problem.run_reference();
      expect_within_bounds(problem, "reference");
    }
  }
}

// How the keys are cut into blocks must not show in the result.
TEST_P(Attention, BitsDoNotDependOnBlocks) {
  AttentionKernel eight_bits = kernel(3, 64), integers = kernel(3, 64), by_dots = kernel(3, 80);
  eight_bits.cache = DataType::i8;
  by_dots.input = by_dots.cache = DataType::bf16;
  by_dots.dots = true;
  integers.input = DataType::bf16;
  integers.cache = DataType::i8;
  integers.integers = true;
  for (AttentionKernel spec : {kernel(3, 64), eight_bits, integers, by_dots}) {
    if (!supported(spec).ok()) continue;
    spec.mask = MaskKind::additive;
    std::vector<double> wanted;
    for (std::int64_t block_tokens : {100, 1, 3, 8, 16, 17}) {
      Problem problem(spec, {4, 61, block_tokens}, 6, GuardedRows::Flush::end);
      for (Engine engine : engines(spec)) {
        problem.run(engine);
        if (wanted.empty()) wanted = problem.results();
        EXPECT_EQ(problem.results(), wanted) << name(engine) << " block_tokens=" << block_tokens;
      }
    }
  }
}

// How keys are asked for changes the code, and no bit of what it computes.
TEST_P(Attention, BitsDoNotDependOnPrefetches) {
  const AttentionKernel usual = kernel(3, 64);
  AttentionKernel far = usual, sparse = usual;
  far.prefetch_level = 1;
  sparse.prefetch_only_jumps = true;
  const Target target = target_with_lanes(usual.lanes);
  for (const AttentionKernel& spec : {far, sparse}) {
    EXPECT_NE(jit::emit(build(spec), target)->bytes, jit::emit(build(usual), target)->bytes);
    Problem problem(usual, {4, 61, 16}, 6, GuardedRows::Flush::end);
    Problem other(spec, {4, 61, 16}, 6, GuardedRows::Flush::end);
    for (Engine engine : engines(usual)) {
      problem.run(engine);
      other.run(engine);
      EXPECT_EQ(other.results(), problem.results()) << name(engine);
    }
  }
}

TEST_P(Attention, LargeScoresDoNotOverflow) {
  const AttentionKernel spec = kernel(1, 16);
  Problem problem(spec, {0, 20, 8}, 8, GuardedRows::Flush::end);
  problem.scale = 1e4f;
  for (Engine engine : engines(spec)) {
    problem.run(engine);
    expect_within_bounds(problem, name(engine));
  }
}

TEST_P(Attention, InnerLoopsDoNotSpill) {
  for (int group : {1, 2, 3, 4, 5, 6, 7, 8, 16}) {
    for (int head_dim : {20, 64, 80, 96, 128, 256}) {
      for (DataType type : kCaches) {
        for (MaskKind mask : kMasks) {
          AttentionKernel spec = kernel(group, head_dim);
          spec.input = type == DataType::i8 ? DataType::bf16 : type;
          spec.cache = type;
          spec.mask = mask;
          for (bool fast : {false, true}) {
            spec.dots = fast && type != DataType::i8;
            spec.integers = fast && type == DataType::i8;
            if (!supported(spec).ok()) continue;
            for (const auto& kernel : {build(spec), build_merge(spec)}) {
              const auto code = jit::emit(kernel, target_with_lanes(spec.lanes));
              ASSERT_TRUE(code.ok()) << print(spec) << ": " << code.error().message;
              EXPECT_EQ(code->inner_loop_spills, 0)
                  << kernel.name << " of " << print(spec) << " spills " << code->spills;
            }
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lanes, Attention, ::testing::Values(8, 16),
                         [](const auto& test) { return std::to_string(test.param); });

TEST(AttentionSupported, SaysWhyNot) {
  AttentionKernel spec;
  EXPECT_TRUE(supported(spec).ok());
  spec.head_dim = 20;
  EXPECT_TRUE(supported(spec).ok());
  spec.cache = DataType::bf16;
  EXPECT_EQ(supported(spec).error().message, "head_dim 20 in bf16 is not a multiple of 8 lanes");
  spec.lanes = 16;
  EXPECT_TRUE(supported(spec).ok());
  spec.cache = DataType::i8;
  EXPECT_TRUE(supported(spec).ok());
  spec.input = DataType::i8;
  EXPECT_EQ(supported(spec).error().message, "attention in i8");
  spec.cache = spec.input = DataType::i16;
  EXPECT_EQ(supported(spec).error().message, "attention in i16");
  spec.cache = spec.input = DataType::bf16;
  spec.dots = true;
  EXPECT_TRUE(supported(spec).ok());
  spec.cache = DataType::f16;
  EXPECT_EQ(supported(spec).error().message,
            "products by vdpbf16ps of other than bf16 with AVX-512");
  spec.dots = false;
  spec.cache = DataType::i8;
  spec.integers = true;
  spec.head_dim = 64;
  EXPECT_TRUE(supported(spec).ok());
  spec.head_dim = 80;
  EXPECT_EQ(supported(spec).error().message,
            "products by vpdpbusd of other than 16 bits with i8, in whole vectors of AVX-512");
  spec.integers = false;
  spec.prefetch_level = 2;
  EXPECT_EQ(supported(spec).error().message, "keys asked for into level 2");
}

TEST(AttentionPrint, TellsEveryFieldApart) {
  AttentionKernel spec;
  spec.group = 3;
  spec.mask = MaskKind::boolean;
  EXPECT_EQ(print(spec), "attention lanes=8 group=3 head_dim=64 input=f32 cache=f32 mask=boolean");
  spec.prefetch_level = 1;
  EXPECT_EQ(print(spec),
            "attention lanes=8 group=3 head_dim=64 input=f32 cache=f32 mask=boolean "
            "prefetch_level=1");
  spec.dots = spec.integers = spec.prefetch_only_jumps = true;
  EXPECT_EQ(print(spec),
            "attention lanes=8 group=3 head_dim=64 input=f32 cache=f32 mask=boolean dots "
            "integers prefetch_level=1 prefetch_only_jumps");
}

}  // namespace
}  // namespace tilewright
