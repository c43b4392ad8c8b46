// Tasks: see task.h. Tested by program_test.
#include "ops/task.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "ops/scalar_type.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

std::int64_t argument(const void* pointer) { return std::bit_cast<std::int64_t>(pointer); }

// Below this many elements a task runs on one thread: sharing it costs more than it saves.
constexpr std::int64_t smallest_share = 4096;

std::int64_t padded_bytes(std::int64_t columns, graph::DataType type) {
  return (columns * graph::size_in_bytes(type) + 63) / 64 * 64;
}

// Rows that are multiplied by the same expert, one thread's panels of their results. A block of
// rows is gathered, because a kernel wants rows at one stride, and its results are scattered.
class ExpertRun {
 public:
  ExpertRun(const LinearTask& task, const Frame& frame, int thread, WorkRange panels)
      : task_(task), frame_(frame), choice_(*task.experts), panels_(panels) {
    rows_ = reinterpret_cast<std::int64_t*>(frame.scratch[static_cast<std::size_t>(thread)]);
    const std::int64_t rows = frame.dim(task.rows);
    x_ = reinterpret_cast<char*>(rows_) + (rows * 8 + 63) / 64 * 64;
    y_ = x_ + task.variants[0].rows * padded_bytes(task.spec.k, task.spec.input);
    char* sums = y_ + task.variants[0].rows * padded_bytes(task.spec.n, task.spec.output);
    arguments_[LinearArgs::partial_sums] = argument(sums);
    arguments_[LinearArgs::weight] = argument(task.weight->data.get());
    arguments_[LinearArgs::panel_count] = panels.end - panels.begin;
    arguments_[LinearArgs::block_count] = 1;
  }

  // The rows of this expert, in order.
  void run(std::int64_t expert) {
    const auto* indices = reinterpret_cast<const std::int64_t*>(choice_.indices.address(frame_));
    const std::int64_t rows = frame_.dim(task_.rows);
    std::int64_t count = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      if (indices[row] == expert) rows_[count++] = row;
    }
    first_panel_ = expert * panel_count(task_.spec.n);
    arguments_[LinearArgs::panel_begin] = first_panel_ + panels_.begin;
    if (task_.spec.epilogue.bias) {
      arguments_[LinearArgs::bias] = argument(task_.bias.address(frame_));
    }
    for_row_blocks(
        task_.variants, count,
        [&](const LinearTask::Variant& variant, std::int64_t first, std::int64_t blocks) {
          for (std::int64_t block = 0; block < blocks; ++block) {
            multiply(variant, rows_ + first + block * variant.rows);
          }
        });
  }

 private:
  void multiply(const LinearTask::Variant& variant, const std::int64_t* rows) {
    const std::int64_t x_bytes = task_.spec.k * task_.x.element_bytes;
    const std::int64_t x_pitch = padded_bytes(task_.spec.k, task_.spec.input);
    const std::int64_t x_stride = frame_.dim(task_.x_stride) * task_.x.element_bytes;
    for (int i = 0; i < variant.rows; ++i) {
      std::memcpy(x_ + i * x_pitch, task_.x.address(frame_) + rows[i] / choice_.choices * x_stride,
                  static_cast<std::size_t>(x_bytes));
    }
    const std::int64_t pitch = padded_bytes(task_.spec.n, task_.spec.output);
    arguments_[LinearArgs::x] = argument(x_);
    arguments_[LinearArgs::x_row_stride] = x_pitch;
    // The kernel puts a panel where it lies in the stack of all experts.
    arguments_[LinearArgs::y] =
        argument(y_) - first_panel_ * panel_columns() * task_.y.element_bytes;
    arguments_[LinearArgs::y_row_stride] = pitch;
    variant.kernel->function(arguments_);
    const std::int64_t begin = panels_.begin * panel_columns() * task_.y.element_bytes;
    const std::int64_t end = panels_.end * panel_columns() * task_.y.element_bytes;
    const std::int64_t y_stride = frame_.dim(task_.y_stride) * task_.y.element_bytes;
    for (int i = 0; i < variant.rows; ++i) {
      std::memcpy(task_.y.address(frame_) + rows[i] * y_stride + begin, y_ + i * pitch + begin,
                  static_cast<std::size_t>(end - begin));
    }
  }

  const LinearTask& task_;
  const Frame& frame_;
  const ExpertChoice& choice_;
  WorkRange panels_;
  std::int64_t* rows_;
  char *x_, *y_;
  std::int64_t first_panel_ = 0;
  std::int64_t arguments_[LinearArgs::count] = {};
};

