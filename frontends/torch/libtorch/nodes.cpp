// See nodes.h. Tested by torchscript_test.
#include "frontends/torch/libtorch/nodes.h"

#include <ATen/WrapDimUtils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace tilewright::libtorch {
namespace {

using Arguments = std::vector<c10::IValue>;

// One call being written.
struct Call {
  GraphWriter& writer;
  const Arguments& arguments;
  const at::Tensor& result;

  const c10::IValue& operator[](std::size_t i) const {
    static const c10::IValue none;
    return i < arguments.size() ? arguments[i] : none;
  }
  bool has(std::size_t i) const { return !(*this)[i].isNone(); }
  at::Tensor tensor(std::size_t i) const { return (*this)[i].toTensor(); }
  at::ScalarType dtype() const { return result.scalar_type(); }

  // Argument i, a tensor or a number, as what an op of `dtype` reads.
  std::string operand(std::size_t i, at::ScalarType dtype) const {
    const c10::IValue& value = (*this)[i];
    if (value.isTensor()) return writer.operand(value.toTensor(), dtype);
    return writer.literal(value.toScalar().toDouble(), dtype);
  }
  std::string operand(std::size_t i) const { return writer.operand(tensor(i)); }

  bool emit(const std::string& op, const std::vector<std::string>& operands,
            const std::string& attributes = "") const {
    writer.bind(result, writer.append(op, operands, attributes, result.sizes(), dtype()));
    return true;
  }
  bool alias(const std::string& value) const {
    writer.bind(result, value);
    return true;
  }
  bool is_last_axis(const c10::IValue& axis, std::size_t of) const {
    if (axis.isIntList() && axis.toIntVector().size() != 1) return false;
    const std::int64_t value = axis.isIntList() ? axis.toIntVector()[0] : axis.toInt();
    const std::int64_t rank = tensor(of).dim();
    return rank > 0 && at::maybe_wrap_dim(value, rank) == rank - 1;
  }
};

using Write = bool (*)(const Call&, const char* op);

bool unary(const Call& call, const char* op) {
  return call.emit(op, {call.operand(0, call.dtype())});
}

bool binary(const Call& call, const char* op) {
  return call.emit(op, {call.operand(0, call.dtype()), call.operand(1, call.dtype())});
}

// add and sub have a factor of their second operand.
bool scaled_binary(const Call& call, const char* op) {
  if (call.has(2) && call[2].toScalar().toDouble() != 1.0) return false;
  return binary(call, op);
}

bool reversed_sub(const Call& call, const char* op) {
  if (call.has(2) && call[2].toScalar().toDouble() != 1.0) return false;
  return call.emit(op, {call.operand(1, call.dtype()), call.operand(0, call.dtype())});
}

bool division(const Call& call, const char* op) { return !call.has(2) && binary(call, op); }

bool comparison(const Call& call, const char* op) {
  const at::ScalarType common = call[1].isTensor()
                                    ? at::result_type(call.tensor(0), call.tensor(1))
                                    : at::result_type(call.tensor(0), call[1].toScalar());
  return call.emit(op, {call.operand(0, common), call.operand(1, common)});
}

bool power(const Call& call, const char* op) {
  if (!call[0].isTensor() || !call[1].isScalar()) return false;
  const double exponent = call[1].toScalar().toDouble();
  const std::array known{2.0, 3.0, 0.5, -0.5, -1.0};
  if (std::find(known.begin(), known.end(), exponent) == known.end()) return false;
  return call.emit(op, {call.operand(0, call.dtype())}, "exponent = " + number_text(exponent));
}

bool gelu(const Call& call, const char* op) {
  const std::string kind = call.has(1) ? call[1].toStringRef() : "none";
  return call.emit(op, {call.operand(0)}, kind == "none" ? "" : "approximate = \"" + kind + "\"");
}

bool convert(const Call& call, const char*) { return call.alias(call.operand(0, call.dtype())); }

// Nothing writes a tensor of the graph, so a copy is as good as the tensor.
bool same(const Call& call, const char*) { return call.alias(call.operand(0)); }

bool dropout(const Call& call, const char* op) { return !call[2].toBool() && same(call, op); }

bool reshape(const Call& call, const char*) {
  if (call.dtype() != call.tensor(0).scalar_type()) return false;  // view(dtype): other bits
  return call.alias(call.writer.reshape(call.operand(0), call.tensor(0).sizes(),
                                        call.result.sizes(), call.dtype()));
}

bool expand(const Call& call, const char* op) {
  const at::Tensor x = call.tensor(0);
  std::vector<std::int64_t> shape(static_cast<std::size_t>(call.result.dim() - x.dim()), 1);
  shape.insert(shape.end(), x.sizes().begin(), x.sizes().end());
  const std::string value = call.writer.reshape(call.operand(0), x.sizes(), shape, call.dtype());
  return call.emit(op, {value}, "shape = " + list_text(call.result.sizes()));
}

bool permute_to(const Call& call, const std::vector<std::int64_t>& order) {
  return call.emit("permute", {call.operand(0)}, "order = " + list_text(order));
}

bool permute(const Call& call, const char*) {
  std::vector<std::int64_t> order = call[1].toIntVector();
  for (std::int64_t& axis : order) axis = at::maybe_wrap_dim(axis, call.tensor(0).dim());
  return permute_to(call, order);
}

bool swap_axes(const Call& call, std::int64_t first, std::int64_t second) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(call.tensor(0).dim()));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
  std::swap(order.at(static_cast<std::size_t>(first)), order.at(static_cast<std::size_t>(second)));
  return permute_to(call, order);
}

