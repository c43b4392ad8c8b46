// Layout: where a value lies, symbolically: a buffer, an offset and a stride per axis, in elements.
//
// View ops (reshape, permute, expand, slice) only compute a new Layout; whatever cannot be
// expressed as one is copied.
//
// Tested by layout_test.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "graph/graph.h"
#include "graph/type.h"

namespace tilewright::ops {

struct Layout {
  int buffer = -1;
  graph::Dim offset;
  graph::Shape shape;
  std::vector<graph::Dim> strides;
};

// Strides of a row-major tensor.
std::vector<graph::Dim> row_major(const graph::Shape& shape);
bool is_row_major(const Layout& layout);

// The layout of a view node's result. nullopt: only a copy can do it (a reshape across strides).
std::optional<Layout> view(const graph::Node& node, const graph::Type& result,
                           const Layout& source);

// The layout of `source` broadcast to `shape` (right-aligned, sizes of 1 repeat with stride 0).
Layout broadcast(const Layout& source, const graph::Shape& shape);

// One loop of a nest over several layouts: its size, and each layout's stride.
struct Loop {
  graph::Dim size;
  std::vector<graph::Dim> strides;
};
// The axes [0, axes) of layouts with equal shapes, merged wherever every layout allows it; loops of
// size 1 vanish.
std::vector<Loop> collapse(std::span<const Layout> layouts, std::size_t axes);

}  // namespace tilewright::ops
