// Program: see program.h. Tested by program_test.
#include "ops/program.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "ops/attention_task.h"
#include "ops/gemm/arithmetic.h"
#include "ops/greedy_search.h"
#include "ops/linear_task.h"
#include "ops/onednn_fallback.h"
#include "ops/program_arguments.h"
#include "ops/program_state.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

using State = Program::State;

double seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

Status reserve_caches(const State& state, std::span<KvCache* const> caches,
                      std::span<const std::int64_t> dims) {
  for (std::size_t i = 0; i < caches.size(); ++i) {
    if (!state.caches[i].appended) continue;
    Status reserved = caches[i]->reserve(dims[static_cast<std::size_t>(state.caches[i].tokens)]);
    if (!reserved) return reserved;
  }
  return {};
}

void request_kernel(State& state, const LinearTask& linear, LinearTask::Variant& variant) {
  LinearKernel spec = linear.spec;
  spec.rows = variant.rows;
  spec.rest = variant.rest;
  spec.prefetch = variant.prefetch;
  spec.streams = variant.streams;
  spec.many_blocks = &variant == &linear.many;
  if (variant.tiles) spec.arithmetic = linear.tiles->arithmetic;
  variant.kernel = state.kernels->request(print(spec), [spec] { return build(spec); });
}

// Calls visit(linear) for each linear layer.
template <class Visit>
void for_linears(State& state, Visit&& visit) {
  for (Step& step : state.steps) {
    for (Task& task : step.tasks) {
      if (auto* linear = std::get_if<LinearTask>(&task)) visit(*linear);
    }
  }
}

// Who asks next must ask again, and fail again, rather than call a kernel that is not there.
Status make_requested_kernels(State& state) {
  Status made = state.kernels->flush();
  if (made) return made;
  for_linears(state, [](LinearTask& linear) {
    for_all_variants(linear, [](LinearTask::Variant& variant) {
      if (variant.kernel != nullptr && variant.kernel->function == nullptr)
        variant.kernel = nullptr;
    });
  });
  return made;
}

// Linear kernels exist per block of rows and are made when a run first needs them.
Status ensure_kernels(State& state, std::span<const std::int64_t> dims) {
  bool missing = false;
  for_linears(state, [&](LinearTask& linear) {
    const std::int64_t rows = dims[static_cast<std::size_t>(linear.rows)];
    for_needed_variants(linear, rows, [&](LinearTask::Variant& variant) {
      if (variant.kernel != nullptr) return;
      request_kernel(state, linear, variant);
      missing = true;
    });
  });
  return missing ? make_requested_kernels(state) : Status();
}

Status prepare_arena(State& state, std::span<const std::int64_t> dims) {
  std::vector<std::int64_t> sizes(state.buffers.size(), 0);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const Buffer& buffer = state.buffers[i];
    if (buffer.kind == Buffer::Kind::arena) {
      sizes[i] = dims[static_cast<std::size_t>(buffer.elements)] * buffer.element_bytes;
    }
  }
  if (sizes == state.arena_sizes) return {};
  state.arena_sizes.clear();  // the plan of a run that finds no room is nobody's
  const std::int64_t total = plan_arena(state.buffers, sizes, state.arena_offsets);
  if (total > state.arena_capacity) {
    state.arena = allocate(total);
    state.arena_capacity = state.arena ? total : 0;
    if (!state.arena) return Error{fmt::format("out of memory for an arena of {} bytes", total)};
  }
  state.arena_sizes = std::move(sizes);
  return {};
}

// What tasks need that need as much for any lengths of the caches.
ScratchSizes scratch_of_sizes(const State& state, const Frame& frame) {
  ScratchSizes needed;
  for (const Step& step : state.steps) {
    for (const Task& task : step.tasks) {
      if (const auto* linear = std::get_if<LinearTask>(&task)) {
        needed.include(scratch_of(*linear, frame));
      } else if (const auto* rope = std::get_if<RopeTask>(&task)) {
        needed.include({.thread_bytes = frame.dim(rope->heads) * rope->scratch_row_bytes});
      }
    }
  }
  return needed;
}

