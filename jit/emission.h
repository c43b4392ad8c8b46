// Emission: one function per VIR op that writes the op's instructions, and what such a function
// sees of the world. Internal to jit/emit*.cpp.
//
// op_list.def declares the functions, so an op without one is a link error. An op that both vector
// widths encode alike has one definition (emit_vector.cpp: VEX or EVEX follows from the operands);
// the others choose between avx2:: and avx512::.
//
// Aliases: a destination may be the same register as any source of its kind, so a function that
// writes before it has read everything must handle that. Temporaries alias nothing. rax is free.
//
// Tested by emit_test.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "jit/assembler.h"
#include "jit/emit.h"
#include "jit/vir/linear_scan.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::emission {

// Never allocated: within one op it belongs to the op's function.
inline constexpr Gpr kScratch = rax;

inline constexpr int kTiles = 8;

// One instruction with physical operands; spilled ones are loaded already.
struct Site {
  Assembler& as;
  const vir::Instruction& instruction;
  int lanes = 8;
  int destination = -1;
  std::array<int, 3> source = {-1, -1, -1};
  std::array<int, vir::kTemporaries> temporary = {-1, -1};
  Memory memory = {};
  Gpr args = {};                            // for garg
  Label begin = {}, middle = {}, end = {};  // of the loop or if that a structure op belongs to
  bool has_else = false;
  vir::Home counter = {};  // of the loop that endloop closes

  bool wide() const { return lanes == 16; }
  vir::Element element() const { return instruction.element; }
  std::int64_t immediate() const { return instruction.immediate; }
  int small_immediate() const { return static_cast<int>(instruction.immediate); }

  Gpr gd() const { return {destination}; }
  Gpr g(int i) const { return {source[static_cast<std::size_t>(i)]}; }
  Vec vd() const { return {destination, 32 * lanes}; }
  Vec v(int i) const { return {source[static_cast<std::size_t>(i)], 32 * lanes}; }
  Vec temp() const { return {temporary[0], 32 * lanes}; }
  Opmask kd() const { return {destination}; }
  Opmask k(int i) const { return {source[static_cast<std::size_t>(i)]}; }
  Tile td() const { return {destination}; }
  Tile t(int i) const { return {source[static_cast<std::size_t>(i)]}; }
};

// Vector registers that an instruction overwrites besides its destination.
int temporary_count(const vir::Instruction& instruction, int lanes);

// emit() into the caller's buffer: for the test that the address does not show.
Result<CodeObject> emit_in(const vir::Function& function, const Target& target,
                           std::span<std::byte> buffer);

// Constants that both widths use.
Memory lane_numbers(Assembler& as);  // 0, 1, ... 15 as 32-bit integers
void clamp_to_scratch(Site& s);      // rax = the general source 0, clamped to [0, lanes]

#define VIR_OP(name, signature) void name(Site& s);
#include "jit/vir/op_list.def"
#undef VIR_OP

// What the two widths encode differently.
#define TILEWRIGHT_PER_WIDTH(declare)                                                           \
  declare(vsplat) declare(vcvt_f16) declare(vloadm) declare(vstore) declare(vstorem)            \
      declare(vround) declare(vswap) declare(vunzip_runs) declare(vbroadcast16) declare(mtail)  \
          declare(mcmp_lt) declare(mcmp_le) declare(mcmp_eq) declare(mcmp_ne) declare(micmp_eq) \
              declare(micmp_gt) declare(mand) declare(mor) declare(mandn) declare(vselect)
#define TILEWRIGHT_DECLARE(name) void name(Site& s);
namespace avx2 {
TILEWRIGHT_PER_WIDTH(TILEWRIGHT_DECLARE)
}
namespace avx512 {
TILEWRIGHT_PER_WIDTH(TILEWRIGHT_DECLARE)
}
#undef TILEWRIGHT_DECLARE

}  // namespace tilewright::jit::emission
