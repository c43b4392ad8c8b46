// How fast this machine reads memory: what decode is measured against (TILEWRIGHT_VERBOSE=profile).
//
// perf/roof is the thorough form; this one takes a quarter of a second and needs no other program.
//
// Tested by threads_test.
#pragma once

namespace tilewright::ops {

// Bytes per second that `threads` threads read together from 256 MB, the best of a few passes.
// 0: no memory for it.
double read_bandwidth(int threads);

}  // namespace tilewright::ops
