// Lowering of data movement: embedding, cat, copies, arange; arithmetic on integers.
// Tested by program_test.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>

#include "ops/lowering.h"
#include "ops/rope_kernel.h"

namespace tilewright::ops {

using graph::DataType;
using graph::Dim;
using graph::Op;
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
  task.loops = task_loops(layouts, from.shape.size() - (columns ? 1 : 0));
  const std::string specification = print(spec);
  task.kernel = kernels_->request(specification, [spec] { return build(spec); });
  add_task(std::move(task), {from.buffer}, {to.buffer}, Dim(0), specification);
}

bool Lowering::is_tied(const graph::Node& embedding) const {
  if (in_place_) return false;
  const std::vector<std::string> table = constant_sources(embedding.operands[0]);
  const graph::Type& whole = type(embedding.operands[0]);
  if (table.size() != 1 || !whole.shape[1].is_constant() || whole.dtype == DataType::f64 ||
      type(embedding.operands[1]).dtype != DataType::i64 || !disabled_reason(embedding).empty()) {
    return false;
  }
  const auto first = static_cast<std::size_t>(graph_.value(embedding.results[0]).producer);
  const auto later = std::span(graph_.nodes).subspan(first + 1);
  return std::ranges::any_of(later, [&](const graph::Node& node) {
    if (node.op != Op::linear || node.attribute_or("transposed", false)) return false;
    const std::vector<std::string> weight = constant_sources(node.operands[1]);
    return weight.size() == 1 && disabled_reason(node).empty() &&
           constants_.at(weight[0]).data == constants_.at(table[0]).data;
  });
}

// A tied head is in memory once: rows are looked up in its packed columns. That reads a cache line
// per value (of 16 bits: per two), where a table of its own would be as large as the head again.
Status Lowering::lower_packed_embedding(const graph::Node& node) {
  const ValueId table = node.operands[0], indices = node.operands[1], result = node.results[0];
  const std::string name = constant_sources(table).front();
  const DataType dtype = type(table).dtype;
  PackedEmbeddingTask task;
  task.columns = type(table).shape[1].constant();
  task.table_rows = type(table).shape[0].constant();
  task.dtype = dtype;
  const Layout positions = contiguous(layout(indices), DataType::i64);
  const Layout y = destination(result);
  if (!is_row_major(y)) return Error{"its result is not contiguous"};
  set_layout(result, y);
  task.rows = dim(graph::element_count(type(indices).shape));
  task.indices = operand(positions, DataType::i64);
  task.y = operand(y, dtype);
  add_task(std::move(task), {positions.buffer}, {y.buffer}, Dim(0), "embedding in a packed weight");
  lookups_.push_back(
      {constants_.at(name).data, state_->steps.size() - 1, state_->steps.back().tasks.size() - 1});
  return {};
}

void Lowering::serve_lookups(const void* table, const std::shared_ptr<const PackedWeight>& weight) {
  std::erase_if(lookups_, [&](const Lookup& lookup) {
    if (lookup.table != table) return false;
    Task& task = state_->steps[lookup.step].tasks[lookup.task];
    std::get<PackedEmbeddingTask>(task).weight = weight;
    return true;
  });
}

