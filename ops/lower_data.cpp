// Lowering of data movement: embedding, cat, copies, arange; arithmetic on integers.
// Tested by program_test.
#include <fmt/format.h>

#include <map>

#include "ops/lowering.h"
#include "ops/rope_kernel.h"

namespace tilewright::ops {

using graph::DataType;
using graph::Dim;
using graph::Shape;
using graph::ValueId;

void Lowering::copy(const Layout& from, DataType from_type, const Layout& to, DataType to_type) {
  const CopyKernel spec{target_.lanes(), from_type, to_type};
  // A last axis that is not contiguous on both sides is walked as rows of one element.
  const bool columns =
      !from.shape.empty() && from.strides.back() == Dim(1) && to.strides.back() == Dim(1);
  const Layout layouts[] = {from, to};
  CopyTask task;
  task.x = operand(from, from_type);
  task.y = operand(to, to_type);
  task.columns = dim(columns ? from.shape.back() : Dim(1));
  for (const Loop& loop : collapse(layouts, from.shape.size() - (columns ? 1 : 0))) {
    task.loops.push_back({dim(loop.size), {dim(loop.strides[0]), dim(loop.strides[1])}});
  }
  const std::string specification = print(spec);
  task.kernel = kernels_->request(specification, [spec] { return build(spec); });
  add_task(std::move(task), {from.buffer}, {to.buffer}, Dim(0), specification);
}

Status Lowering::lower_embedding(const graph::Node& node) {
  const ValueId table = node.operands[0], indices = node.operands[1], result = node.results[0];
  const Shape& shape = type(table).shape;
  if (!shape[0].is_constant() || !shape[1].is_constant()) return Error{"its table is symbolic"};
  if (type(indices).dtype != DataType::i64) return Error{"its indices are not i64"};
  const CopyKernel spec{target_.lanes(), type(table).dtype, type(result).dtype};
  const Layout rows = contiguous(layout(table), type(table).dtype);
  const Layout positions = contiguous(layout(indices), DataType::i64);
  const Layout y = destination(result);
  if (!is_row_major(y)) return Error{"its result is not contiguous"};
  set_layout(result, y);
  EmbeddingTask task;
  task.rows = dim(graph::element_count(type(indices).shape));
  task.columns = shape[1].constant();
  task.table_rows = shape[0].constant();
  task.table = operand(rows, type(table).dtype);
  task.indices = operand(positions, DataType::i64);
  task.y = operand(y, type(result).dtype);
  const std::string specification = print_embedding(spec);
  task.kernel = kernels_->request(specification, [spec] { return build_embedding(spec); });
  add_task(std::move(task), {rows.buffer, positions.buffer}, {y.buffer}, Dim(0), specification);
  return {};
}

Status Lowering::lower_cat(const graph::Node& node) {
  const ValueId result = node.results[0];
  if (!layouts_[static_cast<std::size_t>(result)]) set_layout(result, destination(result));
  const Layout whole = layout(result);
  const auto axis = static_cast<std::size_t>(node.attribute<std::int64_t>("axis"));
  Layout part = whole;
  for (ValueId value : node.operands) {
    const graph::Type& part_type = type(value);
    part.shape = part_type.shape;
    const bool empty =
        part_type.shape.size() != whole.shape.size() || part_type.shape[axis] == Dim(0);
    if (empty) continue;  // ATen lets a 1-d empty tensor stand in a cat
    if (!forwarded_.contains(value)) {
      copy(layout(value), part_type.dtype, part, type(result).dtype);
    }
    part.offset = part.offset + part_type.shape[axis] * whole.strides[axis];
  }
  return {};
}

Status Lowering::lower_contiguous(const graph::Node& node) {
  const ValueId source = node.operands[0], result = node.results[0];
  set_layout(result, destination(result));
  copy(layout(source), type(source).dtype, layout(result), type(result).dtype);
  return {};
}

Status Lowering::lower_arange(const graph::Node& node) {
  const ValueId result = node.results[0];
  const Dim start = node.attribute<Shape>("start").front();
  const Layout y = destination(result);
  set_layout(result, y);
  add_task(ArangeTask{dim(start), dim(type(result).shape[0]), operand(y, DataType::i64)}, {},
           {y.buffer}, Dim(0), "arange");
  return {};
}

Status Lowering::lower_integers(const graph::Node& node) {
  using Binary = std::int64_t (*)(std::int64_t, std::int64_t);
  const std::map<graph::Op, Binary> known = {
      {graph::Op::add, [](std::int64_t a, std::int64_t b) { return a + b; }},
      {graph::Op::sub, [](std::int64_t a, std::int64_t b) { return a - b; }},
      {graph::Op::mul, [](std::int64_t a, std::int64_t b) { return a * b; }},
      {graph::Op::maximum, [](std::int64_t a, std::int64_t b) { return a < b ? b : a; }},
      {graph::Op::minimum, [](std::int64_t a, std::int64_t b) { return b < a ? b : a; }}};
  const auto found = known.find(node.op);
  const graph::Type& result = type(node.results[0]);
  if (found == known.end() || result.dtype != DataType::i64) return Error{"not integers"};
  for (const ValueId value : node.operands) {
    const graph::Type& operand_type = type(value);
    const bool fits =
        graph::element_count(operand_type.shape) == Dim(1) || operand_type.shape == result.shape;
    if (operand_type.dtype != DataType::i64 || !fits) return Error{"integers of different shapes"};
  }
  IntegerTask task;
  task.apply = found->second;
  task.count = dim(graph::element_count(result.shape));
  std::vector<int> reads;
  for (std::size_t i : {0u, 1u}) {
    const Layout x = contiguous(layout(node.operands[i]), DataType::i64);
    task.single[i] = graph::element_count(type(node.operands[i]).shape) == Dim(1);
    task.x[i] = operand(x, DataType::i64);
    reads.push_back(x.buffer);
  }
  const Layout y = destination(node.results[0]);
  if (!is_row_major(y)) return Error{"its result is not contiguous"};
  set_layout(node.results[0], y);
  task.y = operand(y, DataType::i64);
  add_task(task, reads, {y.buffer}, Dim(0), std::string(graph::name(node.op)));
  return {};
}

Status Lowering::lower_largest(const graph::Node& node) {
  const graph::Type& source = type(node.operands[0]);
  const graph::Type& result = type(node.results[0]);
  if (source.dtype == DataType::f64) return Error{"it is in f64"};
  TopTask task;
  task.rows = dim(graph::element_count({source.shape.begin(), source.shape.end() - 1}));
  task.columns = dim(source.shape.back());
  task.count = node.attribute<std::int64_t>("count");
  if (task.count > TopTask::most) return Error{"it asks for more than a router would"};
  task.indices = node.op == graph::Op::top_indices;
  task.dtype = source.dtype;
  const Layout x = contiguous(layout(node.operands[0]), source.dtype);
  const Layout y = destination(node.results[0]);
  if (!is_row_major(y)) return Error{"its result is not contiguous"};
  set_layout(node.results[0], y);
  task.x = operand(x, source.dtype);
  task.y = operand(y, result.dtype);
  add_task(task, {x.buffer}, {y.buffer}, Dim(0), std::string(graph::name(node.op)));
  return {};
}

}  // namespace tilewright::ops