void run_experts(const LinearTask& task, const Frame& frame, int thread, WorkRange panels) {
  const ExpertChoice& choice = *task.experts;
  const auto* indices = reinterpret_cast<const std::int64_t*>(choice.indices.address(frame));
  for (std::int64_t row = 0; row < frame.dim(task.rows); ++row) {
    if (indices[row] < 0 || indices[row] >= choice.experts) {
      frame.problem->store("expert_linear: an index is out of range");
      return;
    }
  }
  ExpertRun run(task, frame, thread, panels);
  for (std::int64_t expert = 0; expert < choice.experts; ++expert) run.run(expert);
}

void run(const LinearTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange panels = share(panel_count(task.spec.n), thread, threads);
  if (panels.begin == panels.end) return;
  if (task.experts) return run_experts(task, frame, thread, panels);
  const std::int64_t rows = frame.dim(task.rows);
  const std::int64_t x_stride = frame.dim(task.x_stride) * task.x.element_bytes;
  const std::int64_t y_stride = frame.dim(task.y_stride) * task.y.element_bytes;
  std::int64_t arguments[LinearArgs::count] = {};
  arguments[LinearArgs::partial_sums] = argument(frame.scratch[static_cast<std::size_t>(thread)]);
  arguments[LinearArgs::x_row_stride] = x_stride;
  arguments[LinearArgs::weight] = argument(task.weight->data.get());
  arguments[LinearArgs::y_row_stride] = y_stride;
  if (task.spec.epilogue.bias) arguments[LinearArgs::bias] = argument(task.bias.address(frame));
  std::int64_t residual_stride = 0;
  const char* residual = nullptr;
  if (task.spec.epilogue.residual) {
    residual = task.residual.address(frame);
    residual_stride = frame.dim(task.residual_stride) * task.residual.element_bytes;
    arguments[LinearArgs::residual_row_stride] = residual_stride;
  }
  // Rows that need several kernels take the panels one by one: each is still in cache for the next
  // kernel, where a second pass over all of them would read the weights from memory again.
  const bool one_kernel = rows % task.variants[0].rows == 0 ||
                          std::any_of(task.variants.begin(), task.variants.end(),
                                      [&](const auto& variant) { return variant.rows == rows; });
  const std::int64_t panels_at_once = one_kernel ? panels.end - panels.begin : 1;
  arguments[LinearArgs::panel_count] = panels_at_once;
  for (std::int64_t panel = panels.begin; panel < panels.end; panel += panels_at_once) {
    arguments[LinearArgs::panel_begin] = panel;
    for_row_blocks(
        task.variants, rows,
        [&](const LinearTask::Variant& variant, std::int64_t first, std::int64_t blocks) {
          arguments[LinearArgs::x] = argument(task.x.address(frame) + first * x_stride);
          arguments[LinearArgs::y] = argument(task.y.address(frame) + first * y_stride);
          arguments[LinearArgs::residual] = argument(residual + first * residual_stride);
          arguments[LinearArgs::block_count] = blocks;
          variant.kernel->function(arguments);
        });
  }
}

// Runs the nest of `loops` for the rows [begin, end) of its flattened iteration space;
// call(addresses, rows, innermost strides) gets runs of consecutive rows of the innermost loop.
template <class Call>
void run_loops(const std::vector<TaskLoop>& loops, std::span<const Operand> operands,
               const Frame& frame, std::int64_t begin, std::int64_t end, Call&& call) {
  constexpr std::size_t most_operands = 32;
  char* addresses[most_operands];
  std::int64_t strides[most_operands] = {};
  const std::size_t count = operands.size();
  if (loops.empty()) {
    if (begin == end) return;
    for (std::size_t i = 0; i < count; ++i) addresses[i] = operands[i].address(frame);
    call(addresses, std::int64_t{1}, strides);
    return;
  }
  const std::int64_t inner = frame.dim(loops.back().size);
  for (std::size_t i = 0; i < count; ++i) {
    strides[i] = frame.dim(loops.back().strides[i]) * operands[i].element_bytes;
  }
  while (begin < end) {
    const std::int64_t position = begin % inner;
    const std::int64_t rows = std::min(inner - position, end - begin);
    for (std::size_t i = 0; i < count; ++i) {
      addresses[i] = operands[i].address(frame) + position * strides[i];
    }
    std::int64_t outer = begin / inner;
    for (std::size_t level = loops.size() - 1; level-- > 0;) {
      const std::int64_t size = frame.dim(loops[level].size);
      const std::int64_t index = outer % size;
      outer /= size;
      for (std::size_t i = 0; i < count; ++i) {
        addresses[i] += index * frame.dim(loops[level].strides[i]) * operands[i].element_bytes;
      }
    }
    call(addresses, rows, strides);
    begin += rows;
  }
}

