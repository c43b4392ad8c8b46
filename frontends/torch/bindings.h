// The parts of tilewright._core, each in the file binding_<part>.cpp; binding.cpp calls all.
//
// With every converter of nanobind that a part needs: a type without one compiles, and fails when
// it is met.
//
// Tested by tests/python/test_backend.py.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/set.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

namespace tilewright {

void bind_kv_cache(nanobind::module_& module);
void bind_weights(nanobind::module_& module);
void bind_program(nanobind::module_& module);
void bind_engine(nanobind::module_& module);
void bind_ready_step(nanobind::module_& module);
void bind_cache_files(nanobind::module_& module);
void bind_snapshot(nanobind::module_& module);

}  // namespace tilewright
