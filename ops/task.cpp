// Tasks: see task.h. Tested by program_test.
#include "ops/task.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "ops/attention_task.h"
#include "ops/linear_task.h"
#include "ops/quantize_kernel.h"
#include "ops/scalar_type.h"
#include "ops/threads.h"

namespace tilewright::ops {
namespace {

// Below this many elements a task runs on one thread: sharing it costs more than it saves.
constexpr std::int64_t smallest_share = 4096;

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

// What a task is shared out by, where it is rows that it is shared out by.
struct Extent {
  std::int64_t rows, columns;  // columns: elements of a row
};

Extent extent(const RowTask& task, const Frame& frame) {
  return {iterations(task.loops, frame), frame.dim(task.columns)};
}
Extent extent(const CopyTask& task, const Frame& frame) {
  return {iterations(task.loops, frame), frame.dim(task.columns)};
}
Extent extent(const RopeTask& task, const Frame& frame) {
  return {frame.dim(task.batch) * frame.dim(task.tokens), frame.dim(task.heads) * 64};
}
Extent extent(const AppendTask& task, const Frame& frame) {
  return {frame.dim(task.batch) * frame.dim(task.tokens), frame.dim(task.heads) * task.columns};
}
Extent extent(const EmbeddingTask& task, const Frame& frame) {
  return {frame.dim(task.rows), task.columns};
}
Extent extent(const PackedEmbeddingTask& task, const Frame& frame) {
  return {frame.dim(task.rows), task.columns};
}
Extent extent(const ArangeTask& task, const Frame& frame) { return {1, frame.dim(task.count)}; }
Extent extent(const IntegerTask& task, const Frame& frame) {
  return {iterations(task.loops, frame), 1};
}
Extent extent(const GatherTask& task, const Frame& frame) {
  return {frame.dim(task.rows), frame.dim(task.count)};
}
Extent extent(const CumsumTask& task, const Frame& frame) {
  return {frame.dim(task.rows), frame.dim(task.columns)};
}
Extent extent(const TopTask& task, const Frame& frame) {
  return {frame.dim(task.rows), frame.dim(task.columns)};
}

bool is_little(const Extent& work) {
  return work.rows <= 1 || work.rows * work.columns < smallest_share;
}

// The rows that one thread takes; everything on thread 0 when there is little.
template <class Task>
WorkRange share_rows(const Task& task, const Frame& frame, int thread, int threads) {
  const Extent work = extent(task, frame);
  if (!is_little(work)) return share(work.rows, thread, threads);
  return thread == 0 ? WorkRange{0, work.rows} : WorkRange{0, 0};
}

void run(const RowTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t columns = frame.dim(task.columns);
  const WorkRange rows = share_rows(task, frame, thread, threads);
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
  const WorkRange rows = share_rows(task, frame, thread, threads);
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

struct Rows {
  char* address;
  std::int64_t head_stride;  // bytes
  char* scales = nullptr;    // of a cache of i8; at head_stride, too
};

Rows destination_rows(const HeadDestination& destination, const Frame& frame, std::int64_t batch,
                      std::int64_t token) {
  if (destination.cache < 0) {
    const std::int64_t bytes = destination.tensor.element_bytes;
    return {destination.tensor.address(frame) +
                destination.strides.offset(frame, batch, 0, token) * bytes,
            frame.dim(destination.strides.head) * bytes};
  }
  const KvCache& cache = *frame.caches[static_cast<std::size_t>(destination.cache)];
  const KvCache::Place place = cache.place(batch, token);
  const std::int64_t position = cache.length(place.sequence) + place.token;
  Rows rows{destination.values ? cache.value(place.sequence, position)
                               : cache.key(place.sequence, position),
            cache.head_stride(place.sequence, position)};
  if (cache.dtype() == graph::DataType::i8) {
    rows.scales = destination.values ? cache.value_scale(place.sequence, position)
                                     : cache.key_scale(place.sequence, position);
  }
  return rows;
}

// The heads of one token, from x with that many bytes between them.
void quantize(const Kernel& kernel, std::int64_t heads, const char* x, std::int64_t x_row_stride,
              const Rows& to) {
  std::int64_t arguments[QuantizeArgs::count];
  arguments[QuantizeArgs::rows] = heads;
  arguments[QuantizeArgs::x] = argument(x);
  arguments[QuantizeArgs::x_row_stride] = x_row_stride;
  arguments[QuantizeArgs::y] = argument(to.address);
  arguments[QuantizeArgs::scales] = argument(to.scales);
  arguments[QuantizeArgs::y_row_stride] = to.head_stride;
  kernel.function(arguments);
}

void run(const RopeTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t tokens = frame.dim(task.tokens);
  const WorkRange work = share_rows(task, frame, thread, threads);
  std::int64_t arguments[RopeArgs::count];
  const std::int64_t heads = frame.dim(task.heads);
  char* scratch =
      task.quantize == nullptr ? nullptr : frame.scratch[static_cast<std::size_t>(thread)];
  arguments[RopeArgs::rows] = heads;
  arguments[RopeArgs::x_row_stride] = frame.dim(task.x_strides.head) * task.x.element_bytes;
  for (std::int64_t item = work.begin; item < work.end; ++item) {
    const std::int64_t batch = item / tokens, token = item % tokens;
    const std::int64_t table =
        batch * frame.dim(task.table_strides.batch) + token * frame.dim(task.table_strides.token);
    const Rows out = destination_rows(task.destination, frame, batch, token);
    arguments[RopeArgs::x] =
        argument(task.x.address(frame) +
                 task.x_strides.offset(frame, batch, 0, token) * task.x.element_bytes);
    arguments[RopeArgs::cos] =
        argument(task.cosine.address(frame) + table * task.cosine.element_bytes);
    arguments[RopeArgs::sin] = argument(task.sine.address(frame) + table * task.sine.element_bytes);
    const Rows rotated = scratch == nullptr ? out : Rows{scratch, task.scratch_row_bytes};
    arguments[RopeArgs::y] = argument(rotated.address);
    arguments[RopeArgs::y_row_stride] = rotated.head_stride;
    task.kernel->function(arguments);
    if (task.quantize != nullptr) {
      quantize(*task.quantize, heads, rotated.address, rotated.head_stride, out);
    }
  }
}

void run(const AppendTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t tokens = frame.dim(task.tokens);
  const WorkRange work = share_rows(task, frame, thread, threads);
  std::int64_t arguments[CopyArgs::count];
  arguments[CopyArgs::rows] = frame.dim(task.heads);
  arguments[CopyArgs::columns] = task.columns;
  arguments[CopyArgs::x_row_stride] = frame.dim(task.x_strides.head) * task.x.element_bytes;
  for (std::int64_t item = work.begin; item < work.end; ++item) {
    const std::int64_t batch = item / tokens, token = item % tokens;
    const Rows out = destination_rows(task.destination, frame, batch, token);
    const char* x = task.x.address(frame) +
                    task.x_strides.offset(frame, batch, 0, token) * task.x.element_bytes;
    if (task.quantizes) {
      quantize(*task.kernel, arguments[CopyArgs::rows], x, arguments[CopyArgs::x_row_stride], out);
      continue;
    }
    arguments[CopyArgs::x] = argument(x);
    arguments[CopyArgs::y] = argument(out.address);
    arguments[CopyArgs::y_row_stride] = out.head_stride;
    task.kernel->function(arguments);
  }
}

void run(const EmbeddingTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange rows = share_rows(task, frame, thread, threads);
  const auto* indices = reinterpret_cast<const std::int64_t*>(task.indices.address(frame));
  const std::int64_t table_rows = frame.dim(task.table_rows);
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    if (indices[i] < 0 || indices[i] >= table_rows) {
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

void run(const PackedEmbeddingTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange rows = share_rows(task, frame, thread, threads);
  const auto* indices = reinterpret_cast<const std::int64_t*>(task.indices.address(frame));
  const std::int64_t row_bytes = task.columns * task.y.element_bytes;
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    if (indices[i] < 0 || indices[i] >= task.table_rows) {
      frame.problem->store("embedding: an index is out of range");
      return;
    }
    unpack_row(task.weight->data.get(), indices[i], task.columns, task.weight->form, task.dtype,
               task.y.address(frame) + i * row_bytes);
  }
}

void run(const ArangeTask& task, const Frame& frame, int thread, int threads) {
  if (share_rows(task, frame, thread, threads).end == 0) return;
  auto* y = reinterpret_cast<std::int64_t*>(task.y.address(frame));
  const std::int64_t start = frame.dim(task.start), count = frame.dim(task.count);
  for (std::int64_t i = 0; i < count; ++i) y[i] = start + i;
}

std::int64_t read_integer(graph::DataType type, const char* from) {
  std::int64_t value = 0;  // little-endian; boolean is 0 or 1
  const auto bytes = static_cast<std::size_t>(graph::size_in_bytes(type));
  std::memcpy(&value, from, bytes);
  return type == graph::DataType::i32 ? static_cast<std::int32_t>(value) : value;
}

void write_integer(graph::DataType type, char* to, std::int64_t value) {
  if (type == graph::DataType::i64) {
    std::memcpy(to, &value, sizeof value);
  } else if (graph::is_float(type)) {
    write_scalar(type, to, static_cast<float>(value));  // 16 bits by way of f32, as PyTorch does
  } else {
    *to = value != 0;
  }
}

void run(const IntegerTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange range = share_rows(task, frame, thread, threads);
  run_loops(task.loops, task.operands, frame, range.begin, range.end,
            [&](char* const* addresses, std::int64_t count, const std::int64_t* strides) {
              const auto operand = [&](std::size_t which, std::int64_t i) {
                if (task.literals[which]) return *task.literals[which];
                return read_integer(task.types[which], addresses[which] + i * strides[which]);
              };
              for (std::int64_t i = 0; i < count; ++i) {
                write_integer(task.types[2], addresses[2] + i * strides[2],
                              task.apply(operand(0, i), operand(1, i)));
              }
            });
}

void run(const GatherTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t columns = frame.dim(task.columns), count = frame.dim(task.count);
  const auto bytes = static_cast<std::size_t>(task.x.element_bytes);
  const WorkRange rows = share_rows(task, frame, thread, threads);
  const auto* places = reinterpret_cast<const std::int64_t*>(task.indices.address(frame));
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const char* x = task.x.address(frame) + row * columns * task.x.element_bytes;
    char* y = task.y.address(frame) + row * count * task.x.element_bytes;
    for (std::int64_t i = 0; i < count; ++i, y += bytes) {
      const std::int64_t place = places[row * count + i];
      if (place < 0 || place >= columns) {
        frame.problem->store("gather: an index is out of range");
        return;
      }
      std::memcpy(y, x + place * task.x.element_bytes, bytes);
    }
  }
}

void run(const CumsumTask& task, const Frame& frame, int thread, int threads) {
  const std::int64_t columns = frame.dim(task.columns);
  const WorkRange rows = share_rows(task, frame, thread, threads);
  const auto* x = reinterpret_cast<const std::int64_t*>(task.x.address(frame));
  auto* y = reinterpret_cast<std::int64_t*>(task.y.address(frame));
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    std::partial_sum(x + row * columns, x + (row + 1) * columns, y + row * columns);
  }
}

// NaN is above all numbers, as in ATen.
bool ranks_above(double a, double b) { return a > b || (std::isnan(a) && !std::isnan(b)); }
bool ranks_above(std::int64_t a, std::int64_t b) { return a > b; }

// read(address) gives what an element is ordered by.
template <class Read>
void find_largest(const TopTask& task, const Frame& frame, WorkRange rows, Read&& read) {
  const std::int64_t columns = frame.dim(task.columns);
  const auto bytes = static_cast<std::size_t>(task.x.element_bytes);
  if (columns < task.count) {
    frame.problem->store("top_values: it asks for more than there is");
    return;
  }
  struct Candidate {
    decltype(read("")) value;
    std::int64_t index;
  };
  std::array<Candidate, TopTask::most> best;  // descending
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const char* x = task.x.address(frame) + row * columns * task.x.element_bytes;
    char* y = task.y.address(frame) + row * task.count * task.y.element_bytes;
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      const auto value = read(x + i * task.x.element_bytes);
      std::int64_t place = found;
      while (place > 0 && ranks_above(value, best[static_cast<std::size_t>(place - 1)].value)) {
        --place;
      }
      if (place == task.count) continue;
      found = std::min(found + 1, task.count);
      const auto at = best.begin() + place;
      std::copy_backward(at, best.begin() + found - 1, best.begin() + found);
      *at = {value, i};
    }
    for (std::int64_t i = 0; i < task.count; ++i, y += task.y.element_bytes) {
      const std::int64_t index = best[static_cast<std::size_t>(i)].index;
      if (task.indices) {
        std::memcpy(y, &index, sizeof index);
      } else {
        std::memcpy(y, x + index * task.x.element_bytes, bytes);
      }
    }
  }
}

void run(const TopTask& task, const Frame& frame, int thread, int threads) {
  const WorkRange rows = share_rows(task, frame, thread, threads);
  const graph::DataType dtype = task.dtype;
  if (graph::is_float(dtype)) {
    find_largest(task, frame, rows, [dtype](const char* x) { return read_scalar(dtype, x); });
  } else {  // a double would not hold all of them
    find_largest(task, frame, rows, [dtype](const char* x) { return read_integer(dtype, x); });
  }
}

void run(const HostTask&, const Frame&, int, int) {}

}  // namespace

bool is_little(const Task& task, const Frame& frame) {
  return std::visit(
      [&](const auto& work) {
        if constexpr (requires { extent(work, frame); }) {
          return is_little(extent(work, frame));
        } else {
          return false;
        }
      },
      task);
}

void run_task(const Task& task, const Frame& frame, int thread, int threads) {
  std::visit([&](const auto& work) { run(work, frame, thread, threads); }, task);
}

}  // namespace tilewright::ops
