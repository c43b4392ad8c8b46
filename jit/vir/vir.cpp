// The names and signatures of VIR ops and element types, read from op_list.def so that no second
// list exists to fall out of step.
//
// Tested by vir_test.
#include "jit/vir/vir.h"

#include <cstddef>

namespace tilewright::jit::vir {
namespace {

constexpr std::string_view kNames[] = {
#define VIR_OP(name, signature) #name,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

constexpr std::string_view kSignatureTexts[] = {
#define VIR_OP(name, signature) signature,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

}  // namespace

std::string_view op_name(Op op) {
  // The two names that are C++ keywords carry an underscore in the table.
  std::string_view name = kNames[static_cast<std::size_t>(op)];
  if (name.ends_with('_')) name.remove_suffix(1);
  return name;
}

std::string_view op_signature(Op op) { return kSignatureTexts[static_cast<std::size_t>(op)]; }

std::string_view element_name(Element element) {
  switch (element) {
    case Element::none:
      return "none";
    case Element::f32:
      return "f32";
    case Element::bf16:
      return "bf16";
    case Element::f16:
      return "f16";
    case Element::i64:
      return "i64";
    case Element::i32:
      return "i32";
    case Element::u16:
      return "u16";
    case Element::u8:
      return "u8";
    case Element::i8:
      return "i8";
    case Element::i64_low:
      return "i64_low";
    case Element::i64_high:
      return "i64_high";
  }
  return "?";
}

}  // namespace tilewright::jit::vir
