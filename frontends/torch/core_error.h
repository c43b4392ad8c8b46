// CoreError: an error of the core as an exception, which nanobind makes tilewright._core.CoreError.
//
// Tested by tests/python/test_backend.py.
#pragma once

#include <stdexcept>
#include <utility>

#include "jit/base/result.h"

namespace tilewright {

struct CoreError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T>
T value_or_throw(Result<T> result) {
  if (!result) throw CoreError(result.error().message);
  return std::move(result.value());
}

inline void check(const Status& status) {
  if (!status) throw CoreError(status.error().message);
}

}  // namespace tilewright
