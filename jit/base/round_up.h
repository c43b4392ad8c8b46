// Numbers of bytes, rows or keys in whole multiples.
//
// Tested by base_test.
#pragma once

#include <type_traits>

namespace tilewright {

// The smallest multiple of `multiple` that is at least `value`. REQUIRES: value >= 0, multiple > 0,
// and the sum of both fits
template <class Value, class Multiple>
constexpr std::common_type_t<Value, Multiple> round_up(Value value, Multiple multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace tilewright