// Calls visit(step, task) for each attention.
template <class Steps, class Visit>
void for_attentions(Steps& steps, Visit&& visit) {
  for (auto& step : steps) {
    if (!step.attention) continue;
    for (const Task& task : step.tasks) {
      if (const auto* attention = std::get_if<AttentionTask>(&task)) visit(step, *attention);
    }
  }
}

// 2 multiplications and additions per key and element of a head, twice (scores and sum of values).
double attention_flops(const AttentionTask& task, const Frame& frame) {
  double keys = 0;
  for (std::int64_t sequence = 0; sequence < sequence_count(task, frame); ++sequence) {
    const Queries queries = queries_of(task, frame, sequence);
    const KeyRange first = keys_of(task, frame, queries.batch, queries.first);
    const KeyRange last = keys_of(task, frame, queries.batch, queries.last());
    keys += static_cast<double>((first.count + last.count) * queries.count) / 2;
  }
  return 4.0 * keys * task.spec.head_dim * task.spec.group *
         static_cast<double>(frame.dim(task.kv_heads));
}

TensorView view_of(const HostTensor& tensor, const Frame& frame) {
  TensorView view{tensor.operand.address(frame), tensor.dtype, {}};
  for (DimIndex dim : tensor.shape) view.shape.push_back(frame.dim(dim));
  return view;
}

Status run_host(const HostTask& task, const Frame& frame, const HostFunction* host,
                PhaseCounters& counters) {
  std::vector<TensorView> inputs, outputs;
  for (const HostTensor& tensor : task.inputs) inputs.push_back(view_of(tensor, frame));
  for (const HostTensor& tensor : task.outputs) outputs.push_back(view_of(tensor, frame));
  const HostCall call{task.function, task.attributes, inputs, outputs};
  if (task.onednn) {
    counters.onednn_calls += 1;
    return run_onednn(call);
  }
  if (host == nullptr) {
    return Error{fmt::format("{} needs a fallback and none was given", task.function)};
  }
  return (*host)(call);
}

// A step that one thread computes anyway is no meeting: the last to arrive at a barrier goes on
// alone through those that follow. In a step of decode these are norms, rope and appends, so that
// a layer of 8 steps has 5 barriers, each a microsecond or two.
void find_little_steps(State& state, const Frame& frame) {
  for (Step& step : state.steps) {
    step.little = std::all_of(step.tasks.begin(), step.tasks.end(),
                              [&](const Task& task) { return is_little(task, frame); });
  }
}

// What follows from the sizes of the inputs alone. A token's are its predecessor's, and this reads
// all tasks, which the weights have driven out of the caches: 0.03 ms of a token of 135M
// (perf/results/models-zen4.md).
Status prepare_sizes(State& state) {
  if (state.prepared) return {};
  const std::span<const std::int64_t> dims = state.dim_values;
  if (Status made = ensure_kernels(state, dims); !made) return made;
  if (Status room = prepare_arena(state, dims); !room) return room;
  const Frame sizes{
      .dims = dims, .buffers = {}, .caches = {}, .problem = nullptr, .barrier = nullptr};
  state.scratch_sizes = scratch_of_sizes(state, sizes);
  find_little_steps(state, sizes);
  state.prepared = true;
  return {};
}