bool transpose(const Call& call, const char*) {
  const std::int64_t rank = call.tensor(0).dim();
  if (rank == 0) return false;
  return swap_axes(call, at::maybe_wrap_dim(call[1].toInt(), rank),
                   at::maybe_wrap_dim(call[2].toInt(), rank));
}

bool matrix_transpose(const Call& call, const char*) {
  return call.tensor(0).dim() == 2 && swap_axes(call, 0, 1);
}

std::string slice_of(GraphWriter& writer, const at::Tensor& x, std::int64_t axis,
                     std::int64_t start, std::int64_t end, std::int64_t step) {
  const std::int64_t size = x.size(axis);
  start = std::clamp<std::int64_t>(start < 0 ? start + size : start, 0, size);
  end = std::clamp<std::int64_t>(end < 0 ? end + size : end, start, size);
  if (start == 0 && end == size && step == 1) return writer.operand(x);
  std::vector<std::int64_t> shape = x.sizes().vec();
  shape[static_cast<std::size_t>(axis)] = (end - start + step - 1) / step;
  std::string attributes = "axis = " + std::to_string(axis) + ", end = " + list_text({end}) +
                           ", start = " + list_text({start});
  if (step != 1) attributes += ", step = " + std::to_string(step);
  return writer.append("slice", {writer.operand(x)}, attributes, shape, x.scalar_type());
}

bool slice(const Call& call, const char*) {
  const at::Tensor x = call.tensor(0);
  const std::int64_t axis = at::maybe_wrap_dim(call[1].toInt(), x.dim());
  const std::int64_t start = call.has(2) ? call[2].toInt() : 0;
  const std::int64_t end = call.has(3) ? call[3].toInt() : x.size(axis);
  return call.alias(slice_of(call.writer, x, axis, start, end, call[4].toInt()));
}

bool select(const Call& call, const char*) {
  const at::Tensor x = call.tensor(0);
  const std::int64_t axis = at::maybe_wrap_dim(call[1].toInt(), x.dim());
  const std::int64_t index = at::maybe_wrap_dim(call[2].toInt(), x.size(axis));
  std::vector<std::int64_t> shape = x.sizes().vec();
  shape[static_cast<std::size_t>(axis)] = 1;
  const std::string part = slice_of(call.writer, x, axis, index, index + 1, 1);
  return call.alias(call.writer.reshape(part, shape, call.result.sizes(), call.dtype()));
}

bool cat(const Call& call, const char* op) {
  std::vector<std::string> operands;
  for (const at::Tensor& part : call[0].toTensorVector()) {
    if (part.dim() != call.result.dim()) return false;  // ATen skips empty tensors of rank 1
    operands.push_back(call.writer.operand(part, call.dtype()));
  }
  const std::int64_t axis = at::maybe_wrap_dim(call[1].toInt(), call.result.dim());
  return call.emit(op, operands, "axis = " + std::to_string(axis));
}

