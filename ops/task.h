// Tasks: the pieces of work of a step, each a kernel with the places its operands have and the way
// it is shared out.
//
// A task is plain data made by compile(); run_task() executes one thread's share of it. Sizes,
// offsets and strides are indices into the run's evaluated dims, so the same task serves every
// shape.
//
// Tested by program_test.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "ops/attention/attention_kernel.h"
#include "ops/dim_table.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/matmul_kernel.h"
#include "ops/kernel_library.h"
#include "ops/kv_cache.h"
#include "ops/rope_kernel.h"
#include "ops/row_kernel.h"
#include "ops/tails.h"
#include "ops/tensor_view.h"
#include "ops/threads.h"
#include "ops/weights.h"

namespace tilewright::ops {

// What a run hands to tasks.
struct Frame {
  std::span<const std::int64_t> dims;  // by DimIndex
  std::span<char* const> buffers;      // base addresses
  std::span<KvCache* const> caches;
  std::atomic<const char*>* problem;    // first error found by a task (a static string)
  Barrier* barrier;                     // of the team
  std::span<char* const> scratch = {};  // one per thread
  char* packed = nullptr;               // shared by all threads (linear_task.h)
  char* parts = nullptr;                // likewise (attention_task.h)
  // How many parts of an item are done; all zero between tasks.
  std::span<std::atomic<std::int32_t>> parts_done = {};
  Turn turn = {};  // numbered in a step of one task