// Returns how many threads there were.
int run_steps(State& state, std::size_t begin, std::size_t end, Frame& frame, int threads) {
  const auto mark_end = [&](std::size_t step) {
    if (state.profile) state.marks[step + 1] = Clock::now();
  };
  std::size_t next = begin;  // written by one thread while the others wait
  const auto run_little_steps = [&] {
    for (; next < end && state.steps[next].little; ++next) {
      for (const Task& task : state.steps[next].tasks) run_task(task, frame, 0, 1);
      mark_end(next);
    }
  };
  const auto begin_step = [&] {
    run_little_steps();
    state.turns += kTurnsOfStep;
    // Tasks of a step are not separated by a barrier, and so cannot have a turn each.
    const bool alone = next < end && state.steps[next].tasks.size() == 1;
    frame.turn.number = alone ? state.turns : 0;
  };
  begin_step();
  int members = 1;
  if (next == end) return members;
  run_team(threads, [&](int thread, int team) {
    if (thread == 0) members = team;
    while (next < end) {
      for (const Task& task : state.steps[next].tasks) run_task(task, frame, thread, team);
      frame.barrier->wait(team, [&] {
        mark_end(next);
        next += 1;
        begin_step();
      });
    }
  });
  return members;
}

// Weights, keys and values that a step reads from memory. Experts: unknown before they are chosen.
double bytes_read(const Step& step, const Frame& frame) {
  double bytes = 0;
  for (const Task& task : step.tasks) {
    if (const auto* linear = std::get_if<LinearTask>(&task)) {
      if (!linear->experts) bytes += static_cast<double>(linear->weight->bytes);
    } else if (const auto* attention = std::get_if<AttentionTask>(&task)) {
      std::int64_t keys = 0;
      for (std::int64_t i = 0; i < sequence_count(*attention, frame); ++i) {
        const Queries queries = queries_of(*attention, frame, i);
        keys += keys_of(*attention, frame, queries.batch, queries.last()).count;
      }
      bytes += 2.0 * static_cast<double>(keys * frame.dim(attention->kv_heads)) *
               static_cast<double>(row_bytes(attention->spec));
    }
  }
  return bytes;
}

// After a profiled run that began at `begin`.
void add_times(State& state, const Frame& frame, Phase phase, Clock::time_point begin) {
  const auto now = Clock::now();
  PhaseCounters& counters = state.counters[static_cast<std::size_t>(phase)];
  constexpr auto pause = std::chrono::seconds(1);
  if (begin - state.last_end < pause) {
    counters.between_seconds += seconds(begin - state.last_end);
  }
  counters.around_seconds +=
      seconds(state.marks.front() - begin) + seconds(now - state.marks.back());
  for (std::size_t i = 0; i < state.steps.size(); ++i) {
    const Step& step = state.steps[i];
    const double time = seconds(state.marks[i + 1] - state.marks[i]);
    if (step.region < 0) {
      counters.around_seconds += time;
      continue;
    }
    RegionTime& total =
        state.regions[static_cast<std::size_t>(step.region)].time[static_cast<std::size_t>(phase)];
    total.seconds += time;
    total.bytes += bytes_read(step, frame);
  }
  state.last_end = now;
}

void count_steps(const State& state, PhaseCounters& counters) {
  std::uint64_t steps = 0, attentions = 0, first = 0, last = 0;
  for (const Step& step : state.steps) {
    if (step.attention) {
      if (attentions == 0) first = steps;
      last = steps;
      attentions += 1;
    }
    if (!step.little) steps += 1;
  }
  counters.steps += steps;
  if (attentions > 1) {
    counters.layers += attentions - 1;
    counters.layer_steps += last - first;
  } else {
    counters.layers += 1;
    counters.layer_steps += steps;
  }
}

}  // namespace

std::int64_t plan_arena(std::span<const Buffer> buffers, std::span<const std::int64_t> sizes,
                        std::vector<std::int64_t>& offsets) {
  offsets.assign(buffers.size(), 0);
  std::vector<std::size_t> placed;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    if (sizes[i] == 0) continue;
    // First fit among the placed buffers that live at the same time, by offset.
    std::vector<std::pair<std::int64_t, std::int64_t>> taken;
    for (std::size_t other : placed) {
      const bool apart = buffers[other].last_step < buffers[i].first_step ||
                         buffers[i].last_step < buffers[other].first_step;
      if (!apart) taken.emplace_back(offsets[other], offsets[other] + sizes[other]);
    }
    std::sort(taken.begin(), taken.end());
    std::int64_t offset = 0;
    for (const auto& [begin, end] : taken) {
      if (offset + sizes[i] <= begin) break;
      offset = std::max(offset, (end + 63) / 64 * 64);
    }
    offsets[i] = offset;
    placed.push_back(i);
    total = std::max(total, offset + sizes[i]);
  }
  return total;
}

