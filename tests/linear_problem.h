// A linear problem in guarded memory, run by any kernel, and its bounds from unpacked weights in
// double. Internal to linear_test and tile_kernel_test.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "guarded_rows.h"
#include "kernel_run.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/pack.h"
#include "ops/gemm/tile_kernel.h"
#include "ops/gemm/twelve_bits.h"
#include "ops/scalar_type.h"

namespace tilewright {

using graph::DataType;
using ops::Arithmetic;
using ops::LinearArgs;
using ops::LinearKernel;
using Random = std::mt19937;
using Rows = std::unique_ptr<GuardedRows>;

inline constexpr double kUnit = 0x1p-24;  // rounding error of fp32, relative

inline double bytes_of(DataType type) { return size_in_bytes(type); }

// How values are drawn.
enum class Fill { normal, integers };

inline double draw(Fill fill, Random& random) {
  if (fill == Fill::integers) return static_cast<double>(static_cast<int>(random() % 7) - 3);
  return std::normal_distribution<double>()(random);
}

inline Rows guarded(std::int64_t rows, std::int64_t columns, DataType type,
                    GuardedRows::Flush flush) {
  return std::make_unique<GuardedRows>(rows, columns * size_in_bytes(type), 3 * bytes_of(type),
                                       flush);
}

inline double value_at(const GuardedRows& rows, DataType type, std::int64_t row,
                       std::int64_t column) {
  return ops::read_scalar(type, rows.row(row) + column * size_in_bytes(type));
}

inline void fill_rows(const GuardedRows& rows, DataType type, std::int64_t count,
                      std::int64_t columns, Fill fill, Random& random) {
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      ops::write_scalar(type, rows.row(r) + c * size_in_bytes(type), draw(fill, random));
    }
  }
}

// The engines that this host has for a kernel.
inline std::vector<Engine> engines(const LinearKernel& spec) {
  const Isa needed = is_tiled(spec.arithmetic)            ? Isa::amx_bf16
                     : spec.arithmetic == Arithmetic::dot ? Isa::avx512_bf16
                                                          : Isa::avx2;
  if (!Target::host().has(needed)) return {Engine::interpreter};
  return tilewright::engines(spec.lanes);
}

// One problem: operands of M = blocks * rows + rest rows in guarded memory. The last block of tiles
// is not full.
struct Problem {
  Problem(LinearKernel kernel, std::int64_t block_count, Fill fill, unsigned seed,
          GuardedRows::Flush flush, const std::function<void(Problem&)>& change = {})
      : spec(std::move(kernel)),
        blocks(block_count),
        m(block_count * spec.rows + spec.rest -
          (is_tiled(spec.arithmetic) && block_count > 0 ? 5 : 0)) {
    Random random(seed);
    w = guarded(spec.n, spec.k, spec.weight, flush);
    x_type = input_type(spec);
    const bool padded = x_type == DataType::bf16 && spec.k % 2 != 0;
    x = guarded(m, spec.k + (padded ? 1 : 0), x_type, flush);
    for (std::int64_t row = 0; padded && row < m; ++row) {
      ops::write_scalar(x_type, x->row(row) + 2 * spec.k, 0);
    }
    y = guarded(m, outputs(), spec.output, flush);
    fill_rows(*w, spec.weight, spec.n, spec.k, fill, random);
    fill_rows(*x, x_type, m, spec.k, fill, random);
    bias = guarded(1, spec.n, spec.output, flush);
    residual = guarded(m, outputs(), spec.output, flush);
    fill_rows(*bias, spec.output, 1, spec.n, fill, random);
    fill_rows(*residual, spec.output, m, outputs(), fill, random);
    partial_sums = guarded(1, ops::partial_sums_bytes(blocks * spec.rows + spec.rest) / 4,
                           DataType::f32, GuardedRows::Flush::end);
    if (spec.twelve_bits && fill == Fill::normal) scatter_outsiders();
    if (change) change(*this);
    std::vector<ops::WeightBlock> stacked{{w->row(0), spec.n, w->stride()}};
    if (spec.epilogue.gated) {
      stacked = {{w->row(0), spec.n / 2, w->stride()},
                 {w->row(spec.n / 2), spec.n / 2, w->stride()}};
    }
    const std::int64_t size = ops::packed_bytes(spec.n, spec.k, spec.weight);
    std::vector<std::byte> as_values(static_cast<std::size_t>(size));
    ops::pack_panels(stacked, spec.k, spec.weight, spec.weight, spec.epilogue.gated, 0,
                     ops::panel_count(spec.n), as_values.data());
    packed =
        spec.twelve_bits ? in_twelve_bits(as_values, flush) : guarded(1, size, DataType::u8, flush);
    if (!spec.twelve_bits) std::copy(as_values.begin(), as_values.end(), packed->row(0));
    const bool tiled = is_tiled(spec.arithmetic);
    unpacked = guarded(1, tiled ? tile_scratch_bytes(spec) : ops::unpacked_bytes(), DataType::u8,
                       GuardedRows::Flush::end);
    if (tiled) pack_tiles();
  }

