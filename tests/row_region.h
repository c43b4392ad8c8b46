// Row regions for tests: operands in guarded memory, random regions, and the check of one run
// against the error bounds.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "guarded_rows.h"
#include "jit/vir/vir.h"
#include "kernel_run.h"
#include "ops/row_kernel.h"

namespace tilewright {

using Random = std::mt19937;

// Rounds what it writes to what the type holds; booleans are value > 0.
using Fill = std::function<double(Random&)>;
double standard_normal(Random& random);

struct RegionData {
  RegionData(ops::RowKernel kernel, std::int64_t row_count, std::int64_t column_count,
             Random& random, const Fill& fill = standard_normal);

  // The same inputs, other outputs.
  std::vector<std::int64_t> args_of_reference() const;

  ops::RowKernel spec;
  std::int64_t rows, columns;
  std::vector<std::unique_ptr<GuardedRows>> operands;    // inputs, then outputs
  std::vector<std::unique_ptr<GuardedRows>> references;  // outputs
  std::vector<std::int64_t> args;
};

// Returns what the kernel broke (its ABI, its emission), or "".
std::string run_engine(Engine engine, const jit::vir::Function& function, const std::int64_t* args);

// Builds, runs and compares kernel and reference with the bounds of tests/error_bound.h. `checked`
// counts the elements that had a finite bound. Returns what is wrong, or "".
std::string check_region(RegionData& data, Engine engine, std::int64_t* checked = nullptr);

// 1-10 ops over 1-4 inputs of random types; supported() holds.
ops::RowKernel random_region(Random& random, int lanes);

}  // namespace tilewright
