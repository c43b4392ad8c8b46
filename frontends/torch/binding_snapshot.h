// Snapshot for Python: which of many dicts and lists hold other objects than they did. A model has
// some thousand of them, and every call asks.
//
// Not thread-safe: the interpreter lock and the Python side's own are enough. Tested by
// tests/python/test_module_state.py.
#pragma once

#include <nanobind/nanobind.h>

namespace tilewright {

void bind_snapshot(nanobind::module_& module);

}  // namespace tilewright
