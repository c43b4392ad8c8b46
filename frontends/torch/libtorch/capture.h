// Capture: runs a frozen TorchScript graph once, op by op through LibTorch, and writes it down as
// graph text (graph_writer.h, nodes.h) for exactly these shapes and types.
//
// Whatever does not depend on the inputs is computed now and becomes a constant. Control flow may
// depend on shapes, never on values. An op without a word in the IR becomes an `external` node that
// the program hands back to LibTorch. Not taken at all, with the reason: ops that write to a
// tensor, random ones, values read out of tensors.
//
// Tested by torchscript_test.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <string>
#include <vector>

#include "jit/base/result.h"

namespace tilewright::libtorch {

// An op that stays with LibTorch: its arguments, of which some are given by the program.
struct HostNode {
  const torch::jit::Node* node = nullptr;
  std::vector<c10::IValue> arguments;
  std::vector<std::size_t> given;  // positions, in the order of the external node's operands

  at::Tensor run(const std::vector<at::Tensor>& inputs) const;
};

struct Captured {
  std::string text;
  std::map<std::string, at::Tensor> constants;
  std::map<std::string, HostNode> host;  // by the external node's function
  std::vector<at::Tensor> results;       // of this very run
};

// graph: frozen and inlined; its first input is the module, the others are tensors. It must outlive
// the result. inputs: in order.
Result<Captured> capture(const torch::jit::Graph& graph, const std::vector<at::Tensor>& inputs);

}  // namespace tilewright::libtorch
