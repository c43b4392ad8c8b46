// Layout: see layout.h. Tested by layout_test.
#include "ops/layout.h"

namespace tilewright::ops {
namespace {

using graph::Dim;
using graph::Shape;

const Dim one(1);
const Dim zero(0);

Layout permute(const Layout& source, const std::vector<std::int64_t>& order) {
  Layout result{source.buffer, source.offset, {}, {}};
  for (std::int64_t axis : order) {
    result.shape.push_back(source.shape[static_cast<std::size_t>(axis)]);
    result.strides.push_back(source.strides[static_cast<std::size_t>(axis)]);
  }
  return result;
}

Layout slice(const graph::Node& node, const graph::Type& type, const Layout& source) {
  Layout result = source;
  const auto axis = static_cast<std::size_t>(node.attribute<std::int64_t>("axis"));
  const Dim& start = node.attribute<Shape>("start").front();
  const std::int64_t step = node.attribute_or<std::int64_t>("step", 1);
  result.shape[axis] = type.shape[axis];
  result.offset = source.offset + start * source.strides[axis];
  result.strides[axis] = source.strides[axis] * Dim(step);
  return result;
}

// Splits the merged axes of `source` into `shape`, from the innermost outwards.
std::optional<Layout> reshape(const Layout& source, const Shape& shape) {
  Layout result{source.buffer, source.offset, shape, std::vector<Dim>(shape.size(), zero)};
  if (is_row_major(source)) {
    result.strides = row_major(shape);
    return result;
  }
  std::vector<Loop> groups = collapse(std::span(&source, 1), source.shape.size());
  std::size_t axis = shape.size();
  while (!groups.empty()) {
    Dim remaining = groups.back().size;
    Dim stride = groups.back().strides[0];
    while (!(remaining == one)) {
      if (axis == 0) return std::nullopt;
      axis -= 1;
      if (shape[axis] == one) continue;
      std::optional<Dim> quotient = remaining.divide_exactly(shape[axis]);
      if (!quotient) return std::nullopt;
      result.strides[axis] = stride;
      stride = stride * shape[axis];
      remaining = *quotient;
    }
    groups.pop_back();
  }
  while (axis > 0) {
    axis -= 1;
    if (!(shape[axis] == one)) return std::nullopt;
  }
  return result;
}

}  // namespace

std::vector<Dim> row_major(const Shape& shape) {
  std::vector<Dim> strides(shape.size(), one);
  for (std::size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

bool is_row_major(const Layout& layout) {
  Dim expected = one;
  for (std::size_t i = layout.shape.size(); i-- > 0;) {
    if (!(layout.shape[i] == one) && !(layout.strides[i] == expected)) return false;
    expected = expected * layout.shape[i];
  }
  return true;
}

std::optional<Layout> view(const graph::Node& node, const graph::Type& result,
                           const Layout& source) {
  switch (node.op) {
    case graph::Op::permute:
      return permute(source, node.attribute<std::vector<std::int64_t>>("order"));
    case graph::Op::expand:
      return broadcast(source, result.shape);
    case graph::Op::slice:
      return slice(node, result, source);
    case graph::Op::reshape:
      return reshape(source, result.shape);
    default:
      return std::nullopt;
  }
}

Layout broadcast(const Layout& source, const Shape& shape) {
  Layout result{source.buffer, source.offset, shape, std::vector<Dim>(shape.size(), zero)};
  const std::size_t added = shape.size() - source.shape.size();
  for (std::size_t i = 0; i < source.shape.size(); ++i) {
    const bool repeats = source.shape[i] == one && !(shape[added + i] == one);
    result.strides[added + i] = repeats ? zero : source.strides[i];
  }
  return result;
}

std::vector<Loop> collapse(std::span<const Layout> layouts, std::size_t axes) {
  std::vector<Loop> loops;
  for (std::size_t axis = 0; axis < axes; ++axis) {
    Loop loop{layouts[0].shape[axis], {}};
    if (loop.size == one) continue;
    for (const Layout& layout : layouts) loop.strides.push_back(layout.strides[axis]);
    bool merges = !loops.empty();
    for (std::size_t i = 0; merges && i < layouts.size(); ++i) {
      merges = loops.back().strides[i] == loop.strides[i] * loop.size;
    }
    if (merges) {
      loops.back().size = loops.back().size * loop.size;
      loops.back().strides = loop.strides;
    } else {
      loops.push_back(std::move(loop));
    }
  }
  return loops;
}

}  // namespace tilewright::ops