Status Lowering::lower_embedding(const graph::Node& node) {
  if (is_tied(node)) return lower_packed_embedding(node);
  const ValueId table = node.operands[0], indices = node.operands[1], result = node.results[0];
  const Shape& shape = type(table).shape;
  if (!shape[1].is_constant()) return Error{"its rows have a symbolic length"};
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
  task.table_rows = dim(shape[0]);
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
  using Number = std::int64_t;
  using Bits = std::uint64_t;  // what overflows wraps, as in PyTorch
  const std::map<Op, Number (*)(Number, Number)> known = {
      {Op::add, [](Number a, Number b) { return Number(Bits(a) + Bits(b)); }},
      {Op::sub, [](Number a, Number b) { return Number(Bits(a) - Bits(b)); }},
      {Op::mul, [](Number a, Number b) { return Number(Bits(a) * Bits(b)); }},
      {Op::maximum, [](Number a, Number b) { return std::max(a, b); }},
      {Op::minimum, [](Number a, Number b) { return std::min(a, b); }},
      {Op::neg, [](Number a, Number) { return Number(-Bits(a)); }},
      {Op::abs, [](Number a, Number) { return a < 0 ? Number(-Bits(a)) : a; }},
      {Op::convert, [](Number a, Number) { return a; }},
      {Op::eq, [](Number a, Number b) { return Number{a == b}; }},
      {Op::ne, [](Number a, Number b) { return Number{a != b}; }},
      {Op::lt, [](Number a, Number b) { return Number{a < b}; }},
      {Op::le, [](Number a, Number b) { return Number{a <= b}; }},
      {Op::gt, [](Number a, Number b) { return Number{a > b}; }},
      {Op::ge, [](Number a, Number b) { return Number{a >= b}; }}};
  const auto found = known.find(node.op);
  const graph::Type& result = type(node.results[0]);
  if (found == known.end()) return Error{"not of integers"};
  const bool converts = node.op == Op::convert, compares = result.dtype == DataType::boolean;
  const bool narrows = converts && graph::is_float(result.dtype) && result.dtype != DataType::f64;
  if (result.dtype != DataType::i64 && !compares && !narrows) {
    return Error{"integers become another type"};
  }
  IntegerTask task;
  task.apply = found->second;
  std::vector<std::optional<Layout>> sources;
  std::vector<int> reads;
  for (std::size_t i : {0u, 1u}) {
    const ValueId value = node.operands[std::min(i, node.operands.size() - 1)];
    const graph::Node* producer = graph_.producer(value);
    const DataType dtype = type(value).dtype;
    task.types[i] = dtype;
    if (producer != nullptr && producer->op == Op::scalar) {
      const double literal = producer->attribute<double>("value");
      // PyTorch compares with a float in f32.
      const double exact = graph::is_float(dtype) ? 0x1p24 : 0x1p53;
      if (literal != std::rint(literal) || std::abs(literal) > exact) {
        return Error{"a number beside integers that is none"};
      }
      task.literals[i] = static_cast<Number>(literal);
      sources.emplace_back();
      continue;
    }
    if (dtype != DataType::i64 && dtype != DataType::i32 && dtype != DataType::boolean) {
      return Error{"an operand is not of integers"};
    }
    sources.emplace_back(broadcast(layout(value), result.shape));
    reads.push_back(sources.back()->buffer);
  }
  const Layout y = destination(node.results[0]);
  set_layout(node.results[0], y);
  task.types[2] = result.dtype;
  std::vector<Layout> layouts;
  for (const std::optional<Layout>& source : sources) layouts.push_back(source.value_or(y));
  layouts.push_back(y);
  for (std::size_t i = 0; i < layouts.size(); ++i) {
    const bool literal = i < 2 && task.literals[i].has_value();
    task.operands.push_back(operand(layouts[i], literal ? result.dtype : task.types[i]));
  }
  task.loops = task_loops(layouts, result.shape.size());
  add_task(std::move(task), reads, {y.buffer}, Dim(0), std::string(graph::name(node.op)));
  return {};
}

Status Lowering::lower_gather(const graph::Node& node) {
  const graph::Type &source = type(node.operands[0]), &result = type(node.results[0]);
  const Layout x = contiguous(layout(node.operands[0]), source.dtype);
  const Layout indices = contiguous(layout(node.operands[1]), DataType::i64);
  const Layout y = destination(node.results[0]);
  if (!is_row_major(y)) return Error{"its result is not contiguous"};
  set_layout(node.results[0], y);
  GatherTask task;
  task.rows = dim(graph::element_count({result.shape.begin(), result.shape.end() - 1}));
  task.columns = dim(source.shape.back());
  task.count = dim(result.shape.back());
  task.x = operand(x, source.dtype);
  task.indices = operand(indices, DataType::i64);
  task.y = operand(y, result.dtype);
  add_task(task, {x.buffer, indices.buffer}, {y.buffer}, Dim(0), "gather");
  return {};
}

Status Lowering::lower_cumsum(const graph::Node& node) {
  const graph::Type& result = type(node.results[0]);
  const Layout x = contiguous(layout(node.operands[0]), DataType::i64);
  const Layout y = destination(node.results[0]);
  if (!is_row_major(y)) return Error{"its result is not contiguous"};
  set_layout(node.results[0], y);
  CumsumTask task;
  task.rows = dim(graph::element_count({result.shape.begin(), result.shape.end() - 1}));
  task.columns = dim(result.shape.back());
  task.x = operand(x, DataType::i64);
  task.y = operand(y, DataType::i64);
  add_task(task, {x.buffer}, {y.buffer}, Dim(0), "cumsum");
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
