// VIR: the virtual-register linear IR that one kernel is written in.
//
// A kernel is `void k(const int64_t* args)`; its VIR is a flat list of instructions over virtual
// registers that are mutable and have one home for life (no SSA), with explicit structured loops.
// `lanes` (8 or 16) is part of the function: builders are written once, for any number of lanes,
// and the same text runs in the interpreter. The text form (print / parse) is exact: it is the
// recipe stored beside cached code and the language of filetests.
//
// Tested by vir_test, filetests/vir.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "jit/base/result.h"

namespace tilewright::jit::vir {

enum class Op : std::uint8_t {
#define VIR_OP(name, signature) name,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

// Kinds of registers, and element types in memory.
enum class Kind : std::uint8_t { gpr, vec, mask, tile };
enum class Element : std::uint8_t {
  none,
  f32,
  bf16,
  f16,
  i64,
  i32,
  u16,
  u8,
  i8,
  i64_low,  // a half of each i64, as a 32-bit lane
  i64_high,
};

// A virtual register: its number within its kind. Strong type, printed %g3, %v7, %m0, %t1. Packed,
// because an instruction has six of them and a large kernel thousands of instructions.
struct Reg {
  Kind kind : 8 = Kind::gpr;
  std::int32_t id : 24 = -1;
  bool valid() const { return id >= 0; }
  friend bool operator==(const Reg&, const Reg&) = default;
};

// [base + index * scale + disp]; index is optional; scale in {1, 2, 4, 8}; disp fits 32 bits.
struct Address {
  Reg base;
  Reg index;
  std::uint8_t scale = 1;
  std::int32_t disp = 0;
};

struct Instruction {
  Op op;
  Element element = Element::none;
  Reg dst;                     // the definition ("V=", "G=", "M=", "X="), if any
  std::array<Reg, 3> src;      // uses in printed order, W, N, Y included, addresses not
  Address address;             // if the signature has A
  std::int64_t immediate = 0;  // if the signature has I
};
static_assert(sizeof(Instruction) == 48);

struct Function {
  std::string name;
  int lanes = 8;
  int arg_count = 0;  // 64-bit slots read through garg
  int gpr_count = 0, vec_count = 0, mask_count = 0, tile_count = 0;
  std::vector<Instruction> code;
};

std::string_view op_name(Op op);
std::string_view op_signature(Op op);
std::string_view element_name(Element element);

std::string reg_name(Reg reg);  // "%v7"

std::string print(const Function& function);
// One line of print(), without indentation.
std::string print_instruction(const Instruction& instruction);
Result<Function> parse(std::string_view text);
// Operand kinds, defined-before-use on every path, structure, element types legal for the op,
// ranges of immediates. The error begins with the number of the offending instruction's line in
// print().
Status verify(const Function& function);
// Executes on real memory, one lane after another, with the semantics that op_list.def states. Slow
// and exact. REQUIRES: verify(function) is ok and args point to what the kernel reads and writes.
void interpret(const Function& function, const std::int64_t* args);

}  // namespace tilewright::jit::vir