  // Until all threads of the team are here. A task that one of them runs alone waits for nobody.
  void meet(int threads) const {
    if (threads > 1) barrier->wait(threads, [] {});
  }
  std::int64_t dim(DimIndex index) const { return dims[static_cast<std::size_t>(index)]; }
};

// The first element of an operand.
struct Operand {
  int buffer = -1;
  DimIndex offset{};  // elements
  std::int64_t element_bytes = 4;
  char* address(const Frame& frame) const {
    return frame.buffers[static_cast<std::size_t>(buffer)] + frame.dim(offset) * element_bytes;
  }
};

struct TaskLoop {
  DimIndex size;
  std::vector<DimIndex> strides;  // per operand, elements
};

// Which of several stacked weights multiplies which row.
struct ExpertChoice {
  std::int64_t experts, choices;
  Operand indices;  // i64 per row of y; row i is of x's row i / choices
};

struct LinearTask {
  LinearKernel spec;  // rows is set per variant
  struct Variant {
    int rows;
    const Kernel* kernel = nullptr;  // until a run needs it
    std::int64_t prefetch = 0;       // as the kernel's
    int streams = 1;                 // likewise
    int rest = 0;                    // likewise
    bool tiles = false;
  };
  // Many rows, where tiles multiply them.
  struct Tiles {
    Arithmetic arithmetic;                 // the rest of the kernels is as the specification
    std::array<Variant, 2> variants;       // 32 and 16 rows
    std::array<const Kernel*, 2> packs{};  // x of their blocks (tile_kernel.h)
    std::int64_t most_rows = 0;            // multiplied at once: their x stays in L2
    float largest_weight = 0;              // of |w|, where x is fp32
  };
  std::vector<Variant> variants;   // rows descending, the last has 1; none has a rest
  std::vector<Variant> with_rest;  // for rows that no number of blocks of one variant covers
  Variant many;                    // blocks of as many rows as the first
  const Kernel* copy = nullptr;    // rows of x to packed x
  const Kernel* pieces = nullptr;  // the same for `many`
  std::optional<Tiles> tiles;
  graph::DataType x_type;  // another than the kernels' is always packed
  std::shared_ptr<const PackedWeight> weight;
  std::int64_t most_rows;    // multiplied at once: their x stays in cache
  std::int64_t many_blocks;  // of the most rows, packed: from so many on `many` computes them
  std::int64_t pack_panels;  // from so many on a copy of f32 x pays
  DimIndex rows;             // of y
  std::optional<ExpertChoice> experts;
  Operand x, y, bias, residual;
  DimIndex x_stride, y_stride, residual_stride;  // elements per row
};

struct MatmulTask {
  MatmulKernel spec;
  const Kernel* kernel;
  DimIndex rows, columns, depth;
  Operand x, w, y;
  DimIndex x_stride, w_stride, y_stride;  // elements, as the kernel's
  std::vector<TaskLoop> batch;            // strides: x, w, y
};

struct RowTask {
  const Kernel* kernel;
  DimIndex columns;
  std::vector<Operand> operands;  // inputs, then outputs
  std::vector<TaskLoop> loops;    // outer to inner; the innermost are the kernel's rows
};

struct CopyTask {
  const Kernel* kernel;
  DimIndex columns;
  Operand x, y;
  std::vector<TaskLoop> loops;  // strides: x, y
};

// Strides of a [batch, heads, tokens, ...] operand, elements.
struct HeadStrides {
  DimIndex batch, head, token;
  std::int64_t offset(const Frame& frame, std::int64_t batch_index, std::int64_t head_index,
                      std::int64_t token_index) const {
    return batch_index * frame.dim(batch) + head_index * frame.dim(head) +
           token_index * frame.dim(token);
  }
};

// Where rope or an append puts rows: a tensor, or this step's tokens in a cache.
struct HeadDestination {
  int cache = -1;
  bool values = false;  // of the cache: V, else K
  Operand tensor;
  HeadStrides strides;
};

// Rows that are rotated before a cache of i8 takes them go through scratch, in their own type: the
// cache gets the bits that it gets of rows in memory.
struct RopeTask {
  const Kernel* kernel;
  const Kernel* quantize = nullptr;  // from scratch into the destination, a cache of i8
  std::int64_t scratch_row_bytes = 0;
  DimIndex batch, heads, tokens;
  Operand x, cosine, sine;
  HeadStrides x_strides, table_strides;  // table: batch and token
  HeadDestination destination;
};

struct AppendTask {
  const Kernel* kernel;
  bool quantizes = false;  // which kernel it is: into a cache of i8
  DimIndex batch, heads, tokens;
  std::int64_t columns;
  Operand x;
  HeadStrides x_strides;
  HeadDestination destination;
};

struct AttentionTask {
  AttentionKernel spec;
  const Kernel* kernel;                     // a part of one token of a group of heads
  const Kernel* merge;                      // the token, of its parts
  const Kernel* prefill;                    // a tile of tokens
  Arithmetic arithmetic = Arithmetic::fma;  // of the tile
  float scale, softcap;
  std::int64_t few_queries;  // up to so many go token by token
  bool causal;
  std::int64_t window = 0;  // keys that a query sees; 0: all
  DimIndex batch, kv_heads, queries;
  Operand q, output;
  HeadStrides q_strides, output_strides;
  int cache = -1;  // else plain tensors:
  DimIndex keys;
  DimIndex values_keys;  // V's own length: checked equal
  Operand k, v;
  HeadStrides k_strides, v_strides;
  Operand mask;
  HeadStrides mask_strides;  // a head stride other than 0 needs groups of one head
  Operand slopes, sinks;     // f32 per query head
};

struct EmbeddingTask {
  const Kernel* kernel;
  DimIndex rows, table_rows;
  std::int64_t columns;
  Operand table, indices, y;
};

// An embedding whose table is packed as the weight of a linear layer, by the runtime itself.
struct PackedEmbeddingTask {
  std::shared_ptr<const PackedWeight> weight;
  DimIndex rows;
  std::int64_t table_rows, columns;
  graph::DataType dtype;  // of the table and of y
  Operand indices, y;
};

// arange: i64, written by the runtime itself.
struct ArangeTask {
  DimIndex start, count;
  Operand y;
};

// Arithmetic on integers (positions, what a mask is made of), and what they become as another type,
// by the runtime itself: they are few, and AVX2 has neither products nor conversions of 64 bits.
struct IntegerTask {
  std::int64_t (*apply)(std::int64_t, std::int64_t);
  std::optional<std::int64_t> literals[2];  // in place of operands
  graph::DataType types[3];                 // of the operands: x, x, y
  std::vector<Operand> operands;            // y in the place of a literal
  std::vector<TaskLoop> loops;
};

// Elements of rows by their places, by the runtime itself: routers and token types.
struct GatherTask {
  DimIndex rows, columns, count;
  Operand x, indices, y;  // row-major
};

// Running sums along rows of i64, by the runtime itself.
struct CumsumTask {
  DimIndex rows, columns;
  Operand x, y;  // row-major
};

// The largest of each row, by the runtime itself: routers choose among few experts.
struct TopTask {
  static constexpr std::int64_t most = 64;
  DimIndex rows, columns;
  std::int64_t count;  // at most `most`
  bool indices;        // else the values
  graph::DataType dtype;
  Operand x, y;  // row-major
};

struct HostTensor {
  Operand operand;
  graph::DataType dtype;
  std::vector<DimIndex> shape;
};

// A call to oneDNN or to the front end; alone in its step, which runs outside the parallel region.
struct HostTask {
  std::string function, attributes;
  bool onednn = false;
  std::vector<HostTensor> inputs, outputs;
};

using Task = std::variant<LinearTask, MatmulTask, RowTask, CopyTask, RopeTask, AppendTask,
                          AttentionTask, EmbeddingTask, PackedEmbeddingTask, ArangeTask,
                          IntegerTask, GatherTask, CumsumTask, TopTask, HostTask>;

// Whether one thread computes all of it: sharing it out would cost more than it saves.
bool is_little(const Task& task, const Frame& frame);

// One thread's share. HostTask is not run here.
void run_task(const Task& task, const Frame& frame, int thread, int threads);

}  // namespace tilewright::ops
