// See arithmetic.h.
//
// Tested by linear_test.
#include "ops/gemm/arithmetic.h"

#include <cmath>

#include "ops/gemm/tile_kernel.h"

namespace tilewright::ops {
namespace {

// On AMD's Zen 4 (family 0x19) and later vdpbf16ps does twice the work of an fp32 FMA in its time;
// on an Intel Granite Rapids it ran at half the rate of the FMA, i.e. no faster. A generic target
// is a rung that somebody asked for by its name.
bool has_fast_dots(const Target& target) {
  if (!target.has(Isa::avx512_bf16) || target.has(Isa::amx_bf16)) return false;
  return target.cpu.vendor == "generic" ||
         (target.cpu.vendor == "AuthenticAMD" && target.cpu.family >= 0x19);
}

}  // namespace

ArithmeticChoice choose_arithmetic(const Target& target, Fp32Mode fp32, graph::DataType x,
                                   PackedForm weight, float largest_weight) {
  using graph::DataType;
  ArithmeticChoice choice;
  if (weight.dtype != DataType::bf16) return choice;
  if (x == DataType::bf16 && has_fast_dots(target)) choice.few_rows = Arithmetic::dot;
  if (!target.has(Isa::amx_bf16)) return choice;
  if (x == DataType::bf16) choice.many_rows = Arithmetic::tiles;
  // Only who asks for it: faster by its products (three at 14 times the rate of the FMA on Granite
  // Rapids), but not measured, and for sums of one sign less exact than PyTorch's fp32.
  const bool splits =
      fp32 == Fp32Mode::amx && largest_weight >= kSmallestFactor && std::isfinite(largest_weight);
  if (x == DataType::f32 && splits) choice.many_rows = Arithmetic::split_tiles;
  return choice;
}

}  // namespace tilewright::ops
