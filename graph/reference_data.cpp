// References of sources, views and data movement: elements are copied bit by bit.
//
// Tested by interpret_test, filetests/run.
#include <fmt/format.h>
#include <numeric>
#include <vector>

#include <algorithm>
#include <cmath>

#include "graph/reference.h"

namespace tilewright::graph::reference {
namespace {

// result[at] = source[from(at)] for every element.
template <class From>
Status gather(Step& step, const Tensor& source, From from) {
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    Sizes at = coordinates(i, step.result.shape);
    step.result.copy(i, source, offset_of(from(at), source.shape));
  }
  return {};
}

Status copy_all(Step& step) {
  for (std::int64_t i = 0; i < step.result.count(); ++i) step.result.copy(i, step.tensor(0), i);
  return {};
}

std::size_t axis_of(const Step& step) {
  return static_cast<std::size_t>(step.node.attribute<std::int64_t>("axis"));
}

// Copies `parts` one after the other along `axis`; converts, because cat promotes.
Status concatenate(const std::vector<const Tensor*>& parts, std::size_t axis, Tensor& result) {
  Sizes expected = result.shape;
  expected[axis] = 0;
  for (const Tensor* part : parts) {
    Sizes shape = part->shape;
    if (axis < shape.size()) expected[axis] += std::exchange(shape[axis], expected[axis]);
    if (axis >= shape.size() || shape.size() != expected.size()) return Error{"ranks differ"};
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (i != axis && shape[i] != expected[i]) {
        return Error{fmt::format("sizes {} and {} on axis {}", expected[i], shape[i], i)};
      }
    }
  }
  if (expected != result.shape) return Error{"the parts do not add up"};
  std::int64_t begin = 0;
  for (const Tensor* part : parts) {
    for (std::int64_t i = 0; i < part->count(); ++i) {
      Sizes at = coordinates(i, part->shape);
      at[axis] += begin;
      std::int64_t to = offset_of(at, result.shape);
      if (is_float(result.dtype)) {
        result.set(to, part->get(i));
      } else {
        result.set_integer(to, part->get_integer(i));
      }
    }
    begin += part->shape[axis];
  }
  return {};
}

Status fill(Tensor& tensor, double value) {
  for (std::int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, value);
  return {};
}

}  // namespace

// Row major. The last axis has stride 1.
Sizes coordinates(std::int64_t offset, const Sizes& shape) {
  Sizes result(shape.size());
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    result[axis] = offset % shape[axis];
    offset /= shape[axis];
  }
  return result;
}

std::int64_t offset_of(const Sizes& coordinates, const Sizes& shape) {
  std::size_t skipped = coordinates.size() - shape.size();
  std::int64_t offset = 0;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    offset = offset * shape[axis] + (shape[axis] == 1 ? 0 : coordinates[skipped + axis]);
  }
  return offset;
}

Status constant(Step& step) {
  if (step.node.attributes.contains("value")) {
    return fill(step.result, step.node.attribute<double>("value"));
  }
  std::string_view source = step.node.attribute<std::string>("source");
  std::vector<const Tensor*> parts;
  bool joined = step.node.attributes.contains("axis");
  while (true) {
    std::string_view part = joined ? source.substr(0, source.find(';')) : source;
    auto found = step.constants.find(part);
    if (found == step.constants.end()) return Error{fmt::format("\"{}\" is not given", part)};
    if (found->second.dtype != step.result.dtype) {
      return Error{fmt::format("\"{}\" has another dtype", part)};
    }
    parts.push_back(&found->second);
    if (part.size() == source.size()) break;
    source.remove_prefix(part.size() + 1);
  }
  if (joined) {
    std::int64_t axis = step.node.attribute<std::int64_t>("axis");
    if (axis < 0 || static_cast<std::size_t>(axis) >= step.result.shape.size()) {
      return Error{"axis out of range"};
    }
    return concatenate(parts, static_cast<std::size_t>(axis), step.result);
  }
  if (parts[0]->shape != step.result.shape) {
    return Error{fmt::format("\"{}\" has another shape", source)};
  }
  step.result = *parts[0];
  return {};
}

Status scalar(Step& step) { return fill(step.result, step.node.attribute<double>("value")); }

Status arange(Step& step) {
  Result<std::int64_t> start = step.dim("start");
  if (!start) return start.error();
  for (std::int64_t i = 0; i < step.result.count(); ++i) step.result.set_integer(i, *start + i);
  return {};
}

