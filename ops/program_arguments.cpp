// What a run is given: see program_arguments.h. Tested by program_test.
#include "ops/program_arguments.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace tilewright::ops {
namespace {

std::string print_shape(std::span<const std::int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

}  // namespace

Result<std::vector<std::int64_t>> bind_symbols(const Program::State& state,
                                               std::span<const TensorView> inputs) {
  if (inputs.size() != state.inputs.size()) {
    return Error{fmt::format("{} inputs given, {} expected", inputs.size(), state.inputs.size())};
  }
  const std::vector<std::string>& names = state.dims.symbols();
  std::vector<std::int64_t> values(names.size(), -1);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const TensorParameter& parameter = state.inputs[i];
    if (inputs[i].dtype != parameter.dtype) {
      return Error{fmt::format("input %{} has dtype {}, expected {}", parameter.name,
                               graph::name(inputs[i].dtype), graph::name(parameter.dtype))};
    }
    if (inputs[i].shape.size() != parameter.shape.size()) {
      return Error{fmt::format("input %{} has shape {}, expected {}", parameter.name,
                               print_shape(inputs[i].shape), graph::print(parameter.shape))};
    }
    for (std::size_t axis = 0; axis < parameter.shape.size(); ++axis) {
      const int symbol = state.dims.symbol_of(state.input_dims[i][axis]);
      if (symbol < 0) continue;
      std::int64_t& value = values[static_cast<std::size_t>(symbol)];
      if (value < 0) value = inputs[i].shape[axis];
    }
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0) return Error{fmt::format("no input defines the symbol {}", names[i])};
  }
  return values;
}

Status check_shapes(const Program::State& state, std::span<const TensorView> inputs,
                    std::span<const std::int64_t> dims) {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    for (std::size_t axis = 0; axis < inputs[i].shape.size(); ++axis) {
      if (inputs[i].shape[axis] != dims[static_cast<std::size_t>(state.input_dims[i][axis])]) {
        return Error{fmt::format("input %{} has shape {}, expected {}", state.inputs[i].name,
                                 print_shape(inputs[i].shape),
                                 graph::print(state.inputs[i].shape))};
      }
    }
  }
  return {};
}

Status check_caches(const Program::State& state, std::span<KvCache* const> caches,
                    std::span<const std::int64_t> dims) {
  if (caches.size() != state.caches.size()) {
    return Error{fmt::format("{} caches given, {} expected", caches.size(), state.caches.size())};
  }
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const CacheParameter& parameter = state.caches[i];
    const KvCache& cache = *caches[i];
    if (cache.kv_heads() != parameter.kv_heads || cache.head_dim() != parameter.head_dim ||
        cache.dtype() != parameter.dtype) {
      return Error{fmt::format("cache %{} is {} x {} of {}, expected {} x {} of {}", parameter.name,
                               cache.kv_heads(), cache.head_dim(), graph::name(cache.dtype()),
                               parameter.kv_heads, parameter.head_dim,
                               graph::name(parameter.dtype))};
    }
    if (!parameter.appended) continue;
    const std::int64_t batch = dims[static_cast<std::size_t>(parameter.batch)];
    const std::int64_t tokens = dims[static_cast<std::size_t>(parameter.tokens)];
    if (!cache.takes(batch, tokens)) {
      return Error{fmt::format("cache %{} holds {} sequences, the step is {} x {}", parameter.name,
                               cache.batch(), batch, tokens)};
    }
  }
  return {};
}

}  // namespace tilewright::ops
