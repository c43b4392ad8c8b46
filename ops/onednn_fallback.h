// oneDNN as the second opinion and the fallback: linear, matmul, softmax and norms of
// host calls.
//
// The library (oneDNN 3.2 of the PyPI package onednn-cpu-gomp, or any 3.x) is opened at run time,
// so that nothing depends on it; without it, onednn_status() says so and the front end's fallback
// (ATen) is used. It runs on the same libgomp as everything else.
//
// Thread-safe. Tested by onednn_test.
#pragma once

#include <string_view>

#include "graph/type.h"
#include "jit/base/result.h"
#include "ops/program.h"

namespace tilewright::ops {

// Opens the library: `path` (may be empty), then the default search. Later calls return the first
// result.
Status load_onednn(std::string_view path);
Status onednn_status();

// Whether run_onednn() can do this function ("linear", "matmul", "softmax", "layer_norm",
// "rms_norm") with all operands of dtype. False when the library is not loaded. attributes as in
// HostCall: JSON.
bool onednn_supports(std::string_view function, std::string_view attributes, graph::DataType dtype);
Status run_onednn(const HostCall& call);

}  // namespace tilewright::ops