Program::Program() = default;
Program::~Program() = default;
Program::Program(Program&&) noexcept = default;
Program& Program::operator=(Program&&) noexcept = default;
Program::Program(std::unique_ptr<State> state) : state_(std::move(state)) {}

const graph::Graph& Program::graph() const { return state_->graph; }

Result<std::vector<std::vector<std::int64_t>>> Program::output_shapes(
    std::span<const TensorView> inputs) const {
  Result<std::vector<std::int64_t>> symbols = bind_symbols(*state_, inputs);
  if (!symbols) return symbols.error();
  std::vector<std::int64_t> dims;
  state_->dims.evaluate(*symbols, dims);
  if (Status fit = check_shapes(*state_, inputs, dims); !fit) return fit.error();
  std::vector<std::vector<std::int64_t>> shapes;
  for (const TensorOutput& output : state_->outputs) {
    shapes.emplace_back();
    for (DimIndex dim : output.dims) {
      shapes.back().push_back(dims[static_cast<std::size_t>(dim)]);
    }
  }
  return shapes;
}

Status Program::run(const RunArguments& arguments) {
  State& state = *state_;
  const auto begin = Clock::now();
  Result<std::vector<std::int64_t>> symbols = bind_symbols(state, arguments.inputs);
  if (!symbols) return symbols.error();
  if (state.symbol_values != *symbols || state.dim_values.empty()) {
    state.symbol_values = std::move(symbols.value());
    state.dims.evaluate(state.symbol_values, state.dim_values);
    state.prepared = false;
  }
  const std::span<const std::int64_t> dims = state.dim_values;
  if (Status fit = check_shapes(state, arguments.inputs, dims); !fit) return fit;
  if (Status fit = check_caches(state, arguments.caches, dims); !fit) return fit;
  if (arguments.outputs.size() != state.outputs.size()) {
    return Error{fmt::format("{} outputs given, {} expected", arguments.outputs.size(),
                             state.outputs.size())};
  }
  if (Status ready = prepare_sizes(state); !ready) return ready;
  if (Status room = reserve_caches(state, arguments.caches, dims); !room) return room;

  std::vector<char*> buffers(state.buffers.size());
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& buffer = state.buffers[i];
    const auto index = static_cast<std::size_t>(buffer.index);
    switch (buffer.kind) {
      case Buffer::Kind::input:
        buffers[i] = static_cast<char*>(arguments.inputs[index].data);
        break;
      case Buffer::Kind::output:
        buffers[i] = static_cast<char*>(arguments.outputs[index].data);
        break;
      case Buffer::Kind::constant:
        buffers[i] = static_cast<char*>(buffer.constant);
        break;
      case Buffer::Kind::arena:
        buffers[i] = state.arena.get() + state.arena_offsets[i];
        break;
    }
  }
  std::atomic<const char*> problem{nullptr};
  Barrier barrier;
  Frame frame{.dims = dims,
              .buffers = buffers,
              .caches = arguments.caches,
              .problem = &problem,
              .barrier = &barrier};
  ScratchSizes needed = state.scratch_sizes;
  for_attentions(state.steps, [&](const Step&, const AttentionTask& attention) {
    needed.include(scratch_of(attention, frame));
  });
  if (Status room = state.scratch.reserve(needed, arguments.threads); !room) return room;
  state.scratch.lend(frame);

  PhaseCounters& counters = state.counters[static_cast<std::size_t>(arguments.phase)];
  if (state.profile) state.marks.assign(state.steps.size() + 1, Clock::now());
  counters.threads = 0;
  std::size_t next = 0;
  while (next < state.steps.size()) {
    if (arguments.observer != nullptr) (*arguments.observer)(next, frame);
    const auto start = Clock::now();
    if (state.steps[next].host) {
      const Status done =
          run_host(std::get<HostTask>(state.steps[next].tasks[0]), frame, arguments.host, counters);
      if (!done) return done;
      counters.fallback_calls += 1;
      counters.fallback_seconds += seconds(Clock::now() - start);
      next += 1;
      if (state.profile) state.marks[next] = Clock::now();
      continue;
    }
    std::size_t end = next + 1;
    while (arguments.observer == nullptr && end < state.steps.size() && !state.steps[end].host) {
      end += 1;
    }
    const int members = run_steps(state, next, end, frame, arguments.threads);
    counters.threads = std::max(counters.threads, members);
    counters.own_seconds += seconds(Clock::now() - start);
    next = end;
    if (problem.load() != nullptr) return Error{problem.load()};
  }
  if (arguments.observer != nullptr) (*arguments.observer)(next, frame);
  for (Step& step : state.steps) step.flops = static_cast<double>(frame.dim(step.work));
  for_attentions(state.steps, [&](Step& step, const AttentionTask& attention) {
    step.flops += attention_flops(attention, frame);
  });
  for (const Step& step : state.steps) {
    (step.host ? counters.fallback_flops : counters.own_flops) += step.flops;
  }
  for (std::size_t i = 0; i < state.caches.size(); ++i) {
    if (state.caches[i].appended) {
      arguments.caches[i]->advance(dims[static_cast<std::size_t>(state.caches[i].tokens)]);
    }
  }
  counters.runs += 1;
  count_steps(state, counters);
  if (state.profile) add_times(state, frame, arguments.phase, begin);
  return {};
}

