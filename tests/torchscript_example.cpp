// A C++ program with a TorchScript model, as its user would write it.
//
//   torchscript_example model.pt batch tokens vocabulary
//
// loads a decoder (token ids to logits), optimises it, runs it, and prints how much of it ran in
// our code and how far its result is from LibTorch's.
#include <torch/script.h>

#include <cstdlib>
#include <iostream>

#include "frontends/torch/libtorch/optimize.h"

int main(int count, char** arguments) {
  if (count != 5) {
    std::cerr << "usage: torchscript_example model.pt batch tokens vocabulary\n";
    return 2;
  }
  torch::jit::Module model = torch::jit::load(arguments[1]);
  model.eval();
  const c10::InferenceMode inference;
  const at::Tensor tokens = at::randint(
      std::atoll(arguments[4]), {std::atoll(arguments[2]), std::atoll(arguments[3])}, at::kLong);
  const at::Tensor expected = model.forward({tokens}).toTensor();

  const tilewright::Status status = tilewright::optimize(model);
  if (!status) {
    std::cerr << "not optimised: " << status.error().message << '\n';
    return 1;
  }
  model.forward({tokens});  // the first call with these shapes captures and compiles
  const at::Tensor logits = model.forward({tokens}).toTensor();

  const tilewright::ModuleReport report = tilewright::explain(model).value();
  std::cout << "runs " << report.runs << "\nown_flops_share " << report.own_flops_share
            << "\nfallback_calls " << report.fallback_calls << "\nlargest_difference "
            << (logits - expected).abs().max().item().toDouble() << '\n';
  return report.runs == 1 ? 0 : 1;
}
