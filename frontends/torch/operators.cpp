// torch.ops.tilewright: what torch's dispatcher, profiler, export and fake tensors see of a
// program.
//
// Built against torch's stable ABI only (TORCH_TARGET_VERSION makes any other header an error), so
// that one binary serves torch 2.10 and newer. No part of the core is linked in: see step_call.h.
//
// Tested by tests/python/test_operators.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "frontends/torch/step_call.h"

namespace tilewright {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

StepFunction step_function = nullptr;

ScalarType scalar_type(std::string_view name) {
  if (name == "f32") return ScalarType::Float;
  if (name == "bf16") return ScalarType::BFloat16;
  if (name == "f16") return ScalarType::Half;
  if (name == "f64") return ScalarType::Double;
  if (name == "i64") return ScalarType::Long;
  if (name == "i32") return ScalarType::Int;
  if (name == "i16") return ScalarType::Short;
  if (name == "i8") return ScalarType::Char;
  if (name == "u8") return ScalarType::Byte;
  STD_TORCH_CHECK(name == "bool", "tilewright::step: an output of an unknown dtype");
  return ScalarType::Bool;
}

void* allocate(void* context, std::int64_t, const char* dtype, const std::int64_t* sizes,
               std::int64_t rank) {
  auto& outputs = *static_cast<std::vector<Tensor>*>(context);
  outputs.push_back(
      torch::stable::empty({sizes, static_cast<std::size_t>(rank)}, scalar_type(dtype)));
  return outputs.back().mutable_data_ptr();
}

// sizes: inputs beyond the tensors that only carry a number, as tensors [number, 0].
std::vector<Tensor> step(std::int64_t program, std::vector<Tensor> inputs,
                         std::vector<std::int64_t> sizes, std::vector<std::int64_t> caches,
                         bool decode, std::int64_t threads) {
  STD_TORCH_CHECK(step_function != nullptr, "tilewright::step: import tilewright first");
  std::vector<StepTensor> tensors;
  tensors.reserve(inputs.size() + sizes.size());
  for (const Tensor& input : inputs) {
    STD_TORCH_CHECK(input.is_cpu(), "tilewright::step takes tensors in the CPU's memory");
    STD_TORCH_CHECK(input.is_contiguous(), "tilewright::step takes row-major tensors");
    tensors.push_back({input.mutable_data_ptr(), input.sizes().data(), input.dim()});
  }
  std::vector<std::array<std::int64_t, 2>> shapes;
  shapes.reserve(sizes.size());
  for (std::int64_t size : sizes) {
    shapes.push_back({size, 0});
    tensors.push_back({nullptr, shapes.back().data(), 2});
  }
  std::vector<Tensor> outputs;
  const StepCall call = {program,
                         tensors.data(),
                         static_cast<std::int64_t>(tensors.size()),
                         caches.data(),
                         static_cast<std::int64_t>(caches.size()),
                         threads,
                         decode,
                         allocate,
                         &outputs};
  std::array<char, 4096> error{};
  STD_TORCH_CHECK(step_function(&call, error.data(), error.size()), error.data());
  return outputs;
}

}  // namespace
}  // namespace tilewright

STABLE_TORCH_LIBRARY(tilewright, library) {
  library.def(
      "step(int program, Tensor[] inputs, int[] sizes, int[] caches, bool decode, int threads) -> "
      "Tensor[]");
}

// For all backends: a program may take no tensor at all, and then there is none to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(tilewright, CompositeExplicitAutograd, library) {
  library.impl("step", TORCH_BOX(&tilewright::step));
}

// Called once by operators.py after it has loaded this library.
extern "C" __attribute__((visibility("default"))) void tilewright_connect(
    tilewright::StepFunction function) {
  tilewright::step_function = function;
}
