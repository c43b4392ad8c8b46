// Signature: a row of op_list.def, decoded once, so that the printer, the parser, the verifier and
// the allocator agree on which operands an op has and in which order. Inline, because all of them
// ask for every instruction.
//
// Tested by vir_test.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

struct Signature {
  std::string_view operands;     // in printed order: G N V W M X Y for registers, A, I
  char definition = 0;           // 'G', 'V', 'M', 'X', or 0
  std::array<char, 3> source{};  // the letter of each Instruction::src, 0 when unused
  int source_count = 0;
  bool has_address = false;
  bool has_immediate = false;
  bool has_element = false;
};

constexpr bool is_register_letter(char letter) {
  return std::string_view("GNVWMXY").find(letter) != std::string_view::npos;
}

// REQUIRES: is_register_letter(letter)
constexpr Kind kind_of(char letter) {
  if (letter == 'G' || letter == 'N') return Kind::gpr;
  if (letter == 'X' || letter == 'Y') return Kind::tile;
  return letter == 'M' ? Kind::mask : Kind::vec;
}

// A source that the op also writes.
constexpr bool is_read_write(char letter) {
  return letter == 'W' || letter == 'N' || letter == 'Y';
}

constexpr Signature decode(std::string_view text) {
  Signature result;
  const std::size_t equals = text.find('=');
  if (equals == 1) result.definition = text[0];
  result.operands = text.substr(equals + 1);
  if (!result.operands.empty() && result.operands.back() == 'T') {
    result.has_element = true;
    result.operands.remove_suffix(1);
  }
  for (char letter : result.operands) {
    if (letter == 'A') result.has_address = true;
    if (letter == 'I') result.has_immediate = true;
    if (is_register_letter(letter)) {
      result.source[static_cast<std::size_t>(result.source_count++)] = letter;
    }
  }
  return result;
}

inline constexpr std::array kSignatures = {
#define VIR_OP(name, signature) decode(signature),
#include "jit/vir/op_list.def"
#undef VIR_OP
};

inline const Signature& signature(Op op) { return kSignatures[static_cast<std::size_t>(op)]; }

// visit(reg) for every register that the instruction names as a source or in its address.
template <class Visit>
void each_source(const Instruction& in, Visit&& visit) {
  const Signature& form = signature(in.op);
  for (int k = 0; k < form.source_count; ++k) visit(in.src[static_cast<std::size_t>(k)]);
  if (!form.has_address) return;
  visit(in.address.base);
  if (in.address.index.valid()) visit(in.address.index);
}

}  // namespace tilewright::jit::vir
