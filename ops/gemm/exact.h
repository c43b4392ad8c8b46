// Exact storage: fp32 weights whose values all fit a 16-bit type lose nothing when stored in it.
//
// Most checkpoints are saved in bf16 (or fp16) and loaded in fp32. Half the bytes then carry all of
// the weight, and a GEMV, which is bound by memory, takes half the time; the kernel widens the
// values again in registers, to the very same numbers (linear_kernel.h says why the result has the
// same bits).
//
// Tested by exact_test.
#pragma once

#include <cstdint>
#include <span>

#include "graph/type.h"
#include "ops/gemm/pack.h"

namespace tilewright::ops {

// Whether every fp32 pattern of `bits` is the widened form of a value of `type` (bf16 or f16).
// Signed zeros, subnormals of the type and infinities are; a NaN is only if the type keeps its
// payload (bf16).
bool fits(graph::DataType type, std::span<const std::uint32_t> bits);

// The narrowest type that holds blocks of fp32 without loss: bf16, f16, or f32 if neither does.
// Reads on all threads of the process, and stops at the first value that does not fit.
graph::DataType exact_type(std::span<const WeightBlock> blocks, std::int64_t k);

// Narrows values that fit: `to` gets the patterns of `type`. REQUIRES: fits(type, from).
void narrow(graph::DataType type, std::span<const std::uint32_t> from, std::uint16_t* to);
// The inverse, for any value.
std::uint32_t widen(graph::DataType type, std::uint16_t bits);

}  // namespace tilewright::ops
