// The CPU's feature words as a value, and the pure function from them to an ISA mask, so that every
// kind of CPU can be tested on any machine.
//
// Tested by base_test (words of real and of broken CPUs).
#pragma once

#include <cstdint>

#include "jit/base/target.h"

namespace tilewright {

// What CPUID and XGETBV say; all zero is a CPU without any of it.
struct CpuFeatureWords {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0;  // leaf 7, subleaf 0
  std::uint32_t leaf7_1_eax = 0;                              // leaf 7, subleaf 1
  std::uint64_t xcr0 = 0;      // register states that the operating system saves; 0 without OSXSAVE
  bool amx_permitted = false;  // the kernel granted this process the use of AMX tiles
};

// 0 when the floor (AVX2 + FMA + F16C + BMI1/2, saved by the system) is not there. A step counts
// only when the steps it rests on are there too: code for avx512_bf16 may use all of avx512.
IsaMask isa_from(const CpuFeatureWords& words);

}  // namespace tilewright
