// Elementwise ops on vector registers: what one step of a fused region emits.
//
// A value in a region is real (f32 lanes), integer (i32 lanes) or a mask (booleans). Reals compute
// as ATen does in fp32: maximum, minimum and relu keep NaN; nothing is contracted into FMA, so a
// chain rounds as separate ops do.
//
// Tested by row_kernel_test.
#pragma once

#include <cstdint>
#include <span>

#include "graph/graph.h"
#include "graph/type.h"
#include "jit/vir/builder.h"

namespace tilewright::ops {

enum class Form : std::uint8_t { real, integer, mask };

// f32, bf16, f16: real; i32: integer; boolean: mask. REQUIRES: has_vector_form(type)
Form form_of(graph::DataType type);

// The same value in another form: real and integer to mask is `!= 0` (NaN is true), mask to the
// others is 0 or 1, integer to real rounds. REQUIRES: not real to integer.
jit::vir::Reg change_form(jit::vir::Builder& builder, jit::vir::Reg value, Form from, Form to);

// `operands` are all in `form`, but where's first is a mask. Compares give a mask. Not here:
// convert, pow and reductions.
jit::vir::Reg emit_elementwise(jit::vir::Builder& builder, graph::Op op, Form form,
                               std::span<const jit::vir::Reg> operands, bool tanh_form = false);

// The f32 values rounded to nearest even as that type holds them.
jit::vir::Reg round_to(jit::vir::Builder& builder, graph::DataType type, jit::vir::Reg value);

// max(a, b), NaN if either is.
jit::vir::Reg maximum(jit::vir::Builder& builder, jit::vir::Reg a, jit::vir::Reg b);

}  // namespace tilewright::ops