  // x as the tiled kernel reads it.
  void pack_tiles() {
    const ops::TilePack pack{spec.arithmetic, spec.rows, spec.k};
    tile_x = guarded(1, std::max<std::int64_t>(blocks, 1) * block_bytes(pack), DataType::u8,
                     GuardedRows::Flush::end);
    tile_state = guarded(1, ops::kTileStateBytes, DataType::u8, GuardedRows::Flush::end);
    magnitudes = guarded(1, blocks * spec.rows * ops::kMagnitudeBytes, DataType::u8,
                         GuardedRows::Flush::end);
    for (std::int64_t block = 0; block < blocks; ++block) {
      std::vector<std::int64_t> list(ops::TilePackArgs::count);
      list[ops::TilePackArgs::x] = x->address() + block * spec.rows * x->stride();
      list[ops::TilePackArgs::x_row_stride] = x->stride();
      list[ops::TilePackArgs::row_count] = std::min<std::int64_t>(spec.rows, m - block * spec.rows);
      list[ops::TilePackArgs::y] = tile_x->address() + block * block_bytes(pack);
      list[ops::TilePackArgs::magnitudes] =
          magnitudes->address() + block * spec.rows * ops::kMagnitudeBytes;
      run_kernel(Engine::interpreter, build(pack), list);
    }
  }

  std::span<const std::uint32_t> magnitude_patterns() const {
    return {reinterpret_cast<const std::uint32_t*>(magnitudes->row(0)),
            static_cast<std::size_t>(m * ops::kMagnitudeBytes / 4)};
  }

  // Exponents that no table has, all different: their steps must stay in 16 bits.
  void scatter_outsiders() const {
    int exponent = -100;
    for (std::int64_t row = 0; row < spec.n; row += 9) {
      for (std::int64_t k = row % 5; k < spec.k; k += 17) {
        ops::write_scalar(spec.weight, w->row(row) + 2 * k, std::ldexp(1.0, exponent));
        exponent = exponent < -20 ? exponent + 2 : -100;
      }
    }
  }

  Rows in_twelve_bits(const std::vector<std::byte>& as_pairs, GuardedRows::Flush flush) const {
    const std::int64_t panels = ops::panel_count(spec.n);
    const auto* pairs = reinterpret_cast<const std::uint16_t*>(as_pairs.data());
    const std::int64_t panel_values = static_cast<std::int64_t>(as_pairs.size()) / 2 / panels;
    ops::twelve_bits::Packer packer(panels, spec.k);
    for (std::int64_t i = 0; i < panels; ++i) packer.inspect(i, pairs + i * panel_values);
    Rows result = guarded(1, packer.place(), DataType::u8, flush);
    std::byte* to = result->row(0);
    for (std::int64_t i = 0; i < panels; ++i) packer.pack(i, pairs + i * panel_values, to);
    return result;
  }

  std::int64_t outputs() const { return spec.epilogue.gated ? spec.n / 2 : spec.n; }

  std::vector<std::int64_t> args() const {
    std::vector<std::int64_t> list(LinearArgs::count);
    list[LinearArgs::x] = x->address();
    list[LinearArgs::x_row_stride] = x->stride();
    list[LinearArgs::x_block_stride] = spec.rows * x->stride();
    list[LinearArgs::x_stretch_stride] = ops::partial_sum_length() * graph::size_in_bytes(x_type);
    list[LinearArgs::weight] = packed->address();
    list[LinearArgs::y] = y->address();
    list[LinearArgs::y_row_stride] = y->stride();
    list[LinearArgs::bias] = bias->address();
    list[LinearArgs::residual] = residual->address();
    list[LinearArgs::residual_row_stride] = residual->stride();
    list[LinearArgs::panel_begin] = 0;
    list[LinearArgs::panel_count] = ops::panel_count(spec.n);
    list[LinearArgs::block_count] = blocks;
    list[LinearArgs::partial_sums] = partial_sums->address();
    list[LinearArgs::unpacked] = unpacked->address();
    if (is_tiled(spec.arithmetic)) {
      list[LinearArgs::x] = tile_x->address();
      list[LinearArgs::row_count] = m;
      list[LinearArgs::tile_state] = tile_state->address();
    }
    return list;
  }

  void run(Engine engine) const { run_kernel(engine, build(spec), args()); }

  std::vector<double> results() const {
    std::vector<double> list;
    for (std::int64_t r = 0; r < m; ++r) {
      for (std::int64_t c = 0; c < outputs(); ++c) {
        list.push_back(value_at(*y, spec.output, r, c));
      }
    }
    return list;
  }

  LinearKernel spec;
  std::int64_t blocks, m;
  DataType x_type;
  Rows w, x, y, bias, residual, partial_sums, packed, unpacked, tile_x, tile_state, magnitudes;
};

// --- bounds

struct Bounded {
  double value = 0, error = 0;
};

