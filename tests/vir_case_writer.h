// What op cases and random programs are written with: random data, and raw VIR instructions.
// Internal to vir_case.cpp and random_program.cpp.
#pragma once

#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "jit/vir/signature.h"
#include "vir_case.h"

namespace tilewright::testing {

using jit::vir::Address;
using jit::vir::Element;
using jit::vir::Function;
using jit::vir::Instruction;
using jit::vir::Kind;
using jit::vir::Op;
using jit::vir::Reg;
using jit::vir::Signature;

inline constexpr Op kAllOps[] = {
#define VIR_OP(name, signature) Op::name,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

// The input: 8 general values, then vectors. The memory operand lies at kAreaOffset, so that bytes
// before it show whether the address is right; nothing lies behind it.
inline constexpr int kGeneralValues = 8;
inline constexpr int kVectorValues = 4;
inline constexpr int kVectorOffset = 8 * kGeneralValues;
inline constexpr int kAreaOffset = 64;
inline constexpr std::int64_t kIndexValue = 4;  // what the index register holds
inline constexpr std::size_t kIndexSlot = 7;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  std::uint64_t below(std::uint64_t limit) { return engine_() % limit; }
  template <class T, std::size_t n>
  T pick(const T (&values)[n]) {
    return values[below(n)];
  }

  // Floats and integers of every kind: special values, moderate ones, any bits.
  std::uint32_t lane() {
    static constexpr std::uint32_t kSpecial[] = {
        0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000,
        0x00000001, 0x807fffff, 0x7f7fffff, 0x4f000000, 0xcf000000, 0x477fe000, 0x477ff000,
        0x33000000, 0x33000001, 0x3f000000, 0x3fc00000, 0x40200000, 0xffffffff, 0x7fffffff};
    switch (below(4)) {
      case 0:
        return pick(kSpecial);
      case 1:
        return static_cast<std::uint32_t>(bits());
      default: {
        const double mantissa = static_cast<double>(below(1 << 24)) / (1 << 23) - 1;
        const int exponent = static_cast<int>(below(24)) - 8;
        return std::bit_cast<std::uint32_t>(static_cast<float>(std::ldexp(mantissa, exponent)));
      }
    }
  }
  std::int64_t general() {
    switch (below(3)) {
      case 0:
        return static_cast<std::int64_t>(bits());
      case 1:
        return static_cast<std::int64_t>(below(40)) - 10;
      default:
        return pick({std::int64_t{0}, std::int64_t{1}, std::int64_t{-1}, std::int64_t{1} << 32,
                     -(std::int64_t{1} << 32) + 5, LLONG_MAX, LLONG_MIN});
    }
  }
  std::int64_t pick(std::initializer_list<std::int64_t> values) {
    return values.begin()[below(values.size())];
  }

 private:
  std::mt19937_64 engine_;
};

// Immediates that matter, and what else the table's rows do not say.
std::vector<std::int64_t> immediates(Op op, int lanes);
bool is_structure(Op op);
// An op whose case must configure tiles first.
bool is_tile_op(Op op);
// The op's results are floats that the machine may give with another NaN.
bool computes_floats(Op op);
Kind kind_of_destination(const Signature& signature);

// Appends raw instructions, so that any combination of registers can be made.
class Writer {
 public:
  Writer(std::string name, int lanes) {
    function_.name = std::move(name);
    function_.lanes = lanes;
    function_.arg_count = kVirCaseArgs;
    for (int slot = 0; slot < kVirCaseArgs; ++slot) {
      pointers_.push_back(fresh(Kind::gpr));
      Instruction& in = add(Op::garg);
      in.dst = pointers_.back();
      in.immediate = slot;
    }
  }

  Instruction& add(Op op, Element element = Element::none) {
    function_.code.push_back({.op = op, .element = element, .dst = {}, .src = {}, .address = {}});
    return function_.code.back();
  }
  Reg fresh(Kind kind) {
    int& count = kind == Kind::gpr    ? function_.gpr_count
                 : kind == Kind::vec  ? function_.vec_count
                 : kind == Kind::mask ? function_.mask_count
                                      : function_.tile_count;
    return {kind, count++};
  }
  Address at(VirCaseArg slot, std::int32_t disp) const {
    return {pointers_[static_cast<std::size_t>(slot)], {}, 1, disp};
  }
  int lanes() const { return function_.lanes; }

  void copy_pointer(Reg reg, VirCaseArg slot) {
    Instruction& in = add(Op::gmov);
    in.dst = reg;
    in.src[0] = pointers_[static_cast<std::size_t>(slot)];
  }
  void load_general(Reg reg, int slot) {
    Instruction& in = add(Op::gload, Element::i64);
    in.dst = reg;
    in.address = at(kInput, 8 * slot);
  }
  void load_vector(Reg reg, int slot) {
    Instruction& in = add(Op::vload, Element::f32);
    in.dst = reg;
    in.address = at(kInput, kVectorOffset + slot * 4 * lanes());
  }
  // The mask of the positive integers of an input vector.
  void load_mask(Reg reg, int slot) {
    const Reg values = fresh(Kind::vec), zero = fresh(Kind::vec);
    load_vector(values, slot);
    add(Op::vzero).dst = zero;
    Instruction& in = add(Op::micmp_gt);
    in.dst = reg;
    in.src = {values, zero, {}};
  }
  void load(Reg reg, int slot) {
    if (reg.kind == Kind::gpr) return load_general(reg, slot);
    if (reg.kind == Kind::vec) return load_vector(reg, slot % kVectorValues);
    load_mask(reg, slot % kVectorValues);
  }

  // Stores a register at the end of the output.
  void output(Reg reg) {
    if (reg.kind == Kind::gpr) {
      Instruction& in = add(Op::gstore, Element::i64);
      in.src[0] = reg;
      in.address = at(kOutput, static_cast<std::int32_t>(output_size_));
      output_size_ += 8;
      return;
    }
    Reg vector = reg;
    if (reg.kind == Kind::mask) {
      const Reg zero = fresh(Kind::vec), ones = fresh(Kind::vec);
      vector = fresh(Kind::vec);
      add(Op::vzero).dst = zero;
      Instruction& constant = add(Op::vconst);
      constant.dst = ones;
      constant.immediate = 0xffffffff;
      Instruction& select = add(Op::vselect);
      select.dst = vector;
      select.src = {reg, ones, zero};
    }
    Instruction& in = add(Op::vstore, Element::f32);
    in.src[0] = vector;
    in.address = at(kOutput, static_cast<std::int32_t>(output_size_));
    output_size_ += static_cast<std::size_t>(4 * lanes());
  }

  // More of it, written by raw instructions.
  std::int32_t output_bytes(std::size_t bytes) {
    output_size_ += bytes;
    return static_cast<std::int32_t>(output_size_ - bytes);
  }

  VirCase finish(Random& random, std::size_t area_size, bool float_result) &&;

 private:
  Function function_;
  std::vector<Reg> pointers_;
  std::size_t output_size_ = 0;
};

}  // namespace tilewright::testing