std::int64_t iterations(const std::vector<TaskLoop>& loops, const Frame& frame) {
  std::int64_t count = 1;
  for (const TaskLoop& loop : loops) count *= frame.dim(loop.size);
  return count;
}

void run(const MatmulTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t block = block_rows(task.spec);
  const std::int64_t rows = frame.dim(task.rows);
  const std::int64_t pieces = (rows + block - 1) / block;
  const std::int64_t matrices = iterations(task.batch, frame);
  std::int64_t arguments[MatmulArgs::count];
  const std::int64_t x_stride = frame.dim(task.x_stride) * task.x.element_bytes;
  const std::int64_t y_stride = frame.dim(task.y_stride) * task.y.element_bytes;
  arguments[MatmulArgs::x_row_stride] = x_stride;
  arguments[MatmulArgs::w_row_stride] = frame.dim(task.w_stride) * task.w.element_bytes;
  arguments[MatmulArgs::y_row_stride] = y_stride;
  arguments[MatmulArgs::columns] = frame.dim(task.columns);
  arguments[MatmulArgs::depth] = frame.dim(task.depth);
  const Operand operands[] = {task.x, task.w, task.y};
  // Blocks of rows of all matrices, one after another; a thread's share may begin and end inside.
  const WorkRange work = share(matrices * pieces, thread, threads);
  for (std::int64_t at = work.begin; at < work.end;) {
    const std::int64_t matrix = at / pieces, first = at % pieces * block;
    const std::int64_t end = std::min(work.end, (matrix + 1) * pieces);
    const std::int64_t count = std::min((end - at) * block, rows - first);
    arguments[MatmulArgs::block_count] = count / block;
    arguments[MatmulArgs::single_rows] = count % block;
    run_loops(task.batch, operands, frame, matrix, matrix + 1,
              [&](char* const* addresses, std::int64_t, const std::int64_t*) {
                arguments[MatmulArgs::x] = argument(addresses[0] + first * x_stride);
                arguments[MatmulArgs::w] = argument(addresses[1]);
                arguments[MatmulArgs::y] = argument(addresses[2] + first * y_stride);
                task.kernel->function(arguments);
              });
    at = end;
  }
}

// The rows of a nest that one thread takes; everything on thread 0 when there is little.
WorkRange share_rows(std::int64_t rows, std::int64_t columns, int thread, int threads) {
  if (rows * columns < smallest_share) return thread == 0 ? WorkRange{0, rows} : WorkRange{0, 0};
  return share(rows, thread, threads);
}

void run(const RowTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t columns = frame.dim(task.columns);
  const WorkRange rows = share_rows(iterations(task.loops, frame), columns, thread, threads);
  run_loops(task.loops, task.operands, frame, rows.begin, rows.end,
            [&](char* const* addresses, std::int64_t count, const std::int64_t* strides) {
              std::int64_t arguments[RowArgs::first_operand + 2 * 32];
              arguments[RowArgs::rows] = count;
              arguments[RowArgs::columns] = columns;
              for (std::size_t i = 0; i < task.operands.size(); ++i) {
                arguments[RowArgs::pointer(static_cast<int>(i))] = argument(addresses[i]);
                arguments[RowArgs::row_stride(static_cast<int>(i))] = strides[i];
              }
              task.kernel->function(arguments);
            });
}

