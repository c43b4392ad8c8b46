// Nodes: one row per ATen op that the graph IR has a word for. An op is said from its arguments and
// from the result that LibTorch computed: its shape and type need no rules here.
//
// Tested by torchscript_test.
#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

#include "frontends/torch/libtorch/graph_writer.h"

namespace tilewright::libtorch {

// Writes `op` ("aten::linear") with its arguments, in the order of its schema, and binds `result`.
// False: the IR has no word for it, with these arguments; nothing was written.
bool write_node(GraphWriter& writer, const std::string& op,
                const std::vector<c10::IValue>& arguments, const at::Tensor& result);

// For ops with several results (chunk, split, unbind): all of them are parts of the first argument.
bool write_parts(GraphWriter& writer, const std::string& op,
                 const std::vector<c10::IValue>& arguments, const std::vector<at::Tensor>& results);

// Whether an op tells about a tensor what its shape and type say already ("aten::size").
bool is_metadata(const std::string& op);

}  // namespace tilewright::libtorch