Status reshape(Step& step) { return copy_all(step); }
Status contiguous(Step& step) { return copy_all(step); }

Status permute(Step& step) {
  const auto& order = step.node.attribute<std::vector<std::int64_t>>("order");
  return gather(step, step.tensor(0), [&](const Sizes& at) {
    Sizes from(at.size());
    for (std::size_t i = 0; i < order.size(); ++i) from[static_cast<std::size_t>(order[i])] = at[i];
    return from;
  });
}

Status expand(Step& step) {
  return gather(step, step.tensor(0), [](const Sizes& at) { return at; });
}

Status slice(Step& step) {
  Result<std::int64_t> start = step.dim("start"), end = step.dim("end");
  if (!start) return start.error();
  if (!end) return end.error();
  std::int64_t size = step.tensor(0).shape[axis_of(step)];
  if (*start < 0 || *start > *end || *end > size) {
    return Error{fmt::format("{} to {} of {}", *start, *end, size)};
  }
  std::int64_t stride = step.node.attribute_or<std::int64_t>("step", 1);
  return gather(step, step.tensor(0), [&](Sizes at) {
    std::int64_t& place = at[axis_of(step)];
    place = *start + place * stride;
    return at;
  });
}

Status embedding(Step& step) {
  const Tensor& table = step.tensor(0);
  std::int64_t columns = table.shape[1];
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    std::int64_t row = step.tensor(1).get_integer(i / columns);
    if (row < 0 || row >= table.shape[0]) {
      return Error{fmt::format("index {} of {} rows", row, table.shape[0])};
    }
    step.result.copy(i, table, row * columns + i % columns);
  }
  return {};
}

namespace {

// Calls found(row, rank, place) for the places of the largest of each row; the first of equals.
template <class Found>
void for_largest(const Step& step, Found found) {
  const Tensor& x = step.tensor(0);
  const std::int64_t columns = x.shape.back();
  const auto count = step.node.attribute<std::int64_t>("count");
  for (std::int64_t row = 0; columns > 0 && row < x.count() / columns; ++row) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(columns));
    std::iota(order.begin(), order.end(), row * columns);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      const double left = x.get(a), right = x.get(b);
      // NaN is above all numbers, as in ATen.
      return left > right || (std::isnan(left) && !std::isnan(right));
    });
    for (std::int64_t i = 0; i < count; ++i) {
      found(row * count + i, order[static_cast<std::size_t>(i)], row * columns);
    }
  }
}

}  // namespace

Status top_values(Step& step) {
  for_largest(step, [&](std::int64_t to, std::int64_t from, std::int64_t) {
    step.result.copy(to, step.tensor(0), from);
  });
  return {};
}

Status top_indices(Step& step) {
  for_largest(step, [&](std::int64_t to, std::int64_t from, std::int64_t begin) {
    step.result.set_integer(to, from - begin);
  });
  return {};
}

Status gather(Step& step) {
  const std::int64_t columns = step.tensor(0).shape.back(), count = step.result.shape.back();
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    const std::int64_t place = step.tensor(1).get_integer(i);
    if (place < 0 || place >= columns) {
      return Error{fmt::format("index {} of {} columns", place, columns)};
    }
    step.result.copy(i, step.tensor(0), i / count * columns + place);
  }
  return {};
}

Status cumsum(Step& step) {
  const Tensor& x = step.tensor(0);
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < x.count(); ++i) {
    if (i % x.shape.back() == 0) sum = 0;
    sum += x.get_integer(i);
    step.result.set_integer(i, sum);
  }
  return {};
}

Status cat(Step& step) {
  std::vector<const Tensor*> parts;
  for (std::size_t i = 0; i < step.operands.size(); ++i) parts.push_back(&step.tensor(i));
  return concatenate(parts, axis_of(step), step.result);
}

Status index_copy(Step& step) {
  const Tensor& indices = step.tensor(1);
  const Tensor& source = step.tensor(2);
  step.result = step.tensor(0);
  std::int64_t size = step.result.shape[axis_of(step)];
  for (std::int64_t i = 0; i < source.count(); ++i) {
    Sizes at = coordinates(i, source.shape);
    std::int64_t& place = at[axis_of(step)];
    place = indices.get_integer(place);
    if (place < 0 || place >= size) return Error{fmt::format("index {} of {}", place, size)};
    step.result.copy(offset_of(at, step.result.shape), source, i);
  }
  return {};
}

Status external(Step&) { return Error{"no reference"}; }

}  // namespace tilewright::graph::reference