void run(const CopyTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t columns = frame.dim(task.columns);
  const WorkRange rows = share_rows(iterations(task.loops, frame), columns, thread, threads);
  const Operand operands[] = {task.x, task.y};
  run_loops(task.loops, operands, frame, rows.begin, rows.end,
            [&](char* const* addresses, std::int64_t count, const std::int64_t* strides) {
              std::int64_t arguments[CopyArgs::count];
              arguments[CopyArgs::rows] = count;
              arguments[CopyArgs::columns] = columns;
              arguments[CopyArgs::x] = argument(addresses[0]);
              arguments[CopyArgs::x_row_stride] = strides[0];
              arguments[CopyArgs::y] = argument(addresses[1]);
              arguments[CopyArgs::y_row_stride] = strides[1];
              task.kernel->function(arguments);
            });
}

std::int64_t head_offset(const HeadStrides& strides, const Frame& frame, std::int64_t batch,
                         std::int64_t head, std::int64_t token) {
  return batch * frame.dim(strides.batch) + head * frame.dim(strides.head) +
         token * frame.dim(strides.token);
}

struct Rows {
  char* address;
  std::int64_t head_stride;  // bytes
};

Rows destination_rows(const HeadDestination& destination, const Frame& frame, std::int64_t batch,
                      std::int64_t token) {
  if (destination.cache < 0) {
    const std::int64_t bytes = destination.tensor.element_bytes;
    return {destination.tensor.address(frame) +
                head_offset(destination.strides, frame, batch, 0, token) * bytes,
            frame.dim(destination.strides.head) * bytes};
  }
  const KvCache& cache = *frame.caches[static_cast<std::size_t>(destination.cache)];
  const std::int64_t position = cache.length() + token;
  return {destination.values ? cache.value(batch, position) : cache.key(batch, position),
          cache.head_stride()};
}

void run(const RopeTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t tokens = frame.dim(task.tokens);
  const WorkRange work =
      share_rows(frame.dim(task.batch) * tokens, frame.dim(task.heads) * 64, thread, threads);
  std::int64_t arguments[RopeArgs::count];
  arguments[RopeArgs::rows] = frame.dim(task.heads);
  arguments[RopeArgs::x_row_stride] = frame.dim(task.x_strides.head) * task.x.element_bytes;
  for (std::int64_t item = work.begin; item < work.end; ++item) {
    const std::int64_t batch = item / tokens, token = item % tokens;
    const std::int64_t table =
        batch * frame.dim(task.table_strides.batch) + token * frame.dim(task.table_strides.token);
    const Rows out = destination_rows(task.destination, frame, batch, token);
    arguments[RopeArgs::x] =
        argument(task.x.address(frame) +
                 head_offset(task.x_strides, frame, batch, 0, token) * task.x.element_bytes);
    arguments[RopeArgs::cos] =
        argument(task.cosine.address(frame) + table * task.cosine.element_bytes);
    arguments[RopeArgs::sin] = argument(task.sine.address(frame) + table * task.sine.element_bytes);
    arguments[RopeArgs::y] = argument(out.address);
    arguments[RopeArgs::y_row_stride] = out.head_stride;
    task.kernel->function(arguments);
  }
}

void run(const AppendTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t tokens = frame.dim(task.tokens);
  const WorkRange work = share_rows(frame.dim(task.batch) * tokens,
                                    frame.dim(task.heads) * task.columns, thread, threads);
  std::int64_t arguments[CopyArgs::count];
  arguments[CopyArgs::rows] = frame.dim(task.heads);
  arguments[CopyArgs::columns] = task.columns;
  arguments[CopyArgs::x_row_stride] = frame.dim(task.x_strides.head) * task.x.element_bytes;
  for (std::int64_t item = work.begin; item < work.end; ++item) {
    const std::int64_t batch = item / tokens, token = item % tokens;
    const Rows out = destination_rows(task.destination, frame, batch, token);
    arguments[CopyArgs::x] =
        argument(task.x.address(frame) +
                 head_offset(task.x_strides, frame, batch, 0, token) * task.x.element_bytes);
    arguments[CopyArgs::y] = argument(out.address);
    arguments[CopyArgs::y_row_stride] = out.head_stride;
    task.kernel->function(arguments);
  }
}

