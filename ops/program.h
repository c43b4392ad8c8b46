// Program: what runs. A list of steps with an arena plan; a step is a set of independent tasks
// (kernels with their argument slots and partition) or a host call, and a barrier follows each.
//
// compile() (compile.h) makes a Program from an optimised graph. A run binds symbols to the shapes
// of its inputs, plans the arena for them, and executes all consecutive kernel steps inside one
// parallel region of the OpenMP team that the process already has. Partitions decide who computes,
// never in which order numbers are added: results are the same for any number of threads.
//
// A Program is not thread-safe: one run at a time (the front end holds a lock). Kernels and packed
// weights are shared. Tested by program_test.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "jit/base/result.h"
#include "ops/kv_cache.h"
#include "ops/tensor_view.h"

namespace tilewright::ops {

// A node that we do not run ourselves: the front end computes outputs (allocated, shapes known)
// from inputs. `function` is the op's name ("rms_norm") or an external node's function
// ("aten.cumsum.default"); `attributes` is the node's attribute list in the text form of
// graph/print (external: its `arguments` string; oneDNN gets JSON).
struct HostCall {
  std::string function;
  std::string attributes;
  std::span<const TensorView> inputs;
  std::span<const TensorView> outputs;
};
using HostFunction = std::function<Status(const HostCall&)>;

enum class Phase : std::uint8_t { prefill, decode };

struct Frame;  // task.h
// Called before each step, and at the end with the number of steps; nothing runs meanwhile.
using StepObserver = std::function<void(std::size_t step, const Frame& frame)>;

struct RunArguments {
  std::span<const TensorView> inputs;   // the tensor parameters, in order
  std::span<KvCache* const> caches;     // the cache parameters, in order
  std::span<const TensorView> outputs;  // shapes as output_shapes() says
  const HostFunction* host = nullptr;   // may be null if the program has no host calls
  Phase phase = Phase::decode;          // for the counters only
  int threads = 1;
  const StepObserver* observer = nullptr;  // with one, each step is a parallel region of its own
};

// Counted while running.
struct PhaseCounters {
  // steps: those that all threads compute, so as many barriers.
  std::uint64_t runs = 0, steps = 0, fallback_calls = 0, onednn_calls = 0;
  // Those from the first attention to the last, and how many layers these are.
  std::uint64_t layer_steps = 0, layers = 0;
  int threads = 0;  // of the last run: the largest team
  double own_flops = 0, fallback_flops = 0;
  double own_seconds = 0, fallback_seconds = 0;
  // Only with TILEWRIGHT_VERBOSE=profile. Between the end of the program's last run and the
  // beginning of this, if that was less than a second: the caller's time; and in runs before and
  // after the steps.
  double between_seconds = 0, around_seconds = 0;
};

// A region's share of all runs of a phase, only with TILEWRIGHT_VERBOSE=profile: until its last
// thread is done, and the bytes of weights, keys and values that it read.
struct RegionTime {
  double seconds = 0, bytes = 0;
};

// One row of explain().
struct RegionReport {
  std::string name;    // "linear+residual", "rms_norm", "attention" ...
  std::string kernel;  // the kernel's key text, or the fallback's name
  bool fallback = false;
  std::string reason;  // why it is a fallback
  std::string isa;     // "avx2", "avx512", ...
  double flops = 0;    // of the last run
  std::uint64_t weight_bytes = 0;
  std::array<RegionTime, 2> time = {};  // by Phase
};

class Program {
 public:
  Program();
  ~Program();
  Program(Program&&) noexcept;
  Program& operator=(Program&&) noexcept;

  const graph::Graph& graph() const;  // parameters and outputs as given to compile()

  // Shapes of the outputs for these inputs. Error: a shape that does not fit the graph, and which.
  Result<std::vector<std::vector<std::int64_t>>> output_shapes(
      std::span<const TensorView> inputs) const;
  Status run(const RunArguments& arguments);
  // Makes every kernel that any run could need, also those for other numbers of rows than were met
  // so far: to fill the cache ahead of time. Executes nothing.
  Status prepare();

  const PhaseCounters& counters(Phase phase) const;
  std::vector<RegionReport> regions() const;
  // Constants that were packed and whose own memory no step reads: it may be given back.
  const std::vector<std::string>& packed_sources() const;
  // Whether it reads weights where their sources lie, because it was compiled to run once and that
  // gives the bits of packed ones: for the first step of a start, which packing would hold up.
  // Where it does, nothing is packed.
  bool reads_in_place() const;
  int layer_count() const;  // attention steps
  // So many tokens of a sequence in one step get the bits that each would get in a step of its own.
  std::int64_t alike_tokens() const;
  std::uint64_t arena_bytes() const;  // of the last run

  struct State;  // program_state.h
  explicit Program(std::unique_ptr<State> state);
  const State& state() const { return *state_; }  // for region_check

 private:
  std::unique_ptr<State> state_;
};

}  // namespace tilewright::ops
