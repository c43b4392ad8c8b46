// Lowering to host calls: what has no kernel here, with its reason, goes to oneDNN or to the front
// end's fallback. Tested by program_test.
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string_view>
#include <type_traits>

#include "ops/lowering.h"
#include "ops/onednn_fallback.h"

namespace tilewright::ops {

using graph::DataType;
using graph::Dim;
using graph::Op;
using graph::OpClass;
using graph::Shape;
using graph::ValueId;

namespace {

std::string attributes_text(const graph::Node& node) {
  if (node.op == Op::external) return node.attribute_or<std::string>("arguments", "");
  return graph::print(node.attributes);
}

// What oneDNN's plans read: flags, numbers and names.
std::string attributes_json(const graph::Node& node) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [key, attribute] : node.attributes) {
    std::visit(
        [&json, &key = key](const auto& value) {
          if constexpr (std::is_constructible_v<nlohmann::json, decltype(value)>) json[key] = value;
        },
        attribute);
  }
  return json.dump();
}

}  // namespace

Status Lowering::lower_host(const graph::Node& node, const std::string& reason) {
  for (ValueId value : node.operands) {
    if (type(value).is_cache) {
      return Error{
          fmt::format("{} works on a cache and has no fallback: {}", graph::name(node.op), reason)};
    }
  }
  std::vector<Layout> outputs;
  std::vector<graph::Type> types;
  if (node.op == Op::index_copy) {  // in place
    set_layout(node.results[0], layout(node.operands[0]));
    outputs.push_back(layout(node.results[0]));
    types.push_back(type(node.results[0]));
  } else {
    for (ValueId value : node.results) {
      forwarded_.erase(value);  // a host call's results are contiguous: the consumer copies
      Layout y = destination(value);
      set_layout(value, y);
      outputs.push_back(y);
      types.push_back(type(value));
    }
  }
  return host_call(node, outputs, types, reason);
}

Status Lowering::host_call(const graph::Node& node, std::span<const Layout> outputs,
                           std::span<const graph::Type> types, const std::string& reason) {
  const std::string function = node.op == Op::external ? node.attribute<std::string>("function")
                                                       : std::string(graph::name(node.op));
  HostTask task{function, attributes_text(node), false, {}, {}};
  std::vector<int> reads, writes;
  bool one_type = true;
  for (ValueId value : node.operands) {
    const Layout source = contiguous(layout(value), type(value).dtype);
    one_type = one_type && type(value).dtype == types[0].dtype;
    HostTensor& tensor = task.inputs.emplace_back(
        HostTensor{operand(source, type(value).dtype), type(value).dtype, {}});
    for (const Dim& size : type(value).shape) tensor.shape.push_back(dim(size));
    reads.push_back(source.buffer);
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    HostTensor& tensor = task.outputs.emplace_back(
        HostTensor{operand(outputs[i], types[i].dtype), types[i].dtype, {}});
    for (const Dim& size : types[i].shape) tensor.shape.push_back(dim(size));
    writes.push_back(outputs[i].buffer);
  }
  if (options_.fallback_onednn && one_type &&
      onednn_supports(function, attributes_json(node), types[0].dtype)) {
    task.onednn = true;
    task.attributes = attributes_json(node);
  }
  const std::string name = task.onednn ? "onednn" : "host";
  add_task(std::move(task), reads, writes, work_of(graph_, node), name + " " + function);
  RegionReport& report = state_->regions.back();
  report.fallback = true;
  report.reason = reason;
  report.isa.clear();
  return {};
}

namespace {

// What an ATen op costs that torch computes: without its products, our share would look larger.
Dim work_of_external(const graph::Graph& graph, const graph::Node& node, const Dim& elements) {
  const auto& function = node.attribute<std::string>("function");
  const auto is = [&](std::string_view part) { return function.find(part) != std::string::npos; };
  const auto shape = [&](std::size_t i) -> const Shape& {
    return graph.type(node.operands[i]).shape;
  };
  const std::size_t first = is("addmm") || is("addbmm") || is("baddbmm") ? 1 : 0;
  const std::size_t count = node.operands.size();
  if (is("scaled_dot_product") && count > 1 && shape(1).size() > 1) {
    return Dim(4) * elements * shape(1)[shape(1).size() - 2];
  }
  if (is(".conv") && count > 1 && !shape(1).empty()) {
    return Dim(2) * elements * graph::element_count({shape(1).begin() + 1, shape(1).end()});
  }
  if ((is("mm.") || is("mm_") || is("matmul") || is(".linear")) && count > first &&
      !shape(first).empty()) {
    return Dim(2) * elements * shape(first).back();
  }
  return elements;
}

}  // namespace

Dim work_of(const graph::Graph& graph, const graph::Node& node) {
  const Dim elements = graph::element_count(graph.type(node.results[0]).shape);
  switch (node.op) {
    case Op::linear:
    case Op::expert_linear:
    case Op::matmul:
      return Dim(2) * elements * graph.type(node.operands[0]).shape.back();
    case Op::gated_mlp_up:
      return Dim(4) * elements * graph.type(node.operands[1]).shape[1];
    case Op::attention: {  // of a host call; the kernel's is counted from the keys of each query
      const graph::Type& keys = graph.type(node.operands[1]);
      return keys.is_cache ? Dim(0) : Dim(4) * elements * keys.shape[2];
    }
    case Op::external:
      return work_of_external(graph, node, elements);
    case Op::rope:
      return Dim(3) * elements;
    case Op::rms_norm:
    case Op::layer_norm:
    case Op::softmax:
      return Dim(4) * elements;
    default: {
      const OpClass kind = op_class(node.op);
      const bool arithmetic = kind == OpClass::elementwise || kind == OpClass::reduction;
      return arithmetic ? elements : Dim(0);
    }
  }
}

}  // namespace tilewright::ops