inline Bounded rounded(Bounded a, double unit = kUnit) {
  a.error += unit * (std::abs(a.value) + a.error);
  return a;
}

// The sum's bound: one chain of k fused multiply-adds. By tiles also what six products leave out.
inline Bounded product(const Problem& p, std::int64_t row, std::int64_t column) {
  double sum = 0, magnitude = 0;
  for (std::int64_t k = 0; k < p.spec.k; ++k) {
    const double term = value_at(*p.x, p.x_type, row, k) * value_at(*p.w, p.spec.weight, column, k);
    sum += term;
    magnitude += std::abs(term);
  }
  const bool leaves_out =
      p.spec.arithmetic == Arithmetic::split_tiles && p.spec.weight != DataType::bf16;
  const double depth = (static_cast<double>(p.spec.k) + (leaves_out ? 1.01 : 0)) * kUnit;
  Bounded result{sum, depth / (1 - depth) * magnitude};
  if (!p.spec.epilogue.bias) return result;
  result.value += value_at(*p.bias, p.spec.output, 0, column);
  return rounded(result);
}

// The functions' errors are those that jit/math.h states; 1.13 bounds the slope of them all.
inline Bounded activated(const std::string& activation, Bounded a) {
  if (activation.empty()) return a;
  const double x = a.value, ulp = 2 * kUnit;
  if (activation == "relu") return {std::max(x, 0.0), a.error};
  double value = 0, own = 0;
  if (activation == "silu") {
    value = x / (1 + std::exp(-x));
    own = 2 * ulp * std::abs(value);
  } else if (activation == "gelu") {
    value = x / 2 * std::erfc(-x / std::numbers::sqrt2);
    own = 4 * ulp * std::abs(value) + 0x1p-24;
  } else {
    const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
    value = x / 2 * (1 + std::tanh(inner));
    own = 4 * ulp * std::abs(value) + 0x1p-22;
  }
  return {value, 1.13 * a.error + own};
}

inline Bounded expected(const Problem& p, std::int64_t row, std::int64_t column) {
  Bounded y = activated(p.spec.epilogue.activation, product(p, row, column));
  if (p.spec.epilogue.gated) {
    const Bounded up = product(p, row, column + p.spec.n / 2);
    const double error = std::abs(y.value) * up.error + std::abs(up.value) * y.error;
    y = rounded({y.value * up.value, error + y.error * up.error});
  }
  if (p.spec.epilogue.residual) {
    y.value += value_at(*p.residual, p.spec.output, row, column);
    y = rounded(y);
  }
  if (p.spec.output == DataType::bf16) y = rounded(y, 0x1p-8);
  if (p.spec.output == DataType::f16) y = rounded(y, 0x1p-11);
  y.error += p.spec.output == DataType::f16 ? 0x1p-25 : 0x1p-133;
  return y;
}

inline void expect_within_bounds(const Problem& p, std::string_view by) {
  for (std::int64_t row = 0; row < p.m; ++row) {
    for (std::int64_t column = 0; column < p.outputs(); ++column) {
      const Bounded wanted = expected(p, row, column);
      const double got = value_at(*p.y, p.spec.output, row, column);
      ASSERT_LE(std::abs(got - wanted.value), wanted.error)
          << by << ": " << print(p.spec) << " blocks=" << p.blocks << " row " << row << " column "
          << column << ": " << got << " for " << wanted.value;
    }
  }
  ASSERT_TRUE(p.y->intact()) << by << ": " << print(p.spec) << " wrote between rows";
}

// --- cases

inline ops::Epilogue epilogue(bool bias, const std::string& activation, bool gated, bool residual) {
  ops::Epilogue result;
  result.bias = bias;
  result.activation = activation;
  result.gated = gated;
  result.residual = residual;
  return result;
}

inline std::vector<ops::Epilogue> epilogues() {
  return {epilogue(false, "", false, false),    epilogue(true, "", false, false),
          epilogue(false, "", false, true),     epilogue(true, "gelu", false, true),
          epilogue(false, "silu", true, false), epilogue(true, "gelu_tanh", true, false),
          epilogue(true, "silu", true, true),   epilogue(false, "", true, false),
          epilogue(true, "relu", false, false), epilogue(false, "gelu_tanh", false, true),
          epilogue(true, "gelu", true, true)};
}

inline constexpr std::array kFloats{DataType::f32, DataType::bf16, DataType::f16};

struct Case {
  int lanes;
  DataType weight;
  bool twelve_bits = false;
  Arithmetic arithmetic = Arithmetic::fma;
};

inline void check(const LinearKernel& spec, std::int64_t blocks, unsigned seed) {
  ASSERT_TRUE(supported(spec).ok()) << print(spec) << ": " << supported(spec).error().message;
  for (GuardedRows::Flush flush : {GuardedRows::Flush::end, GuardedRows::Flush::start}) {
    const Problem problem(spec, blocks, Fill::normal, seed, flush);
    for (Engine engine : engines(spec)) {
      problem.run(engine);
      expect_within_bounds(problem, name(engine));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

}  // namespace tilewright
