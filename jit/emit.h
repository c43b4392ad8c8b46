// emit: VIR to machine code for one Target.
//
// verify -> liveness -> linear scan -> Xbyak, into a plain read-write buffer. The result is
// position independent by construction (zero relocations, constants rip-relative after the code)
// and deterministic: same function and target, same bytes. `required_isa` is collected from the
// instructions that were really emitted.
//
// Thread-safe. Tested by emit_test, filetests/code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "jit/base/result.h"
#include "jit/base/target.h"
#include "jit/vir/vir.h"

namespace tilewright::jit {

// The ABI of every kernel: one pointer to 64-bit argument slots (pointers, counts, strides in
// bytes).
using KernelFunction = void (*)(const std::int64_t* args);

struct CodeObject {
  std::string name;
  std::vector<std::byte> bytes;
  std::size_t code_size = 0;  // where the instructions end; padding and constants follow
  IsaMask required_isa = 0;
  int spills = 0;             // registers that had no home; 0 in every kernel that matters
  int inner_loop_spills = 0;  // of these, how many are touched in an innermost loop: tests demand 0
};

Result<CodeObject> emit(const vir::Function& function, const Target& target);

}  // namespace tilewright::jit
