// Lowering of contractions with constant weights: linear, merged projections, the gated MLP's first
// half, experts. Tested by program_test.
#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "ops/gemm/arithmetic.h"
#include "ops/gemm/linear_kernel.h"
#include "ops/gemm/tile_kernel.h"
#include "ops/lowering.h"
#include "ops/rope_kernel.h"

namespace tilewright::ops {

using graph::Dim;
using graph::Op;
using graph::ValueId;

namespace {

// Rows of a chunk. Each chunk reads all weights again, so large ones are better until their x no
// longer stays in a core's share of L3.
std::int64_t most_rows(const LinearKernel& spec, const Choices& choices) {
  const std::int64_t fitting = choices.packed_x_bytes / (4 * spec.k);
  return std::max(std::min(fitting, choices.most_chunk_rows), choices.fewest_chunk_rows);
}

// Of fp16 a second stream gave nothing clear (perf/results/linear-avx2.md).
int streams(LinearKernel spec, int rows, const Choices& choices) {
  spec.rows = rows;
  const bool gains = spec.weight != graph::DataType::f16;
  return gains && reads_several_panels(spec) ? static_cast<int>(choices.streams_row) : 1;
}

// Rows of a block that are bound by memory: the hardware, which reads ahead of the loads, keeps it
// busy.
int most_rows_by_hardware(const LinearKernel& spec) {
  if (spec.twelve_bits) return 3;
  return spec.lanes == 16 ? 6 : 4;
}

std::int64_t prefetch(const LinearKernel& spec, int rows, const Choices& choices) {
  const bool is_f16 = spec.weight == graph::DataType::f16;
  const std::int64_t least = rows > most_rows_by_hardware(spec) ? choices.prefetch_block : 0;
  if (spec.twelve_bits) return std::max(choices.prefetch_twelve_bits, least);
  if (is_f16) return std::max(choices.prefetch_f16, least);
  if (rows > most_rows_by_hardware(spec)) return choices.prefetch_block;
  const bool short_loop = spec.weight == graph::DataType::f32;
  const bool by_hardware = rows == 1 && (short_loop || streams(spec, rows, choices) > 1);
  return by_hardware ? choices.prefetch_row : choices.prefetch;
}

// A core's L2 holds them beside a piece of the weights, and each chunk reads all weights again.
// Not measured.
std::int64_t most_rows_of_tiles(const TilePack& pack) {
  constexpr std::int64_t packed_x_bytes = 3 << 19, block = 2 * kTileRows;
  const std::int64_t rows = packed_x_bytes / (block_bytes(pack) / pack.rows);
  return std::clamp<std::int64_t>(rows / block * block, 2 * block, 16 * block);
}

// Of the largest blocks any number of rows may remain; fewer rows than one of those are cut into
// the largest blocks that they fill.
void add_rests(LinearTask& task) {
  std::int64_t end = std::numeric_limits<std::int64_t>::max();  // of rows that are cut so
  for (LinearTask::Variant variant : task.variants) {
    variant.streams = 1;
    const int block = variant.rows;
    for (variant.rest = 1; variant.rest < std::min<std::int64_t>(block, end - block);
         ++variant.rest) {
      task.with_rest.push_back(variant);
    }
    end = block;
  }
}

// The kernels of a task, for people.
std::string describe(const LinearTask& task) {
  std::string text = print(task.spec);
  if (task.weight->in_place) text += " in place";
  if (!task.tiles) return text;
  return fmt::format("{}, more than {} rows: {}", text, most_rows_without_tiles,
                     name(task.tiles->arithmetic));
}

}  // namespace

// Weights are stored in their own type or, of fp32, in a 16-bit one that holds their values: the
// form changes no bit unless other instructions multiply it. Experts are not read in place: a step
// needs few of them, and packing those panels for each of its rows would cost more than it saves.
bool Lowering::can_read_in_place() const {
  for (const auto& [name, constant] : constants_) {
    if (WeightStore::is_token(constant.data)) return false;
  }
  return std::ranges::all_of(graph_.nodes, [&](const graph::Node& node) {
    if (node.op == Op::expert_linear) return false;
    if (node.op != Op::linear && node.op != Op::gated_mlp_up) return true;
    if (type(node.operands[1]).dtype != graph::DataType::f32) return true;
    const auto choice = [&](graph::DataType dtype) {
      return choose_arithmetic(target_, options_.choices.fp32_products,
                               type(node.operands[0]).dtype, {dtype});
    };
    const ArithmeticChoice own = choice(graph::DataType::f32);
    if (own.many_rows) return false;  // their range is asked for: that reads all of them
    return !weight_forms_.exact ||
           (own == choice(graph::DataType::bf16) && own == choice(graph::DataType::f16));
  });
}

// Blocks of rows that kernels exist for, largest first, and what may remain behind blocks of them.
// Any number of rows is covered: 5 = 4 + 1, 17 = 8 + 8 + 1.
void Lowering::add_kernels(LinearTask& task) {
  const Choices& choices = options_.choices;
  const ArithmeticChoice choice =
      choose_arithmetic(target_, choices.fp32_products, task.x_type, task.weight->form);
  task.spec.arithmetic = choice.few_rows;
  if (choice.many_rows && !task.experts) add_tiles(task, *choice.many_rows);
  for (int rows : choices.row_blocks(task.spec.lanes)) {
    task.variants.push_back(
        {rows, nullptr, prefetch(task.spec, rows, choices), streams(task.spec, rows, choices)});
  }
  if (!task.experts) add_rests(task);
  task.many = {task.variants.front().rows};
  task.spec.prefetch = task.variants.back().prefetch;
  task.spec.prefetch_near = choices.prefetch_near;
  task.spec.streams = task.variants.back().streams;
  task.most_rows = most_rows(task.spec, choices);
  task.many_blocks = choices.many_blocks;
  task.pack_panels = choices.pack_panels;
  const CopyKernel copy{task.spec.lanes, task.x_type, input_type(task.spec)};
  task.copy = kernels_->request(print(copy), [copy] { return build(copy); });
  if (task.experts) return;
  task.pieces = kernels_->request(print_pieces(copy), [copy] { return build_pieces(copy); });
}

void Lowering::add_tiles(LinearTask& task, Arithmetic arithmetic) {
  LinearTask::Tiles tiles{arithmetic, {{{2 * kTileRows}, {kTileRows}}}};
  if (arithmetic == Arithmetic::split_tiles) {
    tiles.largest_weight = weights_->largest_magnitude(task.weight);
    if (!in_range(tiles.largest_weight)) return;
  }
  for (std::size_t i = 0; i < tiles.variants.size(); ++i) {
    tiles.variants[i].tiles = true;
    const TilePack pack{arithmetic, tiles.variants[i].rows, task.spec.k};
    tiles.packs[i] = kernels_->request(print(pack), [pack] { return build(pack); });
  }
  tiles.most_rows = most_rows_of_tiles({arithmetic, kTileRows, task.spec.k});
  task.tiles = tiles;
}

Status Lowering::lower_linear(const graph::Node& node) {
  Epilogue epilogue;
  epilogue.bias = node.attribute_or("bias", false);
  epilogue.residual = node.attribute_or("residual", false);
  epilogue.activation = node.attribute_or<std::string>("activation", "");
  std::size_t next = 2;
  const ValueId bias = epilogue.bias ? node.operands[next++] : ValueId::none;
  const ValueId residual = epilogue.residual ? node.operands[next++] : ValueId::none;
  return lower_contraction(node, epilogue, {node.operands[1]}, bias, residual);
}

Status Lowering::lower_gated_mlp(const graph::Node& node) {
  Epilogue epilogue;
  epilogue.gated = true;
  epilogue.activation = node.attribute<std::string>("activation");
  return lower_contraction(node, epilogue, {node.operands[1], node.operands[2]}, ValueId::none,
                           ValueId::none);
}

Status Lowering::lower_contraction(const graph::Node& node, Epilogue epilogue,
                                   const std::vector<ValueId>& weights, ValueId bias,
                                   ValueId residual) {
  const ValueId input = node.operands[0], result = node.results[0];
  LinearTask task;
  task.spec.lanes = target_.lanes();
  task.spec.epilogue = epilogue;
  task.x_type = type(input).dtype;
  task.spec.output = type(result).dtype;
  task.spec.weight = type(weights[0]).dtype;

  const bool transposed = node.attribute_or("transposed", false);
  std::vector<WeightBlock> blocks;
  for (ValueId weight : weights) {
    const std::vector<std::string> sources = constant_sources(weight);
    if (sources.empty()) return Error{"its weight is not a constant"};
    const graph::Type& weight_type = type(weight);
    if (weight_type.dtype != task.spec.weight) return Error{"its weights differ in dtype"};
    if (!weight_type.shape[0].is_constant() || !weight_type.shape[1].is_constant()) {
      return Error{"its weight has a symbolic shape"};
    }
    const std::size_t out = transposed ? 1 : 0;
    task.spec.k = weight_type.shape[1 - out].constant();
    task.spec.n += weight_type.shape[out].constant();
    for (const std::string& name : sources) {
      const TensorView& source = constants_.at(name);
      const std::int64_t rows =
          sources.size() == 1 ? weight_type.shape[out].constant() : source.shape[0];
      blocks.push_back({source.data, rows,
                        weight_type.shape[1].constant() * graph::size_in_bytes(task.spec.weight),
                        transposed});
    }
  }
  if (transposed && blocks.size() != 1) return Error{"its transposed weight has several parts"};
  if (epilogue.gated && blocks.size() != 2) return Error{"gate and up must be one constant each"};
  if (epilogue.gated && blocks[0].rows != blocks[1].rows) {
    return Error{"gate and up have different sizes"};
  }
  if (Status possible = supported(task.spec); !possible) return possible;

  const std::optional<Matrix> x = matrix(layout(input), task.x_type);
  if (!x) {
    const Layout copied = contiguous(layout(input), task.x_type);
    set_layout(input, copied);
    return lower_contraction(node, epilogue, weights, bias, residual);
  }
  Result<std::shared_ptr<const PackedWeight>> packed =
      in_place_
          ? weights_->in_place(blocks, task.spec.k, task.spec.weight, epilogue.gated, weight_forms_)
          : weights_->pack(blocks, task.spec.k, task.spec.weight, epilogue.gated, weight_forms_,
                           options_.kept_weights.get(), options_.keep_weights);
  if (!packed) return packed.error();
  task.weight = *packed;
  state_->reads_in_place = state_->reads_in_place || task.weight->in_place.has_value();
  // Only rows can be read back (WeightStore::unpack), so transposed weights keep their memory.
  const bool stays = transposed || in_place_;
  for (ValueId weight : weights) {
    for (const std::string& name : constant_sources(weight)) {
      (stays ? read_in_place_ : packed_).insert(name);
    }
  }
  if (!transposed && blocks.size() == 1) serve_lookups(blocks[0].data, task.weight);
  task.spec.weight = task.weight->form.dtype;
  task.spec.twelve_bits = task.weight->form.twelve_bits;
  task.rows = dim(x->rows);
  task.x = x->operand;
  task.x_stride = dim(x->stride);
  std::vector<int> reads{x->buffer};
  if (bias != ValueId::none) {
    const Layout values = contiguous(layout(bias), type(bias).dtype);
    if (type(bias).dtype != task.spec.output) return Error{"its bias has another dtype"};
    task.bias = operand(values, type(bias).dtype);
    reads.push_back(values.buffer);
  }
  if (residual != ValueId::none) {
    if (type(residual).dtype != task.spec.output) return Error{"its residual has another dtype"};
    std::optional<Matrix> values = matrix(layout(residual), task.spec.output);
    if (!values) values = matrix(contiguous(layout(residual), task.spec.output), task.spec.output);
    task.residual = values->operand;
    task.residual_stride = dim(values->stride);
    reads.push_back(values->buffer);
  }
  set_layout(result, destination(result));
  const std::optional<Matrix> y = matrix(layout(result), task.spec.output);
  task.y = y->operand;
  task.y_stride = dim(y->stride);
  add_kernels(task);
  const std::string specification = describe(task);
  const std::int64_t bytes = task.weight->bytes;
  add_task(std::move(task), reads, {y->buffer}, work_of(graph_, node), specification);
  state_->regions.back().weight_bytes += static_cast<std::uint64_t>(bytes);
  if (!stays && packed_callback_) {
    for (ValueId weight : weights) {
      for (const std::string& name : constant_sources(weight)) {
        const bool last = readers_[constants_.at(name).data] == 1 && !read_in_place_.contains(name);
        if (last) packed_callback_(name);
      }
    }
  }
  return {};
}

// All experts are packed as one weight, one below the other; an expert is a range of its panels.
Status Lowering::lower_expert_linear(const graph::Node& node) {
  const ValueId input = node.operands[0], weight = node.operands[1], result = node.results[0];
  const graph::Shape& shape = type(weight).shape;
  const bool transposed = node.attribute_or("transposed", false);
  const std::vector<std::string> sources = constant_sources(weight);
  if (sources.size() != 1) return Error{"its weight is not one constant"};
  if (!std::all_of(shape.begin(), shape.end(), [](const Dim& d) { return d.is_constant(); })) {
    return Error{"its weight has a symbolic shape"};
  }
  const Dim& choices = type(node.operands[2]).shape[1];
  if (!choices.is_constant()) return Error{"the number of experts per row is symbolic"};

  LinearTask task;
  task.spec.lanes = target_.lanes();
  task.x_type = type(input).dtype;
  task.spec.output = type(result).dtype;
  task.spec.weight = type(weight).dtype;
  task.spec.n = shape[transposed ? 2 : 1].constant();
  task.spec.k = shape[transposed ? 1 : 2].constant();
  task.spec.epilogue.bias = node.attribute_or("bias", false);
  if (task.spec.n % panel_columns() != 0) return Error{"its experts do not fill whole panels"};
  if (Status possible = supported(task.spec); !possible) return possible;

  const std::int64_t element = graph::size_in_bytes(task.spec.weight);
  const TensorView& source = constants_.at(sources[0]);
  std::vector<WeightBlock> blocks;
  for (std::int64_t expert = 0; expert < shape[0].constant(); ++expert) {
    const auto* data = static_cast<const char*>(source.data);
    blocks.push_back({data + expert * task.spec.n * task.spec.k * element, task.spec.n,
                      (transposed ? task.spec.n : task.spec.k) * element, transposed});
  }
  Result<std::shared_ptr<const PackedWeight>> packed =
      weights_->pack(blocks, task.spec.k, task.spec.weight, false, weight_forms_,
                     options_.kept_weights.get(), options_.keep_weights);
  if (!packed) return packed.error();
  read_in_place_.insert(sources[0]);  // experts keep their memory too
  task.weight = *packed;
  task.spec.weight = task.weight->form.dtype;
  task.spec.twelve_bits = task.weight->form.twelve_bits;

  const Layout x = unit_columns(layout(input), task.x_type);
  const Layout indices = contiguous(layout(node.operands[2]), graph::DataType::i64);
  std::vector<int> reads{x.buffer, indices.buffer};
  task.experts =
      ExpertChoice{shape[0].constant(), choices.constant(), operand(indices, graph::DataType::i64)};
  task.x = operand(x, task.x_type);
  task.x_stride = dim(x.strides[0]);
  if (task.spec.epilogue.bias) {
    const ValueId bias = node.operands[3];
    if (type(bias).dtype != task.spec.output) return Error{"its bias has another dtype"};
    const Layout values = contiguous(layout(bias), task.spec.output);
    task.bias = operand(values, task.spec.output);
    reads.push_back(values.buffer);
  }
  set_layout(result, destination(result));
  const Layout y = layout(result);
  task.rows = dim(y.shape[0]);
  task.y = operand(y, task.spec.output);
  task.y_stride = dim(y.strides[0]);
  add_kernels(task);
  const std::string specification = print(task.spec);
  const std::int64_t bytes = task.weight->bytes;
  add_task(std::move(task), reads, {y.buffer}, work_of(graph_, node), "experts: " + specification);
  state_->regions.back().weight_bytes += static_cast<std::uint64_t>(bytes);
  return {};
}

}  // namespace tilewright::ops
