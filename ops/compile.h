// compile: an optimised graph (passes have run, regions are formed) to a Program.
//
// Each region becomes one step: storage and strides of its values are decided, its kernels are
// chosen by target and shape, taken from the kernel library (cache or emission), and its weights
// are packed. A region that has no kernel, or whose op the user disabled, becomes host calls with
// the reason; nothing is silently wrong and nothing refuses to compile merely because it is
// unknown.
//
// Tested by program_test, filetests/run.
#pragma once

#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "graph/graph.h"
#include "jit/base/env.h"
#include "jit/base/result.h"
#include "jit/base/target.h"
#include "ops/choices.h"
#include "ops/kept_weights.h"
#include "ops/kernel_library.h"
#include "ops/program.h"
#include "ops/weights.h"

namespace tilewright::ops {

struct CompileOptions {
  // Of twelve_bits_from.
  static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
  Choices choices;
  std::set<std::string>
      disabled;  // names of ops that must not run in our kernels ("linear", "norm" ...)
  bool exact_weights = true;  // fp32 weights whose values fit 16 bits are stored in 16 bits
  std::shared_ptr<KeptWeights> kept_weights = nullptr;  // null: all are packed
  bool keep_weights = false;                            // write those that are packed
  bool in_place = false;         // the program will run once: see Program::reads_in_place()
  bool fallback_onednn = false;  // try oneDNN before the front end's fallback
  bool profile = false;          // measure each step (RegionTime)
};

// constants: every `const` source named by the graph; the memory must stay valid and unchanged
// while the program lives, unless it was packed (weights of contractions are read only here).
// packed: called meanwhile, may be empty.
Result<Program> compile(const graph::Graph& graph,
                        const std::map<std::string, TensorView>& constants, const Target& target,
                        const CompileOptions& options, std::shared_ptr<KernelLibrary> kernels,
                        std::shared_ptr<WeightStore> weights, const PackedCallback& packed = {});

}  // namespace tilewright::ops
