// VirCase: a VIR function with the memory that it works on, so that everything that can execute it
// (interpreter, machine code here, tests/python/avx512_machine.py) can be compared.
//
// The cases are made from op_list.def: each op with each element type, address form and immediate
// that matters. A new op gets its case without anybody writing one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "jit/vir/vir.h"

namespace tilewright::testing {

// Argument slots of every case.
enum VirCaseArg { kInput, kArea, kOutput, kVirCaseArgs };

struct VirCase {
  std::string name;
  jit::vir::Function function;
  bool float_result = false;     // the output holds floats: any NaN equals any NaN
  std::vector<std::byte> input;  // read only
  std::vector<std::byte> area;   // what memory operands address, to the last byte
  std::size_t output_size = 0;
};

// Memory after a run.
struct VirCaseResult {
  std::vector<std::byte> area, output;
};

// One case for each op x element type x form, `rounds` times with other data. Loops and ifs, too.
std::vector<VirCase> op_cases(int lanes, int rounds);

// A random program over `registers` registers of each kind, nested loops and ifs included, of ops
// whose results are exact for all bits. More registers than the machine has make it spill.
VirCase random_program(std::uint64_t seed, int lanes, int registers, int instructions);

VirCaseResult interpret_case(const VirCase& vir_case);
// "" or where the two differ.
std::string difference(const VirCase& vir_case, const VirCaseResult& expected,
                       const VirCaseResult& actual);

}  // namespace tilewright::testing
