// The inside of a Program, as compile() fills it and run() reads it.
//
// Tested by program_test.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ops/dim_table.h"
#include "ops/layout.h"
#include "ops/program.h"
#include "ops/scratch.h"
#include "ops/task.h"

namespace tilewright::ops {

using Clock = std::chrono::steady_clock;

struct Buffer {
  enum class Kind : std::uint8_t { input, constant, arena, output };
  Kind kind = Kind::arena;
  int index = 0;  // input, output: which
  void* constant = nullptr;
  DimIndex elements{};
  std::int64_t element_bytes = 4;
  int first_step = -1, last_step = -1;  // arena: lifetime
};

struct Step {
  std::vector<Task> tasks;  // independent of each other
  int region = -1;          // index into State::regions
  bool host = false;        // its one task is a HostTask
  bool attention = false;
  DimIndex work{};      // floating-point operations, but for attention (counted from the keys)
  double flops = 0;     // of the last run
  bool little = false;  // of the last run: one thread computes it (is_little)
};

struct TensorParameter {
  std::string name;
  graph::DataType dtype;
  graph::Shape shape;
};

struct CacheParameter {
  std::string name;
  graph::DataType dtype;
  std::int64_t kv_heads, head_dim;
  bool appended = false;
  DimIndex batch{}, tokens{};  // of its kv_append
};

struct TensorOutput {
  graph::DataType dtype;
  graph::Shape shape;
  std::vector<DimIndex> dims;
};

// Consecutive nodes and the steps that compute them.
struct LoweredRegion {
  std::size_t first_node, end_node, first_step, end_step;
};

struct Program::State {
  graph::Graph graph;
  std::shared_ptr<KernelLibrary> kernels;
  DimTable dims;
  std::vector<TensorParameter> inputs;
  std::vector<std::vector<DimIndex>> input_dims;
  std::vector<CacheParameter> caches;
  std::vector<TensorOutput> outputs;
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::vector<RegionReport> regions;
  std::vector<std::shared_ptr<const void>> keep_alive;  // constants that compile() made

  std::vector<std::string> packed_sources;  // constants whose own memory no step reads
  bool reads_in_place = false;

  // For who observes a run (region_check.h): where values lie, by ValueId.
  std::vector<LoweredRegion> lowered;
  std::vector<std::optional<Layout>> layouts;
  std::map<graph::ValueId, int> cache_of;

  // Of the last run.
  std::vector<std::int64_t> symbol_values;
  std::vector<std::int64_t> dim_values;
  bool prepared = false;       // what follows from them: kernels, arena, who is little and
  ScratchSizes scratch_sizes;  // of what needs as much for any lengths of the caches
  std::vector<std::int64_t> arena_sizes, arena_offsets;
  AlignedMemory arena{nullptr, nullptr};
  std::int64_t arena_capacity = 0;
  Scratch scratch;
  std::uint64_t turns = 0;  // of the steps that teams ran, in all runs
  PhaseCounters counters[2];
  bool profile = false;
  std::vector<Clock::time_point> marks;  // of a profiled run: before its first step, after each
  Clock::time_point last_end{};
};

// The names of what a constant joins (one, mostly).
std::vector<std::string> joined_constants(const graph::Node& node);

// Offsets for buffers with lifetimes [first_step, last_step] and sizes (bytes), reusing memory
// greedily, 64-byte aligned; returns the total. offsets.size() == sizes.size() afterwards.
std::int64_t plan_arena(std::span<const Buffer> buffers, std::span<const std::int64_t> sizes,
                        std::vector<std::int64_t>& offsets);

}  // namespace tilewright::ops