void run(const AttentionTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t kv_heads = frame.dim(task.kv_heads);
  const std::int64_t queries = frame.dim(task.queries);
  const std::int64_t items = frame.dim(task.batch) * kv_heads * queries;
  const std::int64_t q_bytes = task.q.element_bytes, out_bytes = task.output.element_bytes;
  std::int64_t arguments[AttentionArgs::count] = {};
  arguments[AttentionArgs::q_head_stride] = frame.dim(task.q_strides.head) * q_bytes;
  arguments[AttentionArgs::output_head_stride] = frame.dim(task.output_strides.head) * out_bytes;
  arguments[AttentionArgs::scale] = std::bit_cast<std::int32_t>(task.scale);
  arguments[AttentionArgs::softcap] = std::bit_cast<std::int32_t>(task.softcap);
  arguments[AttentionArgs::scratch] = argument(frame.scratch[static_cast<std::size_t>(thread)]);
  // Round robin: under a causal mask later queries cost more, and neighbours share keys in cache.
  for (std::int64_t item = thread; item < items; item += threads) {
    const std::int64_t query = item % queries;
    const std::int64_t head = item / queries % kv_heads;
    const std::int64_t batch = item / queries / kv_heads;
    const std::int64_t first_head = head * task.spec.group;
    const KeyRange keys = keys_of(task, frame, batch, query);
    void* plain_keys = nullptr;
    void* plain_values = nullptr;
    if (task.cache >= 0) {
      const KvCache& cache = *frame.caches[static_cast<std::size_t>(task.cache)];
      arguments[AttentionArgs::k_blocks] = argument(cache.key_blocks(batch, head));
      arguments[AttentionArgs::v_blocks] = argument(cache.value_blocks(batch, head));
      arguments[AttentionArgs::k_token_stride] = cache.token_stride();
      arguments[AttentionArgs::v_token_stride] = cache.token_stride();
      arguments[AttentionArgs::block_tokens] = KvCache::block_tokens;
    } else {
      plain_keys = task.k.address(frame) +
                   head_offset(task.k_strides, frame, batch, head, 0) * task.k.element_bytes;
      plain_values = task.v.address(frame) +
                     head_offset(task.v_strides, frame, batch, head, 0) * task.v.element_bytes;
      arguments[AttentionArgs::k_blocks] = argument(&plain_keys);
      arguments[AttentionArgs::v_blocks] = argument(&plain_values);
      arguments[AttentionArgs::k_token_stride] =
          frame.dim(task.k_strides.token) * task.k.element_bytes;
      arguments[AttentionArgs::v_token_stride] =
          frame.dim(task.v_strides.token) * task.v.element_bytes;
      arguments[AttentionArgs::block_tokens] = std::max<std::int64_t>(frame.dim(task.keys), 1);
    }
    arguments[AttentionArgs::q] =
        argument(task.q.address(frame) +
                 head_offset(task.q_strides, frame, batch, first_head, query) * q_bytes);
    arguments[AttentionArgs::output] =
        argument(task.output.address(frame) +
                 head_offset(task.output_strides, frame, batch, first_head, query) * out_bytes);
    arguments[AttentionArgs::first_key] = keys.first;
    arguments[AttentionArgs::key_count] = keys.count;
    if (task.spec.mask != MaskKind::none) {
      const std::int64_t row = head_offset(task.mask_strides, frame, batch, first_head, query);
      arguments[AttentionArgs::mask] =
          argument(task.mask.address(frame) + row * task.mask.element_bytes);
    }
    if (task.spec.slopes) {
      arguments[AttentionArgs::slopes] = argument(task.slopes.address(frame) + 4 * first_head);
    }
    if (task.spec.sinks) {
      arguments[AttentionArgs::sinks] = argument(task.sinks.address(frame) + 4 * first_head);
    }
    task.kernel->function(arguments);
  }
}

