// The text form of VIR, one line per instruction; parse.cpp reads it back exactly.
//
// Register counts are not printed: they are the largest number used plus one. The float that the
// bits of a vconst stand for follows as a comment, which the parser skips.
//
// Tested by vir_test, filetests/vir.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <iterator>

#include "jit/vir/signature.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

std::string reg_name(Reg reg) {
  constexpr char kLetters[] = {'g', 'v', 'm', 't'};
  return fmt::format("%{}{}", kLetters[static_cast<int>(reg.kind)], static_cast<int>(reg.id));
}

namespace {

std::string print_address(const Address& address) {
  std::string text = "[" + reg_name(address.base);
  if (address.index.valid()) {
    text += " + " + reg_name(address.index);
    if (address.scale != 1) text += fmt::format("*{}", address.scale);
  }
  const std::int64_t disp = address.disp;
  if (disp > 0) text += fmt::format(" + {}", disp);
  if (disp < 0) text += fmt::format(" - {}", -disp);
  return text + "]";
}

std::string print_immediate(const Instruction& instruction) {
  if (instruction.op != Op::vconst) return fmt::format("{}", instruction.immediate);
  const auto bits = static_cast<std::uint32_t>(instruction.immediate);
  if (bits != static_cast<std::uint64_t>(instruction.immediate)) {
    return fmt::format("{}", instruction.immediate);  // not verifiable, but still printed exactly
  }
  return fmt::format("{:#010x}  ; {}", bits, std::bit_cast<float>(bits));
}

std::string print_plain(const Instruction& instruction) {
  const Signature& form = signature(instruction.op);
  std::string text;
  if (form.definition != 0) text += reg_name(instruction.dst) + " = ";
  text += op_name(instruction.op);
  if (instruction.element != Element::none)
    text += fmt::format(".{}", element_name(instruction.element));
  std::string_view separator = " ";
  std::size_t next_source = 0;
  for (char letter : form.operands) {
    text += separator;
    separator = ", ";
    if (letter == 'A') {
      text += print_address(instruction.address);
    } else if (letter == 'I') {
      text += print_immediate(instruction);
    } else {
      text += reg_name(instruction.src[next_source++]);
    }
  }
  return text;
}

}  // namespace

std::string print_instruction(const Instruction& instruction) {
  switch (instruction.op) {
    case Op::loop:
    case Op::if_:
      return fmt::format("{} {} {{", op_name(instruction.op), reg_name(instruction.src[0]));
    case Op::else_:
      return "} else {";
    case Op::endloop:
    case Op::endif:
      return "}";
    default:
      return print_plain(instruction);
  }
}

std::string print(const Function& function) {
  std::string text = fmt::format("vir {} lanes={} args={} {{\n", function.name, function.lanes,
                                 function.arg_count);
  int depth = 1;
  for (const Instruction& instruction : function.code) {
    const Op op = instruction.op;
    if (op == Op::endloop || op == Op::endif || op == Op::else_) depth = std::max(1, depth - 1);
    fmt::format_to(std::back_inserter(text), "{:{}}{}\n", "", 2 * depth,
                   print_instruction(instruction));
    if (op == Op::loop || op == Op::if_ || op == Op::else_) ++depth;
  }
  return text + "}\n";
}

}  // namespace tilewright::jit::vir
