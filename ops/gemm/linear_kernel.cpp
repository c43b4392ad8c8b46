// What is common to the linear kernels of vectors (vector_kernel.cpp) and of tiles
// (tile_kernel.cpp): their names, sizes, and which there are.
//
// Tested by linear_test.
#include "ops/gemm/linear_kernel.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "ops/gemm/tile_kernel.h"
#include "ops/gemm/vector_kernel.h"

namespace tilewright::ops {
namespace {

using graph::DataType;

constexpr std::int64_t kMostPrefetch = 1 << 20;

bool one_of(DataType type) {
  return type == DataType::f32 || type == DataType::bf16 || type == DataType::f16;
}

}  // namespace

DataType input_type(const LinearKernel& spec) {
  const bool fp32 =
      spec.arithmetic == Arithmetic::fma || spec.arithmetic == Arithmetic::split_tiles;
  return fp32 ? DataType::f32 : DataType::bf16;
}

bool is_tiled(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::tiles || arithmetic == Arithmetic::split_tiles;
}

int piece_bytes(int lanes) { return lanes * 4; }

int max_rows(int lanes) { return lanes == 16 ? 12 : 6; }

bool reads_several_panels(const LinearKernel& spec) {
  const bool has_registers = !spec.twelve_bits || spec.lanes == 16;
  return !is_tiled(spec.arithmetic) && spec.rows <= most_rows_in_streams(spec.lanes) &&
         !spec.many_blocks && has_registers;
}

std::int64_t partial_sums_bytes(std::int64_t rows) {
  const std::int64_t in_streams = kMostStreams * most_rows_in_streams(16);
  return std::max(rows, in_streams) * kPartialSumsBytesPerRow;
}

std::int64_t unpacked_bytes() { return partial_sum_length() * panel_columns() * 4; }

std::int64_t panel_count(std::int64_t n) { return (n + panel_columns() - 1) / panel_columns(); }

std::string_view name(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::fma:
      return "linear";
    case Arithmetic::dot:
      return "linear_avx512_bf16";
    case Arithmetic::tiles:
      return "linear_amx_bf16";
    case Arithmetic::split_tiles:
      return "linear_amx_fp32";
  }
  return "";
}

std::string print(const LinearKernel& spec) {
  std::string text = fmt::format("{} lanes={} rows={} n={} k={} weight={} output={}",
                                 name(spec.arithmetic), spec.lanes, spec.rows, spec.n, spec.k,
                                 graph::name(spec.weight), graph::name(spec.output));
  const Epilogue& epilogue = spec.epilogue;
  if (epilogue.bias) text += " bias";
  if (!epilogue.activation.empty()) text += " activation=" + epilogue.activation;
  if (epilogue.gated) text += " gated";
  if (epilogue.residual) text += " residual";
  if (spec.twelve_bits) text += " twelve_bits";
  text += spec.many_blocks ? " many_blocks" : fmt::format(" prefetch={}", spec.prefetch);
  if (!spec.many_blocks && spec.prefetch_near > 0) {
    text += fmt::format(" near={}", spec.prefetch_near);
  }
  if (spec.streams > 1) text += fmt::format(" streams={}", spec.streams);
  if (spec.rest > 0) text += fmt::format(" rest={}", spec.rest);
  return text;
}

std::string function_name(const LinearKernel& spec) {
  std::string text = print(spec);
  std::replace(text.begin(), text.end(), ' ', '.');
  return text;
}

Status supported(const LinearKernel& spec) {
  if (spec.lanes != 8 && spec.lanes != 16) return Error{fmt::format("{} lanes", spec.lanes)};
  const bool tiled = is_tiled(spec.arithmetic);
  if (tiled ? spec.rows != kTileRows && spec.rows != 2 * kTileRows
            : spec.rows < 1 || spec.rows > max_rows(spec.lanes)) {
    return Error{fmt::format("a block of {} rows", spec.rows)};
  }
  if (spec.rest < 0 || spec.rest >= spec.rows ||
      (spec.rest > 0 && (tiled || spec.many_blocks || spec.streams > 1))) {
    return Error{fmt::format("a block of {} rows behind others", spec.rest)};
  }
  if (spec.n < 1 || spec.k < 1) return Error{"an empty weight"};
  for (std::int64_t ahead : {spec.prefetch, spec.prefetch_near}) {
    if (ahead < 0 || ahead > kMostPrefetch) {
      return Error{fmt::format("weights asked for {} bytes ahead", ahead)};
    }
  }
  if (spec.streams != 1 && !(spec.streams == kMostStreams && reads_several_panels(spec))) {
    return Error{fmt::format("{} panels side by side", spec.streams)};
  }
  for (DataType type : {spec.weight, spec.output}) {
    if (!one_of(type)) return Error{fmt::format("linear in {}", graph::name(type))};
  }
  if (spec.twelve_bits && spec.weight != DataType::bf16) return Error{"12 bits of another type"};
  if (spec.arithmetic != Arithmetic::fma && spec.lanes != 16) {
    return Error{"products of bf16 without AVX-512"};
  }
  if (input_type(spec) == DataType::bf16 && spec.weight != DataType::bf16) {
    return Error{"products of bf16 x and another weight"};
  }
  const std::string& activation = spec.epilogue.activation;
  const std::array known{"", "silu", "gelu", "gelu_tanh", "relu"};
  if (std::find(known.begin(), known.end(), activation) == known.end()) {
    return Error{fmt::format("activation '{}'", activation)};
  }
  if (spec.epilogue.gated && spec.n % 2 != 0) return Error{"a gated weight with an odd n"};
  return {};
}

jit::vir::Function build(const LinearKernel& spec) {
  return is_tiled(spec.arithmetic) ? build_tiled(spec) : build_vectors(spec);
}

}  // namespace tilewright::ops