bool reduction(const Call& call, const char* op) {
  if (!call.has(1) || !call[1].isIntList() || !call.is_last_axis(call[1], 0)) return false;
  std::vector<std::int64_t> kept = call.tensor(0).sizes().vec();
  kept.back() = 1;
  const std::string value =
      call.writer.append(op, {call.operand(0, call.dtype())}, "", kept, call.dtype());
  return call.alias(call.writer.reshape(value, kept, call.result.sizes(), call.dtype()));
}

bool softmax(const Call& call, const char* op) {
  return call.is_last_axis(call[1], 0) && unary(call, op);
}

bool norm(const Call& call, const char* op) {
  const bool centered = std::string_view(op) == "layer_norm";
  const std::size_t epsilon = centered ? 4 : 3;
  if (call[1].toIntVector().size() != 1 || !call.has(epsilon)) return false;
  if (centered && !call.has(2) && call.has(3)) return false;
  std::vector<std::string> operands{call.operand(0)};
  for (std::size_t i = 2; i < epsilon; ++i) {
    if (call.has(i)) operands.push_back(call.operand(i));
  }
  return call.emit(op, operands, "eps = " + number_text(call[epsilon].toDouble()));
}

bool linear(const Call& call, const char* op) {
  if (call.tensor(1).dim() != 2) return false;
  std::vector<std::string> operands{call.operand(0), call.operand(1)};
  if (call.has(2)) operands.push_back(call.operand(2));
  return call.emit(op, operands, call.has(2) ? "bias = true" : "");
}

bool matmul(const Call& call, const char* op) {
  if (call.tensor(0).dim() < 2 || call.tensor(1).dim() < 2) return false;
  return call.emit(op, {call.operand(0), call.operand(1)});
}

bool embedding(const Call& call, const char* op) {
  return call.emit(op, {call.operand(0), call.operand(1)});
}

// (query, key, value, mask, dropout, is_causal, scale, enable_gqa)
bool attention(const Call& call, const char* op) {
  const at::Tensor q = call.tensor(0);
  if (q.dim() != 4 || call[4].toDouble() != 0.0) return false;
  const double scale =
      call.has(6) ? call[6].toDouble() : 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  std::vector<std::string> operands{call.operand(0), call.operand(1), call.operand(2)};
  if (call.has(3)) operands.push_back(call.operand(3));
  const std::string causal = call[5].toBool() ? "true" : "false";
  return call.emit(op, operands, "causal = " + causal + ", scale = " + number_text(scale));
}

bool where(const Call& call, const char* op) {
  if (call.arguments.size() != 3) return false;
  return call.emit(op,
                   {call.operand(0), call.operand(1, call.dtype()), call.operand(2, call.dtype())});
}

bool masked_fill(const Call& call, const char*) {
  return call.emit("where", {call.operand(1), call.operand(2, call.dtype()), call.operand(0)});
}

struct Row {
  Write write;
  const char* op;
};

