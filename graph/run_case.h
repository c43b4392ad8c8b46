// RunCase: what a graph is run on, written in comments beside it, for filetests and `twc run`.
//
//   ; input %x = f32[2, 3] {1, 2, 3, 4, 5, 6}      of a cache: its contents, [2, b, heads, t, d]
//   ; const "layer.weight" = f32[3, 3] random(1)
//   ; symbol past = 0
//   ; tolerance 1e-5                               relative above 1, absolute below; default 1e-6
//   ; output f32[2, 3] {...}                       one per result, in order
//
// Tested by filetests/run.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "graph/interpret.h"

namespace tilewright::graph {

struct RunCase {
  std::vector<Argument> arguments;  // by parameter
  Constants constants;
  SymbolValues symbols;
  double tolerance = 1e-6;
  std::vector<Tensor> outputs;  // as expected; may be empty
};

// Every tensor parameter needs an input; a cache without one is empty. The error begins with
// "line N: ".
Result<RunCase> parse_run_case(const Graph& graph, std::string_view text);

// Why `actual` is not `expected` within the tolerance; ok if it is.
Status compare(const Tensor& actual, const Tensor& expected, double tolerance);

}  // namespace tilewright::graph
