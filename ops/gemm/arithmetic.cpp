// See arithmetic.h.
//
// Tested by linear_test and prefill_attention_test.
#include "ops/gemm/arithmetic.h"

#include "ops/attention/prefill_kernel.h"

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

ArithmeticChoice choose_arithmetic(const Target& target, std::int64_t fp32_products,
                                   graph::DataType x, PackedForm weight) {
  using graph::DataType;
  ArithmeticChoice choice;
  const bool has_tiles = target.has(Isa::amx_bf16);
  const int needed = weight.dtype == DataType::bf16 ? 3 : most_fp32_products;
  if (x == DataType::f32 && has_tiles && needed <= fp32_products) {
    choice.many_rows = Arithmetic::split_tiles;
  }
  if (x != DataType::bf16 || weight.dtype != DataType::bf16) return choice;
  if (has_fast_dots(target)) choice.few_rows = Arithmetic::dot;
  if (has_tiles) choice.many_rows = Arithmetic::tiles;
  return choice;
}

Arithmetic choose_arithmetic(const Target& target, const AttentionKernel& attention) {
  const auto can = [&](Arithmetic arithmetic) {
    return supported(PrefillKernel{attention, arithmetic}).ok();
  };
  if (target.has(Isa::amx_bf16) && can(Arithmetic::tiles)) return Arithmetic::tiles;
  if (has_fast_dots(target) && can(Arithmetic::dot)) return Arithmetic::dot;
  return Arithmetic::fma;
}

bool attention_by_dots(const Target& target, AttentionKernel attention) {
  attention.dots = true;
  return has_fast_dots(target) && supported(attention).ok();
}

bool attention_in_integers(const Target& target, AttentionKernel attention) {
  attention.integers = true;
  return target.has(Isa::avx512_vnni) && supported(attention).ok();
}

}  // namespace tilewright::ops
