// Do the tensors and caches that a run is given fit what the program was compiled for? Nothing of
// the run has happened before they are known to.
//
// Tested by program_test.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "jit/base/result.h"
#include "ops/program_state.h"

namespace tilewright::ops {

// Values of the symbols from the shapes of the inputs: a dimension that is one symbol defines it.
// Error: another number, dtype or rank of inputs, or a symbol that none defines.
Result<std::vector<std::int64_t>> bind_symbols(const Program::State& state,
                                               std::span<const TensorView> inputs);

// dims: values of the program's dimensions, as the bound symbols give them, by DimIndex.
// Error: a dimension that is another.
Status check_shapes(const Program::State& state, std::span<const TensorView> inputs,
                    std::span<const std::int64_t> dims);

// Error: another number, shape or dtype of caches, or other sequences in one than the step's.
Status check_caches(const Program::State& state, std::span<KvCache* const> caches,
                    std::span<const std::int64_t> dims);

}  // namespace tilewright::ops
