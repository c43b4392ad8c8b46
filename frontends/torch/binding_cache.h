// The files of the kernel cache for Python: what `tilewright cache` and `tilewright prewarm` use.
//
// Thread-safe. Tested by tests/python/test_cache_commands.py.
#pragma once

#include <nanobind/nanobind.h>

#include "ops/engine.h"

namespace tilewright {

// The directory, its problem, counters, and the packs that TILEWRIGHT_CACHE_PACK names.
nanobind::dict cache_state(const ops::Engine& engine);

}  // namespace tilewright
