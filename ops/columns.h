// Columns: how kernels walk along a row, and how an element type is read and written there.
//
// A row of any length is full vectors (unrolled), then a tail. The tail is one masked vector where
// the machine has masked moves for every element type of the pass, else a loop over single
// elements: AVX2 masks moves of 32-bit elements only. No byte outside the row is touched.
//
// Tested by row_kernel_test and rope_kernel_test.
#pragma once

#include <cstdint>
#include <functional>

#include "graph/type.h"
#include "jit/vir/builder.h"

namespace tilewright::ops {

// The part of a row that one copy of a body works on.
struct Block {
  enum class Part : std::uint8_t {
    vector,  // all lanes
    masked,  // the lanes of `mask`; loads give 0 in the others
    single,  // lane 0 only; loads give 0 in the others
  };
  Part part = Part::vector;
  jit::vir::Reg index = {};  // elements from the start of the row; invalid: none
  std::int64_t first = 0;    // further elements, a constant
  jit::vir::Reg mask = {};   // the lanes in use; valid unless part is vector
  int copy = 0;              // which copy of an unrolled body, 0 elsewhere
};

// A number of columns: a constant of the kernel, or a register.
struct ColumnCount {
  std::int64_t constant = -1;  // >= 0: known
  jit::vir::Reg count = {};    // valid if not; it is not changed
};

using BlockBody = std::function<void(const Block&)>;

// Walks `columns` elements: `unroll` copies of the body per turn (a power of two), single vectors,
// then the tail. If the count is a constant of at most `unroll` vectors, the code is straight line.
void for_columns(jit::vir::Builder& builder, const ColumnCount& columns, int unroll,
                 Block::Part tail, const BlockBody& body);

// Whether a tail in this element type can be masked with that many lanes.
bool has_masked_moves(graph::DataType type, int lanes);

// A half of each i64, as i32 lanes. The block is not masked.
jit::vir::Reg load_half(jit::vir::Builder& builder, jit::vir::Reg base, const Block& block,
                        bool high);
// One i64's half in all lanes.
jit::vir::Reg load_broadcast_half(jit::vir::Builder& builder, jit::vir::Reg base, bool high);

// Element types that load and store know: f32, bf16, f16 (as f32 in registers), i32, and boolean
// (as the integers 0 and 1). `base` is the address of the row's first element. Load also knows i8,
// as f32 in registers, but for single elements.
bool has_vector_form(graph::DataType type);
// As in memory, or none without a vector form.
jit::vir::Element load_element(graph::DataType type);
jit::vir::Reg load(jit::vir::Builder& builder, graph::DataType type, jit::vir::Reg base,
                   const Block& block);
// bf16 and f16 round to nearest even.
void store(jit::vir::Builder& builder, graph::DataType type, jit::vir::Reg base, const Block& block,
           jit::vir::Reg value);
// One element into all lanes.
jit::vir::Reg load_broadcast(jit::vir::Builder& builder, graph::DataType type, jit::vir::Reg base);

// The address of the block's first element.
jit::vir::Address address(const jit::vir::Builder& builder, jit::vir::Reg base, int element_bytes,
                          const Block& block);

}  // namespace tilewright::ops