Status Program::prepare() {
  for_linears(*state_, [&](LinearTask& linear) {
    for_all_variants(linear, [&](LinearTask::Variant& variant) {
      if (variant.kernel == nullptr) request_kernel(*state_, linear, variant);
    });
  });
  if (Status made = make_requested_kernels(*state_); !made) return made;
  // A step of decode may be searched with. That another program may not is no error.
  static_cast<void>(GreedySearch::make(*this));
  return {};
}

const PhaseCounters& Program::counters(Phase phase) const {
  return state_->counters[static_cast<std::size_t>(phase)];
}

std::vector<RegionReport> Program::regions() const {
  std::vector<RegionReport> regions = state_->regions;
  for (const Step& step : state_->steps) {
    if (step.region >= 0) regions[static_cast<std::size_t>(step.region)].flops += step.flops;
  }
  return regions;
}

const std::vector<std::string>& Program::packed_sources() const { return state_->packed_sources; }
bool Program::reads_in_place() const { return state_->reads_in_place; }

int Program::layer_count() const {
  int count = 0;
  for (const Step& step : state_->steps) count += step.attention ? 1 : 0;
  return count;
}

std::int64_t Program::alike_tokens() const {
  std::int64_t most = std::numeric_limits<std::int64_t>::max();
  for (const Step& step : state_->steps) {
    for (const Task& task : step.tasks) {
      if (const auto* linear = std::get_if<LinearTask>(&task)) {
        if (linear->tiles) most = std::min(most, most_rows_without_tiles);
      } else if (const auto* attention = std::get_if<AttentionTask>(&task)) {
        most = std::min(most, attention->causal ? attention->few_queries : 1);
      } else if (std::holds_alternative<HostTask>(task) ||
                 std::holds_alternative<MatmulTask>(task)) {
        most = 1;  // what others compute may depend on the number of rows, what is spelled out on
                   // that of keys, which are more by the guesses
      }
    }
  }
  return std::max<std::int64_t>(most, 1);
}

std::uint64_t Program::arena_bytes() const {
  return static_cast<std::uint64_t>(state_->arena_capacity);
}

}  // namespace tilewright::ops
