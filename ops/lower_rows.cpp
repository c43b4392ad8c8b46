// Lowering of row regions: elementwise chains, reductions, norms and softmax become one row kernel.
// Tested by program_test.
#include <fmt/format.h>

#include <algorithm>

#include "ops/lowering.h"
#include "ops/row_kernel.h"

namespace tilewright::ops {

using graph::Dim;
using graph::Op;
using graph::Shape;
using graph::ValueId;

namespace {

RowInstruction instruction(const graph::Node& node, const graph::Type& result) {
  RowInstruction step{node.op, {}, 0, false, result.dtype};
  switch (node.op) {
    case Op::scalar:
      step.value = node.attribute<double>("value");
      break;
    case Op::pow:
      step.value = node.attribute<double>("exponent");
      break;
    case Op::rms_norm:
      step.value = node.attribute<double>("eps");
      step.flag = node.attribute_or("plus_one", false);
      break;
    case Op::layer_norm:
      step.value = node.attribute<double>("eps");
      break;
    case Op::gelu:
      step.flag = node.attribute_or<std::string>("approximate", "none") == "tanh";
      break;
    default:
      break;
  }
  return step;
}

// The common shape that all shapes broadcast to; an empty result means that they do not.
Shape broadcast_shape(const std::vector<Shape>& shapes) {
  std::size_t rank = 0;
  for (const Shape& shape : shapes) rank = std::max(rank, shape.size());
  Shape full(std::max<std::size_t>(rank, 1), Dim(1));
  for (const Shape& shape : shapes) {
    const std::size_t added = full.size() - shape.size();
    for (std::size_t i = 0; i < shape.size(); ++i) {
      Dim& size = full[added + i];
      if (shape[i] == Dim(1) || shape[i] == size) continue;
      if (!(size == Dim(1))) return {};
      size = shape[i];
    }
  }
  return full;
}

}  // namespace

Status Lowering::lower_rows(std::span<const graph::NodeId> ids) {
  std::vector<const graph::Node*> nodes;
  std::map<ValueId, int> indices;  // of region values, then of inputs
  std::vector<ValueId> inputs, scalars;
  std::vector<Shape> shapes;
  for (graph::NodeId id : ids) {
    const graph::Node& node = graph_.nodes[static_cast<std::size_t>(id)];
    nodes.push_back(&node);
    indices[node.results[0]] = -1;
    shapes.push_back(type(node.results[0]).shape);
  }
  for (const graph::Node* node : nodes) {
    for (ValueId value : node->operands) {
      if (indices.contains(value)) continue;
      const graph::Node* producer = graph_.producer(value);
      const bool scalar = producer != nullptr && producer->op == Op::scalar;
      indices[value] = -1;
      (scalar ? scalars : inputs).push_back(value);
      shapes.push_back(type(value).shape);
    }
  }
  const Shape full = broadcast_shape(shapes);
  if (full.empty()) return Error{"its operands have no common shape"};
  const Dim columns = full.back();

  RowKernel spec;
  spec.lanes = target_.lanes();
  if (columns.is_constant()) spec.columns = columns.constant();
  int next = 0;
  std::vector<Layout> layouts;
  for (ValueId value : inputs) {
    indices[value] = next++;
    const Shape& shape = type(value).shape;
    const bool repeats = shape.empty() || shape.back() == Dim(1);
    Layout source = layout(value);
    if (source.buffer < 0) return Error{fmt::format("%{} has no memory", graph_.value(value).name)};
    if (!repeats) source = unit_columns(source, type(value).dtype);
    layouts.push_back(broadcast(source, full));
    const bool one_element = repeats || layouts.back().strides.back() == Dim(0);
    spec.inputs.push_back(
        {type(value).dtype, one_element ? ColumnAccess::broadcast : ColumnAccess::contiguous});
  }
  for (ValueId value : scalars) {
    indices[value] = next++;
    spec.body.push_back(instruction(*graph_.producer(value), type(value)));
  }
  for (const graph::Node* node : nodes) {
    RowInstruction step = instruction(*node, type(node->results[0]));
    for (ValueId value : node->operands) step.operands.push_back(indices[value]);
    indices[node->results[0]] = next++;
    spec.body.push_back(std::move(step));
  }

  std::vector<ValueId> outputs;
  for (const graph::Node* node : nodes) {
    const ValueId value = node->results[0];
    bool outside = graph_.is_output(value);
    for (graph::NodeId user : graph_.users(value)) {
      outside = outside || std::find(ids.begin(), ids.end(), user) == ids.end();
    }
    if (!outside) continue;
    const Shape& shape = type(value).shape;
    const bool reduced = !shape.empty() && shape.back() == Dim(1) && !(columns == Dim(1));
    Shape expected = full;
    if (reduced) expected.back() = Dim(1);
    const std::size_t missing = full.size() - shape.size();
    for (std::size_t i = 0; i < full.size(); ++i) {
      const Dim size = i < missing ? Dim(1) : shape[i - missing];
      if (!(size == expected[i])) return Error{"its results have different shapes"};
    }
    spec.outputs.push_back(indices[value]);
    spec.output_operands.push_back(
        {type(value).dtype, reduced ? ColumnAccess::broadcast : ColumnAccess::contiguous});
    outputs.push_back(value);
  }
  if (Status possible = supported(spec); !possible) return possible;

  std::vector<int> reads, writes;
  for (const Layout& source : layouts) reads.push_back(source.buffer);
  RowTask task;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    task.operands.push_back(operand(layouts[i], type(inputs[i]).dtype));
  }
  for (ValueId value : outputs) {
    set_layout(value, destination(value));
    layouts.push_back(broadcast(layout(value), full));
    task.operands.push_back(operand(layouts.back(), type(value).dtype));
    writes.push_back(layouts.back().buffer);
  }
  task.loops = task_loops(layouts, full.size() - 1);
  task.columns = dim(columns);
  const std::string specification = print(spec);
  task.kernel = kernels_->request(specification, [spec] { return build(spec); });
  Dim work(0);
  for (const graph::Node* node : nodes) work = work + work_of(graph_, *node);
  add_task(std::move(task), reads, writes, work, specification);
  return {};
}

}  // namespace tilewright::ops
