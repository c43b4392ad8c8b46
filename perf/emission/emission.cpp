// How long it takes to make each kind of kernel: its VIR, register allocation and machine code.
//
// Why: a model has some twenty kernels, and a process that finds none in its cache must make them
// before the first token. The goal is at most 0.5 ms for a kernel on vectors, 2 ms for one by AMX.
//
//   emission [ROUNDS]     a table in Markdown; 201 rounds, the kinds in turns, medians
//
// Any CPU can emit for any rung. Tested by ctest, which runs one round.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "jit/emit.h"
#include "ops/attention/prefill_kernel.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/matmul_kernel.h"
#include "ops/gemm/tile_kernel.h"
#include "ops/rope_kernel.h"
#include "ops/row_kernel.h"

namespace tilewright {
namespace {

using jit::vir::Function;

struct Kind {
  std::string name;
  std::function<Function(int lanes)> build;
};

ops::LinearKernel linear(int lanes, int rows) {
  ops::LinearKernel spec;
  spec.lanes = lanes;
  spec.rows = rows;
  spec.n = spec.k = 2048;
  return spec;
}

ops::LinearKernel twelve_bits(int lanes, int rows) {
  ops::LinearKernel spec = linear(lanes, rows);
  spec.weight = spec.output = graph::DataType::bf16;
  spec.twelve_bits = true;
  return spec;
}

ops::AttentionKernel attention(int lanes) {
  ops::AttentionKernel spec;
  spec.lanes = lanes;
  spec.group = 4;
  return spec;
}

ops::RowKernel norm(int lanes) {
  ops::RowKernel spec;
  spec.lanes = lanes;
  spec.columns = 2048;
  spec.inputs = {{}, {}, {}};  // x, what is added to it, the weight
  spec.body = {{graph::Op::add, {0, 1}}, {graph::Op::rms_norm, {3, 2}, 1e-5}};
  spec.outputs = {3, 4};
  spec.output_operands = {{}, {}};
  return spec;
}

ops::LinearKernel tiled(ops::Arithmetic arithmetic, graph::DataType weight) {
  ops::LinearKernel spec = linear(16, 2 * ops::kTileRows);
  spec.arithmetic = arithmetic;
  spec.weight = weight;
  return spec;
}

std::vector<Kind> tile_kinds() {
  using graph::DataType;
  using ops::Arithmetic;
  return {
      {"AMX, bf16", [](int) { return build(tiled(Arithmetic::tiles, DataType::bf16)); }},
      {"AMX, fp32 in three products",
       [](int) { return build(tiled(Arithmetic::split_tiles, DataType::bf16)); }},
      {"AMX, fp32 in three products, weights in 12 bits",
       [](int) {
         ops::LinearKernel spec = tiled(Arithmetic::split_tiles, DataType::bf16);
         spec.twelve_bits = true;
         return build(spec);
       }},
      {"AMX, fp32 in six products",
       [](int) { return build(tiled(Arithmetic::split_tiles, DataType::f32)); }},
      {"AMX, fp32 in six products, with residual, SiLU and gate",
       [](int) {
         ops::LinearKernel spec = tiled(Arithmetic::split_tiles, DataType::f32);
         spec.epilogue = {.residual = true, .activation = "silu", .gated = true};
         return build(spec);
       }},
      {"AMX, x of fp32 in three parts",
       [](int) {
         return build(ops::TilePack{Arithmetic::split_tiles, 2 * ops::kTileRows, 2048});
       }},
  };
}

std::vector<Kind> kinds(std::string_view rung) {
  if (rung == "amx_bf16") return tile_kinds();
  return {
      {"linear, one row", [](int lanes) { return build(linear(lanes, 1)); }},
      {"linear, a block of the most rows",
       [](int lanes) { return build(linear(lanes, ops::max_rows(lanes))); }},
      {"linear with residual, SiLU and gate, the most rows",
       [](int lanes) {
         ops::LinearKernel spec = linear(lanes, ops::max_rows(lanes));
         spec.epilogue = {.residual = true, .activation = "silu", .gated = true};
         return build(spec);
       }},
      {"linear in 12 bits, one row", [](int lanes) { return build(twelve_bits(lanes, 1)); }},
      {"linear in 12 bits, four rows", [](int lanes) { return build(twelve_bits(lanes, 4)); }},
      {"linear in 12 bits, the most rows",
       [](int lanes) { return build(twelve_bits(lanes, ops::max_rows(lanes))); }},
      {"matmul", [](int lanes) { return build(ops::MatmulKernel{lanes}); }},
      {"matmul, transposed",
       [](int lanes) {
         return build(ops::MatmulKernel{lanes, true});
       }},
      {"attention, a token", [](int lanes) { return build(attention(lanes)); }},
      {"attention, a tile", [](int lanes) { return build(ops::PrefillKernel{attention(lanes)}); }},
      {"row kernel, sum and norm", [](int lanes) { return build(norm(lanes)); }},
      {"rope", [](int lanes) { return build(ops::RopeKernel{lanes}); }},
  };
}

// Milliseconds and bytes of one.
std::pair<double, std::size_t> emit_once(const Kind& kind, const Target& target) {
  const auto start = std::chrono::steady_clock::now();
  const Result<jit::CodeObject> code = jit::emit(kind.build(target.lanes()), target);
  const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
  if (!code) {
    fmt::print(stderr, "emission: {}: {}\n", kind.name, code.error().message);
    std::exit(1);
  }
  return {passed.count(), code->bytes.size()};
}

int run(int rounds) {
  fmt::print("| kernel | rung | bytes | median ms | 90 % ms |\n|---|---|---|---|---|\n");
  for (const char* rung : {"avx2", "avx512", "amx_bf16"}) {
    const Target target = *Target::for_rung(rung);
    const std::vector<Kind> all = kinds(rung);
    std::vector<std::vector<double>> times(all.size());
    std::vector<std::size_t> bytes(all.size());
    for (int round = 0; round < rounds; ++round) {
      for (std::size_t i = 0; i < all.size(); ++i) {
        const auto [time, size] = emit_once(all[i], target);
        times[i].push_back(time);
        bytes[i] = size;
      }
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      std::ranges::sort(times[i]);
      fmt::print("| {} | {} | {} | {:.3f} | {:.3f} |\n", all[i].name, rung, bytes[i],
                 times[i][times[i].size() / 2], times[i][times[i].size() * 9 / 10]);
    }
  }
  return 0;
}

}  // namespace
}  // namespace tilewright

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 201;
  if (rounds < 1) {
    fmt::print(stderr, "usage: emission [ROUNDS]\n");
    return 2;
  }
  return tilewright::run(rounds);
}