void run(const EmbeddingTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange rows = share_rows(frame.dim(task.rows), task.columns, thread, threads);
  const auto* indices = reinterpret_cast<const std::int64_t*>(task.indices.address(frame));
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    if (indices[i] < 0 || indices[i] >= task.table_rows) {
      frame.problem->store("embedding: an index is out of range");
      return;
    }
  }
  const std::int64_t row_bytes = task.columns * task.y.element_bytes;
  std::int64_t arguments[EmbeddingArgs::count];
  arguments[EmbeddingArgs::rows] = rows.end - rows.begin;
  arguments[EmbeddingArgs::columns] = task.columns;
  arguments[EmbeddingArgs::table] = argument(task.table.address(frame));
  arguments[EmbeddingArgs::table_row_stride] = task.columns * task.table.element_bytes;
  arguments[EmbeddingArgs::indices] = argument(indices + rows.begin);
  arguments[EmbeddingArgs::y] = argument(task.y.address(frame) + rows.begin * row_bytes);
  arguments[EmbeddingArgs::y_row_stride] = row_bytes;
  task.kernel->function(arguments);
}

void run(const ArangeTask& task, const Frame& frame, int thread, int) {
  if (thread != 0) return;
  auto* y = reinterpret_cast<std::int64_t*>(task.y.address(frame));
  const std::int64_t start = frame.dim(task.start), count = frame.dim(task.count);
  for (std::int64_t i = 0; i < count; ++i) y[i] = start + i;
}

void run(const IntegerTask& task, const Frame& frame, int thread, int) {
  if (thread != 0) return;
  const auto* a = reinterpret_cast<const std::int64_t*>(task.x[0].address(frame));
  const auto* b = reinterpret_cast<const std::int64_t*>(task.x[1].address(frame));
  auto* y = reinterpret_cast<std::int64_t*>(task.y.address(frame));
  for (std::int64_t i = 0; i < frame.dim(task.count); ++i) {
    y[i] = task.apply(a[task.single[0] ? 0 : i], b[task.single[1] ? 0 : i]);
  }
}

void run(const TopTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t columns = frame.dim(task.columns);
  const WorkRange rows = share_rows(frame.dim(task.rows), columns, thread, threads);
  const std::int64_t bytes = graph::size_in_bytes(task.dtype);
  struct Candidate {
    double value;
    std::int64_t index;
  };
  std::array<Candidate, TopTask::most> best;  // descending
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const char* x = task.x.address(frame) + row * columns * bytes;
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      const double value = read_scalar(task.dtype, x + i * bytes);
      std::int64_t place = found;
      while (place > 0 && value > best[static_cast<std::size_t>(place - 1)].value) --place;
      if (place == task.count) continue;
      found = std::min(found + 1, task.count);
      const auto at = best.begin() + place;
      std::copy_backward(at, best.begin() + found - 1, best.begin() + found);
      *at = {value, i};
    }
    for (std::int64_t i = 0; i < task.count; ++i) {
      const auto& [value, index] = best[static_cast<std::size_t>(i)];
      char* y = task.y.address(frame) + (row * task.count + i) * (task.indices ? 8 : bytes);
      if (task.indices) {
        std::memcpy(y, &index, sizeof index);
      } else {
        write_scalar(task.dtype, y, value);
      }
    }
  }
}

void run(const HostTask&, const Frame&, int, int) {}

}  // namespace

std::int64_t scratch_bytes(const LinearTask& task, std::int64_t rows) {
  if (!task.experts) return rows * kPartialSumsBytesPerRow;
  return (rows * 8 + 63) / 64 * 64 +
         task.variants[0].rows *
             (padded_bytes(task.spec.k, task.spec.input) +
              padded_bytes(task.spec.n, task.spec.output) + kPartialSumsBytesPerRow);
}

KeyRange keys_of(const AttentionTask& task, const Frame& frame, std::int64_t sequence,
                 std::int64_t query) {
  std::int64_t first = 0, end = 0;
  if (task.cache >= 0) {
    const KvCache& cache = *frame.caches[static_cast<std::size_t>(task.cache)];
    first = cache.first_keys()[static_cast<std::size_t>(sequence)];
    end = cache.length() + (task.causal ? query + 1 : frame.dim(task.queries));
  } else {
    const std::int64_t keys = frame.dim(task.keys);
    end = task.causal ? std::min(query + 1, keys) : keys;
  }
  if (task.window > 0) first = std::max(first, end - task.window);
  return {std::min(first, end), std::max<std::int64_t>(end - first, 0)};
}

void run_task(const Task& task, const Frame& frame, int thread, int threads) {
  std::visit([&](const auto& work) { run(work, frame, thread, threads); }, task);
}

}  // namespace tilewright::ops
