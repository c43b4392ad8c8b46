// Linear scan: homes (a physical register or a stack slot) for a function's virtual registers.
//
// When no register is free, the register with the least weight (uses x 10^loop depth) goes to the
// stack for its whole life. A first attempt uses every register; only a class that had spills is
// tried again with its last registers set aside as scratch, to which spilled operands are loaded.
// Knows nothing of x86: the pools are numbers. Deterministic.
//
// Pure function. Tested by linear_scan_test.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "jit/vir/liveness.h"
#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

struct RegisterFile {
  std::vector<int> gpr;  // in order of preference; the arguments' pointer arrives in gpr[0]
  std::vector<int> vec;
  std::vector<int> mask;  // empty: masks take vectors (AVX2)
  std::vector<int> tile;
};

struct Home {
  int reg = -1;   // a number of the pool, or
  int slot = -1;  // an offset in the frame, in bytes
  bool spilled() const { return slot >= 0; }
  bool exists() const { return reg >= 0 || slot >= 0; }
};

// How many registers a class sets aside when it spills: what one instruction can need at once.
inline constexpr int kGprScratch = 2;  // base and index are combined before a third is loaded
inline constexpr int kVecScratch = 3;
inline constexpr int kMaskScratch = 2;

struct Allocation {
  std::array<std::vector<Home>, 4> homes;  // by kind and virtual number
  Home args;
  std::vector<int> temporaries;  // vector registers that instruction i may overwrite: 2 x i, + 1
  std::vector<int> gpr_scratch, vec_scratch, mask_scratch;  // empty unless the class spills
  std::vector<int> used_gprs;                               // sorted
  int frame_bytes = 0;
  int spills = 0, inner_loop_spills = 0;
  int tile_spills = 0;  // of the spills; no code can be made for these

  const Home& home(Reg reg) const {
    if (reg == kArgsPointer) return args;
    return homes[static_cast<std::size_t>(reg.kind)][static_cast<std::size_t>(reg.id)];
  }
  Home& home(Reg reg) { return const_cast<Home&>(std::as_const(*this).home(reg)); }
};

// `temporary_count[i]`: vector temporaries of instruction i, at most kTemporaries.
inline constexpr int kTemporaries = 2;
Allocation allocate(const Function& function, const RegisterFile& file,
                    std::span<const std::uint8_t> temporary_count);

}  // namespace tilewright::jit::vir
