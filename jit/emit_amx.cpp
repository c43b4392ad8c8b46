// Emission of the ops on tiles. All tiles have one shape, so that a function needs no other
// configuration than its first; who has fewer rows pads them.
//
// Tested by emit_test where the host has AMX, tests/python/test_avx512_machine.py anywhere,
// filetests/code.
#include <array>
#include <cstdint>
#include <span>

#include "jit/emission.h"

namespace tilewright::jit::emission {
namespace {

// ldtilecfg's 64 bytes: palette 1; each tile's bytes of a row from 16, its rows from 48.
Memory full_tiles(Assembler& as) {
  std::array<std::uint8_t, 64> configuration{};
  configuration[0] = 1;
  for (std::size_t tile = 0; tile < kTiles; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  return as.table(std::as_bytes(std::span(configuration)));
}

Memory rows(const Site& s) {
  Memory memory = s.memory;
  memory.index = s.g(0);
  return memory;
}

}  // namespace

void tsave(Site& s) { s.as.sttilecfg(s.memory); }
void tconfig(Site& s) { s.as.ldtilecfg(full_tiles(s.as)); }
// What was saved where nothing was configured is all zero, which ldtilecfg takes for a release.
void trestore(Site& s) { s.as.ldtilecfg(s.memory); }
void tzero(Site& s) { s.as.tilezero(s.td()); }
void tload(Site& s) { s.as.tileloadd(s.td(), rows(s)); }
void tstore(Site& s) { s.as.tilestored(rows(s), s.t(1)); }
void tdpbf16(Site& s) { s.as.tdpbf16ps(s.t(0), s.t(1), s.t(2)); }

}  // namespace tilewright::jit::emission
