// TensorView: memory that somebody else owns, with its element type and shape, at one moment of run
// time.
//
// The only form in which tensors cross into the core: front ends fill it from their own tensor
// class.
//
// Tested by program_test.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/type.h"

namespace tilewright::ops {

// Row-major and contiguous. data may be null when the tensor has no elements.
struct TensorView {
  void* data = nullptr;
  graph::DataType dtype = graph::DataType::f32;
  std::vector<std::int64_t> shape;
};

inline std::int64_t element_count(const TensorView& view) {
  std::int64_t count = 1;
  for (std::int64_t size : view.shape) count *= size;
  return count;
}

}  // namespace tilewright::ops
