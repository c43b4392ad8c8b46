// tilewright::optimize() for C++ programs: a TorchScript module whose forward runs in our kernels.
//
//   torch::jit::Module model = torch::jit::load("model.pt");
//   model.eval();
//   tilewright::Status status = tilewright::optimize(model);   // or: why not; model is as it was
//   model.forward({tokens});
//
// Weights are frozen into the module as they are now, and packed besides: memory is about twice the
// weights. Each new combination of input shapes and types costs one forward through LibTorch, whose
// result is returned, and compilation; the last kMostPrograms of them are kept. A combination that
// cannot be captured runs through LibTorch. Forward runs without gradients. The module cannot be
// saved again: keep the file that it came from.
//
// forward() of the result is thread-safe: calls of one module wait for one another. optimize() is
// not, for one module. Tested by torchscript_test and tests/python/test_libtorch_example.py.
#pragma once

#include <torch/script.h>

#include <cstdint>
#include <string>

#include "jit/base/result.h"

namespace tilewright {

inline constexpr int kMostPrograms = 32;  // of one module, at a time

// REQUIRES: model.eval(), tensors for inputs, a tensor or a tuple of tensors for a result, all on
// the CPU. Error: the reason; `model` is unchanged.
Status optimize(torch::jit::Module& model);

// What an optimised module did so far.
struct ModuleReport {
  std::uint64_t programs = 0;        // combinations of shapes that were compiled
  std::uint64_t runs = 0;            // forwards in our programs
  std::uint64_t captures = 0;        // forwards through LibTorch, to capture, or refused
  std::uint64_t fallback_calls = 0;  // ops that our programs left to LibTorch
  double own_flops_share = 0;        // of the programs' runs
  std::string reason;                // the last refusal, "" if there was none
  std::string graph;                 // the text of the newest program, after the passes
};

// Error: the module was not optimised.
Result<ModuleReport> explain(const torch::jit::Module& model);

}  // namespace tilewright
