// Type rules of sources, views and data movement.
//
// Sizes that only run time knows (slice bounds, lengths of caches under different symbols) are
// accepted unless they are certainly wrong.
//
// Tested by graph_test, filetests/verify.
#include <algorithm>
#include <numeric>

#include "graph/type_rules.h"

namespace tilewright::graph::type_rules {
namespace {

bool certainly_negative(const Dim& dim) { return dim.is_constant() && dim.constant() < 0; }

// An attribute that holds one dim.
Result<Dim> single(const Arguments& a, std::string_view key) {
  const Shape& dims = a.attribute<Shape>(key);
  if (dims.size() != 1) return error("'{}' must have one element", key);
  return dims.front();
}

Result<std::size_t> axis(const Arguments& a) {
  std::int64_t axis = a.attribute<std::int64_t>("axis");
  auto rank = static_cast<std::int64_t>(a.shape(0).size());
  if (axis < 0 || axis >= rank) return error("axis {} of a tensor of rank {}", axis, rank);
  return static_cast<std::size_t>(axis);
}

Error stated(const Arguments& a) {
  return error("the type of {} is stated, not inferred", name(a.op));
}

}  // namespace

Result<Type> constant(const Arguments& a) { return stated(a); }
Result<Type> external(const Arguments& a) { return stated(a); }

Result<Type> scalar(const Arguments& a) {
  return tensor(a.attribute_or<DataType>("dtype", DataType::f32), {});
}

Result<Type> arange(const Arguments& a) {
  Result<Dim> start = single(a, "start"), end = single(a, "end");
  if (!start) return start.error();
  if (!end) return end.error();
  Dim count = *end - *start;
  if (certainly_negative(count)) return error("arange ends before it starts");
  return tensor(DataType::i64, {count});
}

Result<Type> reshape(const Arguments& a) {
  const Shape& shape = a.attribute<Shape>("shape");
  if (std::any_of(shape.begin(), shape.end(), certainly_negative)) {
    return error("negative dimension in {}", print(shape));
  }
  Dim from = element_count(a.shape(0)), to = element_count(shape);
  if (from != to) {
    return error("reshape of {} to {}: {} elements are not {}", print(a.shape(0)), print(shape),
                 from.print(), to.print());
  }
  return tensor(a.operand(0).dtype, shape);
}

Result<Type> permute(const Arguments& a) {
  const auto& order = a.attribute<std::vector<std::int64_t>>("order");
  std::vector<std::int64_t> axes(a.shape(0).size());
  std::iota(axes.begin(), axes.end(), 0);
  if (!std::is_permutation(order.begin(), order.end(), axes.begin(), axes.end())) {
    return error("order is not a permutation of {} axes", axes.size());
  }
  Shape shape;
  for (std::int64_t axis : order) shape.push_back(a.shape(0)[static_cast<std::size_t>(axis)]);
  return tensor(a.operand(0).dtype, std::move(shape));
}

Result<Type> expand(const Arguments& a) {
  const Shape& shape = a.attribute<Shape>("shape");
  if (!broadcasts_to(a.shape(0), shape)) {
    return error("{} does not expand to {}", print(a.shape(0)), print(shape));
  }
  return tensor(a.operand(0).dtype, shape);
}

Result<Type> slice(const Arguments& a) {
  Result<std::size_t> place = axis(a);
  if (!place) return place.error();
  Result<Dim> start = single(a, "start"), end = single(a, "end");
  if (!start) return start.error();
  if (!end) return end.error();
  std::int64_t step = a.attribute_or<std::int64_t>("step", 1);
  if (step < 1) return error("step must be positive");
  Shape shape = a.shape(0);
  Dim& dim = shape[*place];
  Dim length = *end - *start;
  if (certainly_negative(*start) || certainly_negative(length) || certainly_negative(dim - *end)) {
    return error("slice {} to {} of {}", start->print(), end->print(), dim.print());
  }
  if (step == 1) {
    dim = length;
  } else if (length.is_constant()) {
    dim = (length.constant() - 1) / step + 1 - (length.constant() == 0);
  } else if (auto quotient = length.divide_exactly(step)) {
    dim = *quotient;
  } else {
    return error("{} elements with step {} have no count", length.print(), step);
  }
  return tensor(a.operand(0).dtype, std::move(shape));
}

Result<Type> embedding(const Arguments& a) {
  if (a.shape(0).size() != 2) return error("embedding needs a table of rank 2");
  DataType index = a.operand(1).dtype;
  if (index != DataType::i64 && index != DataType::i32) {
    return error("embedding needs integer indices, found {}", print(a.operand(1)));
  }
  Shape shape = a.shape(1);
  shape.push_back(a.shape(0)[1]);
  return tensor(a.operand(0).dtype, std::move(shape));
}

namespace {

Result<Type> largest(const Arguments& a, DataType dtype) {
  Shape shape = a.shape(0);
  const auto count = a.attribute<std::int64_t>("count");
  if (shape.empty() || a.operand(0).dtype == DataType::boolean || count < 1 ||
      (shape.back().is_constant() && count > shape.back().constant())) {
    return error("the {} largest of {}", count, print(a.operand(0)));
  }
  shape.back() = count;
  return tensor(dtype, std::move(shape));
}

}  // namespace

Result<Type> top_values(const Arguments& a) { return largest(a, a.operand(0).dtype); }
Result<Type> top_indices(const Arguments& a) { return largest(a, DataType::i64); }

Result<Type> gather(const Arguments& a) {
  Shape rows = a.shape(0), places = a.shape(1);
  if (a.operand(1).dtype != DataType::i64 || rows.empty() || rows.size() != places.size()) {
    return error("gather of {} from {}", print(a.operand(1)), print(a.operand(0)));
  }
  for (std::size_t i = 0; i + 1 < rows.size(); ++i) {
    if (!may_be_equal(rows[i], places[i])) {
      return error("gather of {} from {}", print(places), print(rows));
    }
  }
  return tensor(a.operand(0).dtype, std::move(places));
}

Result<Type> cumsum(const Arguments& a) {
  if (a.operand(0).dtype != DataType::i64 || a.shape(0).empty()) {
    return error("cumsum of {}", print(a.operand(0)));
  }
  return tensor(DataType::i64, a.shape(0));
}

Result<Type> cat(const Arguments& a) {
  Result<std::size_t> place = axis(a);
  if (!place) return place.error();
  Shape shape = a.shape(0);
  DataType dtype = a.operand(0).dtype;
  for (const Type& operand : a.operands.subspan(1)) {
    if (operand.shape.size() != shape.size()) return error("cat of different ranks");
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (i == *place || may_be_equal(shape[i], operand.shape[i])) continue;
      return error("cat of {} and {} along axis {}", print(a.shape(0)), print(operand.shape),
                   *place);
    }
    shape[*place] = shape[*place] + operand.shape[*place];
    dtype = promote(dtype, operand.dtype);
  }
  return tensor(dtype, std::move(shape));
}

Result<Type> contiguous(const Arguments& a) { return tensor(a.operand(0).dtype, a.shape(0)); }

Result<Type> index_copy(const Arguments& a) {
  Result<std::size_t> place = axis(a);
  if (!place) return place.error();
  if (a.operand(1).dtype != DataType::i64 || a.shape(1).size() != 1) {
    return error("index_copy needs a vector of i64 indices, found {}", print(a.operand(1)));
  }
  if (a.operand(2).dtype != a.operand(0).dtype) {
    return error("index_copy of {} into {}", print(a.operand(2)), print(a.operand(0)));
  }
  Shape expected = a.shape(0);
  expected[*place] = a.shape(1)[0];
  if (a.shape(2) != expected) {
    return error("index_copy needs a source of shape {}, found {}", print(expected),
                 print(a.shape(2)));
  }
  return tensor(a.operand(0).dtype, a.shape(0));
}

}  // namespace tilewright::graph::type_rules
