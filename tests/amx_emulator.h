// AMX on a CPU without it: its instructions end in SIGILL there, and a handler computes what
// Intel's manual (SDM 2, TILELOADD, TDPBF16PS ...) says they do, with tiles of the thread's own. So
// what is emitted for AMX runs as it is, whole programs in several threads included, some thousand
// times slower.
//
// An instruction that would fault on a CPU with AMX (tiles that do not fit each other, none
// configured, another encoding) is left to what handled SIGILL before: the test crashes.
//
// Used by amx_program_test.
#pragma once

#include <cstdint>

namespace tilewright {

// While one lives; at most one at a time. Where the CPU has AMX it changes nothing.
class AmxEmulator {
 public:
  AmxEmulator();
  ~AmxEmulator();
  AmxEmulator(const AmxEmulator&) = delete;
  AmxEmulator& operator=(const AmxEmulator&) = delete;

  // Instructions computed so far, of all threads. 0 where the CPU has AMX.
  static std::uint64_t instructions();
  // Whether this thread has tiles configured: a kernel that returns leaves none, as it found them.
  static bool has_tiles();
};

}  // namespace tilewright
