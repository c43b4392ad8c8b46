// Lowering of products of two activations, batched.
//
// Tested by tests/python/test_backend.py (products of activations) and the campaign of models.
#include "ops/gemm/matmul_kernel.h"
#include "ops/lowering.h"

namespace tilewright::ops {

using graph::Dim;
using graph::Shape;

Status Lowering::lower_matmul(const graph::Node& node) {
  const graph::Type& left = type(node.operands[0]);
  const graph::Type& right = type(node.operands[1]);
  const graph::Type& result = type(node.results[0]);
  MatmulTask task;
  task.spec.lanes = target_.lanes();
  task.spec.input = left.dtype;
  task.spec.output = result.dtype;
  if (Status possible = supported(task.spec); !possible) return possible;

  const std::size_t rank = result.shape.size(), batch_axes = rank - 2;
  const auto spread = [&](const Layout& source) {
    Shape shape(result.shape.begin(), result.shape.end() - 2);
    shape.insert(shape.end(), source.shape.end() - 2, source.shape.end());
    return broadcast(source, shape);
  };
  const Layout x = spread(unit_columns(layout(node.operands[0]), left.dtype));
  // Keys lie transposed in front of their queries: read as they are.
  const Layout& given = layout(node.operands[1]);
  task.spec.transposed =
      given.strides.back() != Dim(1) && given.strides[given.strides.size() - 2] == Dim(1);
  const Layout w = spread(task.spec.transposed ? given : unit_columns(given, right.dtype));
  const Layout y = destination(node.results[0]);
  if (y.strides.back() != Dim(1) && y.shape.back() != Dim(1)) {
    return Error{"its result has no contiguous rows"};
  }
  set_layout(node.results[0], y);

  task.rows = dim(result.shape[rank - 2]);
  task.columns = dim(result.shape.back());
  task.depth = dim(left.shape.back());
  task.x = operand(x, left.dtype);
  task.w = operand(w, right.dtype);
  task.y = operand(y, result.dtype);
  task.x_stride = dim(x.strides[rank - 2]);
  task.w_stride = dim(w.strides[task.spec.transposed ? rank - 1 : rank - 2]);
  task.y_stride = dim(y.strides[rank - 2]);
  const Layout layouts[] = {x, w, y};
  task.batch = task_loops(layouts, batch_axes);
  const MatmulKernel spec = task.spec;
  const std::string specification = print(spec);
  task.kernel = kernels_->request(specification, [spec] { return build(spec); });
  add_task(std::move(task), {x.buffer, w.buffer}, {y.buffer}, work_of(graph_, node), specification);
  return {};
}

}  // namespace tilewright::ops
