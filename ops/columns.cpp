// Columns: the loops along a row (full vectors, tail) and the element types' loads and stores.
//
// Tested by row_kernel_test and rope_kernel_test.
#include "ops/columns.h"

#include <bit>
#include <cassert>

namespace tilewright::ops {
namespace {

using graph::DataType;
using jit::vir::Builder;
using jit::vir::Element;
using jit::vir::Reg;

Element store_element(DataType type) {
  return type == DataType::bf16 ? Element::u16 : load_element(type);
}

constexpr int kHalfBytes = 4;  // of an i64; the low half comes first

int log2_of(int power) { return std::countr_zero(static_cast<unsigned>(power)); }

// `turns` of a loop over full vectors; a constant count needs no loop for 0 and 1.
void repeat(Builder& builder, const ColumnCount& turns, const std::function<void()>& body) {
  if (turns.constant == 0) return;
  if (turns.constant == 1) return body();
  builder.loop(turns.constant > 0 ? builder.constant(turns.constant) : turns.count, body);
}

class Walk {
 public:
  Walk(Builder& builder, const ColumnCount& columns, int unroll, Block::Part tail,
       const BlockBody& body)
      : b_(builder), columns_(columns), unroll_(unroll), tail_(tail), body_(body) {
    while (columns.constant >= 0 && unroll_ > 1 && vectors() < unroll_) unroll_ /= 2;
  }

  void emit() {
    const int step = unroll_ * b_.lanes();
    if (columns_.constant >= 0) {
      if (vectors() <= unroll_) return straight_line();
      index_ = b_.constant(0);
      repeat(b_, {columns_.constant / step, {}}, [&] { turn(unroll_); });
      repeat(b_, {vectors() % unroll_, {}}, [&] { turn(1); });
      return tail_block(0, {columns_.constant % b_.lanes(), {}});
    }
    index_ = b_.constant(0);
    Reg turns = b_.shift_right(columns_.count, log2_of(step));
    b_.loop(turns, [&] { turn(unroll_); });
    if (unroll_ > 1) {
      Reg rest = b_.bit_and(b_.shift_right(columns_.count, log2_of(b_.lanes())), unroll_ - 1);
      b_.loop(rest, [&] { turn(1); });
    }
    Reg remaining = b_.bit_and(columns_.count, b_.lanes() - 1);
    b_.if_nonzero(remaining, [&] { tail_block(0, {-1, remaining}); });
  }

 private:
  std::int64_t vectors() const { return columns_.constant / b_.lanes(); }

  void straight_line() {
    for (int copy = 0; copy < vectors(); ++copy) {
      body_({Block::Part::vector, {}, copy * b_.lanes(), {}, copy});
    }
    tail_block(vectors() * b_.lanes(), {columns_.constant % b_.lanes(), {}});
  }

  void turn(int copies) {
    for (int copy = 0; copy < copies; ++copy) {
      body_({Block::Part::vector, index_, copy * b_.lanes(), {}, copy});
    }
    b_.add_to(index_, copies * b_.lanes());
  }

  void tail_block(std::int64_t first, const ColumnCount& count) {
    if (count.constant == 0) return;
    const bool known = count.constant > 0;
    if (tail_ == Block::Part::masked) {
      Reg mask = b_.tail_mask(known ? b_.constant(count.constant) : count.count);
      return body_({Block::Part::masked, index_, first, mask, 0});
    }
    Reg mask = b_.tail_mask(b_.constant(1));
    Reg index = index_.valid() ? index_ : b_.constant(0);
    repeat(b_, count, [&] {
      body_({Block::Part::single, index, first, mask, 0});
      b_.add_to(index, 1);
    });
  }

  Builder& b_;
  ColumnCount columns_;
  int unroll_;
  Block::Part tail_;
  const BlockBody& body_;
  Reg index_;
};

}  // namespace

void for_columns(Builder& builder, const ColumnCount& columns, int unroll, Block::Part tail,
                 const BlockBody& body) {
  Walk(builder, columns, unroll, tail, body).emit();
}

bool has_masked_moves(DataType type, int lanes) {
  if (type == DataType::i64) return false;
  return lanes == 16 || type == DataType::f32 || type == DataType::i32;
}

Element load_element(DataType type) {
  switch (type) {
    case DataType::f32:
      return Element::f32;
    case DataType::bf16:
      return Element::bf16;
    case DataType::f16:
      return Element::f16;
    case DataType::i32:
      return Element::i32;
    case DataType::boolean:
      return Element::u8;
    case DataType::i8:
      return Element::i8;
    default:
      return Element::none;
  }
}

bool has_vector_form(DataType type) {
  return type != DataType::i8 && load_element(type) != Element::none;
}

jit::vir::Address address(const Builder& builder, Reg base, int element_bytes, const Block& block) {
  const std::int64_t displacement = block.first * element_bytes;
  if (!block.index.valid()) return builder.at(base, displacement);
  return builder.at(base, block.index, element_bytes, displacement);
}

Reg load(Builder& builder, DataType type, Reg base, const Block& block) {
  const Element element = load_element(type);
  assert(element != Element::none);
  const jit::vir::Address from = address(builder, base, size_in_bytes(type), block);
  switch (block.part) {
    case Block::Part::masked:
      return builder.load_masked(element, from, block.mask);
    case Block::Part::single:
      return builder.load_one(element, from);
    case Block::Part::vector:
      break;
  }
  return builder.load(element, from);
}

Reg load_half(Builder& builder, Reg base, const Block& block, bool high) {
  assert(block.part != Block::Part::masked);
  jit::vir::Address from = address(builder, base, size_in_bytes(DataType::i64), block);
  if (block.part == Block::Part::vector) {
    return builder.load(high ? Element::i64_high : Element::i64_low, from);
  }
  if (high) from.disp += kHalfBytes;
  return builder.load_one(Element::i32, from);
}

Reg load_broadcast_half(Builder& builder, Reg base, bool high) {
  return builder.broadcast(Element::i32, builder.at(base, high ? kHalfBytes : 0));
}

void store(Builder& builder, DataType type, Reg base, const Block& block, Reg value) {
  const Element element = store_element(type);
  assert(element != Element::none);
  const jit::vir::Address to = address(builder, base, size_in_bytes(type), block);
  if (type == DataType::bf16) value = builder.round_to_bf16_bits(value);
  switch (block.part) {
    case Block::Part::masked:
      return builder.store_masked(element, to, value, block.mask);
    case Block::Part::single:
      return builder.store_one(element, to, value);
    case Block::Part::vector:
      return builder.store(element, to, value);
  }
}

Reg load_broadcast(Builder& builder, DataType type, Reg base) {
  assert(has_vector_form(type));
  return builder.broadcast(load_element(type), builder.at(base));
}

}  // namespace tilewright::ops