const std::unordered_map<std::string, Row>& rows() {
  static const auto& table = *new std::unordered_map<std::string, Row>{
      {"aten::add", {scaled_binary, "add"}},
      {"aten::sub", {scaled_binary, "sub"}},
      {"aten::rsub", {reversed_sub, "sub"}},
      {"aten::mul", {binary, "mul"}},
      {"aten::div", {division, "div"}},
      {"aten::maximum", {binary, "maximum"}},
      {"aten::minimum", {binary, "minimum"}},
      {"aten::pow", {power, "pow"}},
      {"aten::neg", {unary, "neg"}},
      {"aten::abs", {unary, "abs"}},
      {"aten::reciprocal", {unary, "reciprocal"}},
      {"aten::sqrt", {unary, "sqrt"}},
      {"aten::rsqrt", {unary, "rsqrt"}},
      {"aten::exp", {unary, "exp"}},
      {"aten::expm1", {unary, "expm1"}},
      {"aten::log", {unary, "log"}},
      {"aten::log1p", {unary, "log1p"}},
      {"aten::sin", {unary, "sin"}},
      {"aten::cos", {unary, "cos"}},
      {"aten::tanh", {unary, "tanh"}},
      {"aten::erf", {unary, "erf"}},
      {"aten::sigmoid", {unary, "sigmoid"}},
      {"aten::silu", {unary, "silu"}},
      {"aten::relu", {unary, "relu"}},
      {"aten::gelu", {gelu, "gelu"}},
      {"aten::logical_not", {unary, "logical_not"}},
      {"aten::logical_and", {binary, "logical_and"}},
      {"aten::logical_or", {binary, "logical_or"}},
      {"aten::eq", {comparison, "eq"}},
      {"aten::ne", {comparison, "ne"}},
      {"aten::lt", {comparison, "lt"}},
      {"aten::le", {comparison, "le"}},
      {"aten::gt", {comparison, "gt"}},
      {"aten::ge", {comparison, "ge"}},
      {"aten::where", {where, "where"}},
      {"aten::masked_fill", {masked_fill, "where"}},
      {"aten::to", {convert, "convert"}},
      {"aten::type_as", {convert, "convert"}},
      {"aten::contiguous", {same, ""}},
      {"aten::clone", {same, ""}},
      {"aten::detach", {same, ""}},
      {"aten::alias", {same, ""}},
      {"aten::dropout", {dropout, ""}},
      {"aten::view", {reshape, "reshape"}},
      {"aten::view_as", {reshape, "reshape"}},
      {"aten::reshape", {reshape, "reshape"}},
      {"aten::reshape_as", {reshape, "reshape"}},
      {"aten::flatten", {reshape, "reshape"}},
      {"aten::unflatten", {reshape, "reshape"}},
      {"aten::squeeze", {reshape, "reshape"}},
      {"aten::unsqueeze", {reshape, "reshape"}},
      {"aten::expand", {expand, "expand"}},
      {"aten::expand_as", {expand, "expand"}},
      {"aten::permute", {permute, "permute"}},
      {"aten::transpose", {transpose, "permute"}},
      {"aten::t", {matrix_transpose, "permute"}},
      {"aten::slice", {slice, "slice"}},
      {"aten::select", {select, "slice"}},
      {"aten::cat", {cat, "cat"}},
      {"aten::sum", {reduction, "sum"}},
      {"aten::mean", {reduction, "mean"}},
      {"aten::amax", {reduction, "amax"}},
      {"aten::softmax", {softmax, "softmax"}},
      {"aten::layer_norm", {norm, "layer_norm"}},
      {"aten::rms_norm", {norm, "rms_norm"}},
      {"aten::linear", {linear, "linear"}},
      {"aten::matmul", {matmul, "matmul"}},
      {"aten::bmm", {matmul, "matmul"}},
      {"aten::embedding", {embedding, "embedding"}},
      {"aten::scaled_dot_product_attention", {attention, "attention"}},
  };
  return table;
}

}  // namespace

bool write_node(GraphWriter& writer, const std::string& op, const Arguments& arguments,
                const at::Tensor& result) {
  const auto row = rows().find(op);
  if (row == rows().end()) return false;
  dtype_name(result.scalar_type());  // refuses before anything is written
  return row->second.write({writer, arguments, result}, row->second.op);
}

bool write_parts(GraphWriter& writer, const std::string& op, const Arguments& arguments,
                 const std::vector<at::Tensor>& results) {
  if (op != "aten::chunk" && op != "aten::split" && op != "aten::split_with_sizes") return false;
  const at::Tensor x = arguments.at(0).toTensor();
  const std::int64_t axis = at::maybe_wrap_dim(arguments.at(2).toInt(), x.dim());
  std::int64_t start = 0;
  for (const at::Tensor& part : results) {
    const std::int64_t end = start + part.size(axis);
    writer.bind(part, slice_of(writer, x, axis, start, end, 1));
    start = end;
  }
  return true;
}

bool is_metadata(const std::string& op) {
  static const auto& ops = *new std::unordered_set<std::string>{
      "aten::size",  "aten::dim",    "aten::len",     "aten::numel",     "aten::is_floating_point",
      "prim::dtype", "prim::device", "prim::is_cuda", "aten::__isnot__", "aten::__is__"};
  return ops.contains(op);
}

}  // namespace tilewright::libtorch
